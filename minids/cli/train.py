"""`minids train`: pre-train a model, in one process or in many that torchrun has started."""

import dataclasses
import os
import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from minids.cli.options import Device, check_resume, choose_device, given, parse
from minids.cli.text import print_continuation
from minids.config import ModelConfig
from minids.data.tokenizer import Tokenizer, load_tokenizer
from minids.inference.generate import Sampling
from minids.model.transformer import MiniDS
from minids.parallel.launch import announce_run, creates_run, processes, wait_for_run
from minids.parallel.layout import Layout
from minids.training.checkpoint import latest_checkpoint, load_model, read_state
from minids.training.memory import check_training
from minids.training.metrics import Metrics, summary_writer
from minids.training.pretrain import Recipe, TextData, Trainer
from minids.training.pretraining_run import PretrainingRun, create_run, read_text
from minids.training.run import free_name, load_run, model_folder, read_metrics, removed_unless_begun

VALIDATION = "validation_bits_per_byte"
BESIDE_RESUME = {"--resume", "--steps", "--parallel", "--tensorboard", "--profile", "--compile", "--device"}


@dataclass
class Options:
    """Pre-train a model and store the run under runs/; on several devices, start it with torchrun -m minids train."""

    preset: str = "tiny"
    """Preset of the model: nano, tiny, small, medium, v2_lite, v2, v3, v3_2; the --model options change its sizes."""
    model: tyro.conf.AvoidSubcommands[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    """Sizes of the model, named as in Hugging Face's config.json; the tokenizer sets the vocabulary size."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)
    """Training settings."""
    data: tuple[str, ...] = ("pydocs", "stdlib")
    """Text to train on: pydocs, stdlib, files, folders, or hf:DATASET."""
    tokenizer: str = "bpe:2048"
    """Tokenizer: bytes, bpe:SIZE (SIZE tokens, trained on the text), or the path of a saved tokenizer."""
    max_bytes: int | None = None
    """Maximum number of bytes read from each source of text; set it for a quick trial."""
    name: str | None = None
    """Name of the run's folder under runs/; by default the preset's name, with a number where that is taken."""
    start_from: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a run or an imported model; start from its weights, sizes and tokenizer, with a new recipe."""
    resume: Path | None = None
    """Folder of a run to resume; a larger --steps trains longer, with the learning-rate schedule stretched to it."""
    parallel: str = ""
    """Layout of torchrun's processes, such as ep=2,dp=2 or pp=4,schedule=zbv; by default all are data parallel."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the run's folder; requires the tensorboard package."""
    profile: bool = False
    """Measure how long each step waits for other processes, under torchrun on CPUs; patches torch while it runs."""
    compile: bool = False
    """Compile the layers in the first step, which takes about a minute; later ones take some 10 % less. Needs g++."""
    device: Device = "auto"
    """Device to train on; auto selects CUDA where available."""


def run(command: str, arguments: list[str]) -> None:
    """Parse and run `minids train`. Raises `ValueError` for a user's mistake."""
    options = parse(Options, command, arguments, default=_defaults(arguments))
    named = given(arguments)
    check_resume(arguments, BESIDE_RESUME, "a resumed run keeps all settings except --steps")
    if options.start_from and (others := sorted(n for n in named if n.startswith(("--model", "--preset", "--tok")))):
        raise ValueError(f"{others[0]}: not allowed with --from; sizes and tokenizer are those of {options.start_from}")
    device = choose_device(options.device)
    if options.tensorboard:
        summary_writer()  # raises for a missing package before anything is written
    if options.compile and dist.is_torchelastic_launched():
        raise ValueError("--compile: for one process only; leave it out under torchrun")
    with processes(device) as world:
        directory, plan, text = _open_run(options, "--steps" in named, world, device)
        alone = not options.resume and not dist.is_torchelastic_launched()  # torchrun's processes may restart
        if options.compile:
            print("compiling the layers in the first step: a minute of processor time or more", flush=True)
        with removed_unless_begun(directory) if alone else nullcontext():
            layout = Layout.parse(options.parallel, world, plan.config.num_hidden_layers)
            trainer = _make_trainer(plan, text, layout, device, options)
            if trainer.writes_files:
                total, active = trainer.model.num_parameters(), trainer.model.num_active_parameters()
                print(f"{directory}: {total:,} parameters, {active:,} active; ", end="")
                training, held_out = len(text.train.tokens), len(text.validation.tokens)
                print(f"{training:,} tokens of text, {held_out:,} held out", flush=True)
            trainer.run(directory=directory, tensorboard=options.tensorboard)
    if trainer.writes_files:
        _report(directory, trainer.step, plan.recipe.steps, device)


def _defaults(arguments: list[str]) -> Options:
    """Return the default options; those of the model depend on the preset, which is therefore read first."""
    preset, words = "tiny", iter(arguments)
    for word in words:
        if word == "--preset":
            preset = next(words, "")
        elif word.startswith("--preset="):
            preset = word.removeprefix("--preset=")
    return Options(preset=preset, model=ModelConfig.preset(preset))


def _open_run(options: Options, more_steps: bool, world: int, device: str) -> tuple[Path, PretrainingRun, TextData]:
    """Return the run's folder, plan and text; one process creates or resumes the run, the others wait for it."""
    text = None
    if creates_run():
        if options.resume:
            directory, plan = options.resume, _resumed(options.resume, options, more_steps)
            _check_size(options, plan, world, device)
            if more_steps:
                plan.save(directory)
        else:
            plan, tokenizer = _new(options)
            _check_size(options, plan, world, device)
            directory, text = create_run(plan, tokenizer, options.name or free_name(options.preset))
        announce_run(directory)
    else:
        directory = wait_for_run()
    plan = PretrainingRun.load(directory)
    return directory, plan, text or read_text(plan, load_tokenizer(directory))


def _check_size(options: Options, plan: PretrainingRun, world: int, device: str) -> None:
    """Raise `ValueError` where the layout is impossible or the memory too small, before anything is allocated."""
    layout = Layout.parse(options.parallel, world, plan.config.num_hidden_layers)
    layout.check(plan.config, plan.recipe, world)
    exact = options.resume or options.start_from  # else the vocabulary is that of a tokenizer not yet known
    config = plan.config if exact else plan.config.replace(vocab_size=1)
    check_training(config, plan.recipe, device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world)


def _new(options: Options) -> tuple[PretrainingRun, Tokenizer | str]:
    """Return the plan of a new run, and its tokenizer or the name of one."""
    plan = PretrainingRun(options.model, options.recipe, options.data, options.max_bytes)
    if options.start_from is None:
        return plan, options.tokenizer
    model, tokenizer = load_run(options.start_from)
    return dataclasses.replace(plan, config=model.config, start_from=str(options.start_from.resolve())), tokenizer


def _resumed(directory: Path, options: Options, more_steps: bool) -> PretrainingRun:
    """Return the plan of the run to resume, with a larger number of steps if requested.

    Raises `ValueError` for fewer steps and, before more of them are stored, for a damaged checkpoint.
    """
    plan, steps = PretrainingRun.load(directory), options.recipe.steps
    if not more_steps or steps == plan.recipe.steps:
        return plan
    if steps < plan.recipe.steps:
        raise ValueError(f"--steps {steps} with --resume: must be at least the {plan.recipe.steps} steps of the run")
    if newest := latest_checkpoint(directory / "checkpoints"):
        read_state(newest)
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, steps=steps))


def _make_trainer(plan: PretrainingRun, text: TextData, layout: Layout, device: str, options: Options) -> Trainer:
    """Return the trainer of this process, which may be one of many."""
    torch.manual_seed(plan.recipe.seed)
    model = MiniDS(plan.config) if plan.start_from is None else load_model(model_folder(Path(plan.start_from)))
    if not dist.is_torchelastic_launched():
        return Trainer(model.to(device), text, plan.recipe, options.compile)
    from minids.parallel.plan import plan as plan_of
    from minids.parallel.trainer import ParallelTrainer

    if os.environ["RANK"] == "0":
        print(plan_of(layout, plan.config, plan.recipe, device), flush=True)
    return ParallelTrainer(model, text, plan.recipe, layout, device, options.profile)


def _report(directory: Path, step: int, steps: int, device: str) -> None:
    """After training, write the loss curve, and print a sample and the next commands."""
    metrics, quoted = read_metrics(directory), shlex.quote(str(directory))
    _draw(metrics, directory / "loss.png")
    if step < steps:
        print(f"\nStopped after step {step} of {steps}; everything is saved. Resume with:")
        print(f"    python -m minids train --resume {quoted}")
        return
    validation = next((m[VALIDATION] for m in reversed(metrics) if VALIDATION in m), None)
    print(f"\nValidation: {validation:.3f} bits per byte. A sample:\n" if validation else "\nA sample:\n")
    model, tokenizer = load_run(directory, device)
    generator = torch.Generator(model.head.weight.device).manual_seed(0)
    sampling = Sampling(0.7, 0.95)
    prompt = "The with statement"
    room = model.config.max_position_embeddings - 1 - len(tokenizer.encode(prompt))  # an imported context may be short
    if room > 0:
        print_continuation(
            model, tokenizer, prompt, max_new_tokens=min(300, room), sampling=sampling, generator=generator
        )
    figure = ", loss.png" if (directory / "loss.png").exists() else ""
    print(f"\nStored in {directory}/: checkpoints, metrics.jsonl{figure}. Next:")
    print(f"    python -m minids sample {quoted} --prompt 'import os'")
    print(f"    python -m minids export {quoted} my-model      # a folder that transformers loads")


def _draw(metrics: list[Metrics], path: Path) -> None:
    """Write the loss curve, if there are metrics to draw and matplotlib to draw them."""
    if not metrics:
        print(f"no loss.png: {path.with_name('metrics.jsonl')} is missing or empty")
        return
    try:
        from minids.course.plots import loss_curve
    except ImportError as error:
        print(f"no loss.png: {error.name} is missing (pip install 'minids[course]')")
    else:
        loss_curve(metrics).savefig(path, dpi=120)
