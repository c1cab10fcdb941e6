"""The command line: python -m minids train | sample | rl | r1 | export | import | bench | grade | cost | schedule.

A user's mistake gets one line and exit status 2; an interrupted run says how to go on with it.
"""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from minids import bench, cost
from minids.config import ModelConfig
from minids.course import grade
from minids.course.plots import loss_curve
from minids.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from minids.inference.generate import Sampling, stream
from minids.inference.speculative import generate_speculatively
from minids.interop.hf import load_pretrained, save_pretrained
from minids.model.transformer import MiniDS
from minids.parallel import schedule
from minids.parallel.mesh import Layout, begins, processes, published
from minids.parallel.trainer import ParallelTrainer
from minids.reasoning.commands import r1_command, rl_command
from minids.run import RUNS, Run, begin_run, free_name, load_run, newest_run, read_metrics, read_text, save_imported
from minids.training.loop import Recipe, Trainer
from minids.training.metrics import summary_writer
from minids.training.resumable import Diverged

Positional, Flat = tyro.conf.Positional, tyro.conf.OmitArgPrefixes
Device = Literal["auto", "cpu", "cuda"]


def train_command(
    preset: str = "tiny",
    recipe: Flat[Recipe] = Recipe(),  # noqa: B008 - frozen
    data: tuple[str, ...] = ("pydocs", "stdlib"),
    tokenizer: str = "bpe:2048",
    max_bytes: int | None = None,
    name: str | None = None,
    resume: Path | None = None,
    parallel: str = "",
    tensorboard: bool = False,
    device: Device = "auto",
) -> None:
    """Pre-train a model and keep the run under runs/; on several devices, start it with torchrun -m minids train.

    Args:
        preset: Size of the model: nano, tiny, small, medium, v2_lite, v2 or v3.
        data: Text to read: pydocs, stdlib, files, folders, or hf:DATASET.
        tokenizer: bytes, bpe:SIZE (trained on the text), or the path of a saved tokenizer.
        max_bytes: Read no more than this from each source of text.
        name: Folder under runs/; by default the preset's name, with a number where that is taken.
        resume: Folder of a run to go on with; all but parallel, tensorboard and device is read from there.
        parallel: How the processes of torchrun share the work, such as ep=2,dp=2 or pp=4,schedule=zbv.
        tensorboard: Write the metrics also for TensorBoard, into the run's folder; needs its package.
        device: Where to train; auto takes CUDA where there is one.
    """
    device = _choose(device)
    if tensorboard:
        summary_writer()  # a missing package is said before anything is written
    with processes(device) as world:
        layout = Layout.parse(parallel, world)
        run = Run.load(resume) if resume else Run(ModelConfig.preset(preset), recipe, data, max_bytes)
        layout.check(run.config, run.recipe, world)
        begun = begin_run(run, tokenizer, name or free_name(preset)) if not resume and begins() else None
        directory = resume or published(begun and begun[0])
        run = Run.load(directory)
        text = begun[1] if begun else read_text(run, load_tokenizer(directory))
        torch.manual_seed(run.recipe.seed)
        if torch.distributed.is_torchelastic_launched():
            if os.environ["RANK"] == "0":
                print(layout.plan(run.config, run.recipe, device), flush=True)
            trainer = ParallelTrainer(MiniDS(run.config), text, run.recipe, layout, device)
        else:
            trainer = Trainer(MiniDS(run.config).to(device), text, run.recipe)
        if trainer.writes_files:
            total, active = trainer.model.num_parameters(), trainer.model.num_active_parameters()
            print(f"{directory}: {total:,} parameters, {active:,} active; ", end="")
            print(f"{len(text.train.tokens):,} tokens of text, {len(text.validation.tokens):,} held out", flush=True)
        trainer.run(directory=directory, tensorboard=tensorboard)
    if trainer.writes_files:
        _report(directory, run.recipe, device)


def sample(
    run: Positional[Path | None] = None,
    prompt: str | None = None,
    max_new_tokens: int = 300,
    temperature: float = 0.8,
    top_p: float = 0.95,
    speculative: bool = False,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Let a trained model go on with a text. Without --prompt it asks for one, again and again.

    Args:
        run: Folder of the run; by default the newest.
        prompt: Text to go on with.
        max_new_tokens: Tokens to generate at most.
        temperature: 0 always takes the likeliest token.
        top_p: Draw from the likeliest tokens that together have this probability.
        speculative: Draft with the MTP modules, and say how many drafts were accepted.
        seed: Seed of the draws.
    """
    model, tokenizer = load_run(run or newest_run(), _choose(device))
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    options = dict(max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_p), generator=generator)
    if prompt is not None:
        _continue(model, tokenizer, prompt, speculative, options)
        return
    with contextlib.suppress(EOFError):
        while prompt := input("\nprompt (empty to leave)> "):
            try:
                _continue(model, tokenizer, prompt, speculative, options)
            except ValueError as error:
                print(error)


def export(run: Positional[Path], directory: Positional[Path], fp8: bool = False) -> None:
    """Write the model of a run as a Hugging Face DeepSeek-V3 folder, which transformers loads.

    Args:
        run: Folder of the run.
        directory: Folder to write; it must not exist yet.
        fp8: Write matrices in FP8 with a scale for each block, as DeepSeek released V3.
    """
    model, tokenizer = load_run(run)
    save_pretrained(model, directory, fp8=fp8)
    tokenizer.save(directory)
    print(f"{directory} holds {model.num_parameters(mtp=True):,} parameters as DeepseekV3ForCausalLM")


def import_command(directory: Positional[Path], name: Positional[str]) -> None:
    """Read a Hugging Face DeepSeek-V2 or V3 folder into a run, to sample from it.

    Args:
        directory: Folder with config.json, safetensors, and a tokenizer.json that minids wrote.
        name: Folder to make under runs/.
    """
    destination = RUNS / name
    if destination.exists():
        raise ValueError(f"{destination} exists: choose another name")
    tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").exists() else ByteTokenizer()
    model = load_pretrained(directory)
    save_imported(model, tokenizer, destination)
    print(f"{destination} holds {model.num_parameters(mtp=True):,} parameters. Next:")
    print(f"    python -m minids sample {destination}")


def grade_command(
    submissions: Positional[Path],
    csv: Path | None = None,
    junit: Path | None = None,
    seconds: float = grade.SECONDS,
) -> None:
    """Run and judge the exercise notebooks of a class, and print a table of points.

    Args:
        submissions: A folder with one folder per student, which holds notebooks such as 02_mla.ipynb.
        csv: Write the table here too, as CSV.
        junit: Write the table here too, as JUnit XML.
        seconds: Time that one notebook may take; the checks of each exercise may take as long again.
    """
    for path in filter(None, (csv, junit)):
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
    if grade.walls_stand():
        warning = "notebooks run behind walls: each sees its own folder, Python and this package, and no network"
    else:
        warning = (
            "this runs the students' code as you, on this machine, with limits on time and memory only; "
            "notebooks from people you do not trust belong in a container or an account of their own"
        )
    print(f"minids: {warning}", flush=True)
    grades = grade.grade(submissions, seconds)
    print("\n".join(grade.as_text(grades)))
    if csv is not None:
        grade.write_csv(grades, csv)
    if junit is not None:
        grade.write_junit(grades, junit)


def _choose(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': there is no CUDA device here")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _report(directory: Path, recipe: Recipe, device: str) -> None:
    """After training: the figure, a sample, and what to do next."""
    metrics = read_metrics(directory)
    loss_curve(metrics).savefig(directory / "loss.png", dpi=120)
    if metrics[-1]["step"] < recipe.steps:
        print(f"\nStopped after step {metrics[-1]['step']} of {recipe.steps}; everything is saved. Go on with:")
        print(f"    python -m minids train --resume {directory}")
        return
    print(f"\nValidation: {metrics[-1]['validation_bits_per_byte']:.3f} bits per byte. A sample:\n")
    model, tokenizer = load_run(directory, device)
    generator = torch.Generator(model.head.weight.device).manual_seed(0)
    options = dict(max_new_tokens=300, sampling=Sampling(0.7, 0.95), generator=generator)
    _continue(model, tokenizer, "The with statement", False, options)
    print(f"\nKept in {directory}/: checkpoints, metrics.jsonl, loss.png. Next:")
    print(f"    python -m minids sample {directory} --prompt 'import os'")
    print(f"    python -m minids export {directory} my-model      # a folder that transformers loads")


def _continue(model: MiniDS, tokenizer: Tokenizer, prompt: str, speculative: bool, options: dict) -> None:
    """Print the prompt and what follows, token by token as it comes."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    stop = [tokenizer.eos_id]
    if speculative:
        (completion,), acceptance = generate_speculatively(model, [ids], stop=stop, **options)
        print(prompt + tokenizer.decode(completion))
        print(f"[{acceptance.rate():.0%} of the drafts accepted, {acceptance.tokens_per_round:.2f} tokens per pass]")
        return
    print(prompt, end="", flush=True)
    completion, shown = [], ""
    for _, (token,) in stream(model, [ids], stop=stop, **options):
        completion.append(token)
        text = tokenizer.decode(completion)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


COMMANDS = {
    "train": train_command,
    "sample": sample,
    "rl": rl_command,
    "r1": r1_command,
    "export": export,
    "import": import_command,
    "bench": bench.bench_command,
    "grade": grade_command,
    "cost": cost.cost_report,
    "schedule": schedule.schedule_command,
}


def _later(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """What tyro should call in place of `function`: it takes the arguments that were parsed, and runs nothing yet."""

    @functools.wraps(function)
    def prepare(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    return prepare


def _parse() -> Callable[[], None]:
    """The command that was asked for, ready to run. Raises `ValueError` with tyro's complaint on one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            commands = {name: _later(function) for name, function in COMMANDS.items()}
            return tyro.extras.subcommand_cli_from_dict(commands, prog="python -m minids", description=__doc__)
    except SystemExit as exit:
        if not exit.code:
            raise
        first_section = re.split(r"(?m)^.*[─-]{5}.*$", complaint.getvalue())[1]  # what stands under the box's title
        text = " ".join(line.strip("│ ") for line in first_section.split("\n")).strip()
        text = text.replace("Error parsing __tyro-dummy-inner__.recipe: ", "").rstrip(".")
        raise ValueError(f"{text}; see --help") from None


def main() -> int:
    """Run the command; a user's mistake is one line on stderr and status 2."""
    try:
        _parse()()
    except (ValueError, OSError, Diverged) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError):  # a mistake is one on all ranks
            print(f"minids: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minids: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
