"""Ten minutes on a GPU: everything that this project claims of one and cannot measure on a CPU, in one run.

    python benchmarks/gpu.py             at most eight minutes on one GPU; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --toy       the same sections at toy size, on any device, in a minute: does it run at all?

Sections: the tests marked `gpu`; FP8 linear layers, forward and backward, against bfloat16; pre-training of `small` in
bfloat16 with its MFU, plain and compiled; decoding plain and as a CUDA graph; one process of NCCL. Both sides of a
ratio take turns; a figure is the median of the rounds with its smallest and largest. The results are written after
every section, and a section that fails leaves its error in them and does not stop the others.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minids import cost
from minids.cli.side_by_side import CONFIG
from minids.config import ModelConfig
from minids.course.experiment import record
from minids.fp8.linear import convert_to_fp8
from minids.inference.fused import FusedStep
from minids.inference.generate import Sampling, generate, prefill
from minids.model.transformer import MiniDS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Size:
    """Sizes of all sections; the defaults are those of the measurement, `TOY` those of a test."""

    width: int = 4096  # of the linear layers, and their rows
    preset: str = "small"
    batch: int = 32
    seq_len: int = 1024
    decoder: ModelConfig = CONFIG
    tokens: int = 64
    repeats: int = 5
    compiler: str = "inductor"


TOY = Size(128, "nano", 2, 16, ModelConfig.preset("nano"), 4, 2, "eager")


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a call, with all the work that it started on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def in_turn(sides: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time the sides in alternation, after two rounds of warm-up."""
    rounds = [{name: seconds(side, device) for name, side in sides.items()} for _ in range(repeats + 2)][2:]
    return {name: [one[name] for one in rounds] for name in sides}


def with_minids() -> dict[str, str]:
    """Return the environment of a process, in any folder, that imports minids."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    return spread([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def marked_tests(size: Size, device: torch.device) -> dict:
    """Run the tests that need a GPU, and return pytest's closing line."""
    selected = ["--collect-only"] if size is TOY else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/fp8", *selected]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"exit_status": run.returncode, "pytest": run.stdout.strip().splitlines()[-1]}


def fp8_linear(size: Size, device: torch.device) -> dict:
    """Compare forward and backward passes of a linear layer in FP8 and in bfloat16; aim 1.3 at 4096 wide."""
    layers = {name: nn.Sequential(nn.Linear(size.width, size.width, bias=False)) for name in ("bf16", "fp8")}
    convert_to_fp8(layers["fp8"])
    x = torch.randn(size.width, size.width, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)

    def passes(layer: nn.Module) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            layer(x).backward(gradient.to(x.dtype))

    sides = {name: functools.partial(passes, layer.to(device)) for name, layer in layers.items()}
    times = in_turn(sides, size.repeats, device)
    return {"bf16 / fp8": ratio(times, "bf16", "fp8"), "seconds": {name: spread(t) for name, t in times.items()}}


def pretraining(size: Size, device: torch.device) -> dict:
    """Train in bfloat16, plain and with every layer compiled: tokens per second, and MFU on a Hopper (aim 40 %)."""
    config = ModelConfig.preset(size.preset)
    tokens = torch.randint(config.vocab_size, (size.batch, size.seq_len + 1), device=device)

    def trainer(compiled: bool) -> Callable[[], None]:
        model = MiniDS(config).to(device)
        if compiled:
            for layer in model.layers:
                layer.compile(backend=size.compiler)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(tokens[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    times = in_turn({"plain": trainer(False), "compiled": trainer(True)}, size.repeats, device)
    found: dict = {"plain / compiled": ratio(times, "plain", "compiled")}
    for name, taken in times.items():
        rates = [size.batch * size.seq_len / t for t in taken]
        found[f"{name}, tokens per second"] = spread(rates)
        if device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
            flops = cost.training_flops_per_token(config, size.seq_len)
            found[f"{name}, MFU at the peak of an H800"] = spread([cost.mfu(rate, flops) for rate in rates])
    return found


def decoding(size: Size, device: torch.device) -> dict:
    """Generate greedily with the plain path, and with the fused step as one CUDA graph; the tokens must be equal."""
    torch.manual_seed(0)
    model = MiniDS(size.decoder).to(device).eval()
    prompt = torch.randint(1, size.decoder.vocab_size, (1, 16)).tolist()
    mode = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": size.compiler}
    step = torch.compile(FusedStep(model), dynamic=False, **mode)

    @torch.inference_mode()
    def graph() -> list[int]:
        """The cache always has all its slots, so that every step is the same graph; tokens stay on the device."""
        prompt_cache = model.new_cache(1, 16)
        hidden, _ = prefill(model, prompt, prompt_cache)
        layers = torch.stack(prompt_cache.layers)  # [layers, batch, slots, entry]
        cache = layers.new_zeros(16 + size.tokens, len(layers), 1, layers.shape[-1])
        cache[:16] = layers.permute(2, 0, 1, 3)
        token, produced = model.logits(hidden[:, -1:])[:, 0].argmax(-1), []
        for position in torch.arange(16, 16 + size.tokens, device=device):
            produced.append(token)
            torch.compiler.cudagraph_mark_step_begin()
            logits, entries = step(token[:, None], position.expand(1, 1), cache)
            cache.index_copy_(0, position[None], entries.transpose(1, 2))  # [1, layers, 1, entry]
            token = logits[:, 0].argmax(-1)  # a new tensor: the next replay overwrites `logits` and `entries`
        return torch.cat(produced).tolist()

    def plain() -> list[int]:
        return generate(model, prompt, max_new_tokens=size.tokens, sampling=GREEDY)[0]

    same = sum(a == b for a, b in zip(graph(), plain(), strict=True))
    times = in_turn({"plain": plain, "graph": graph}, size.repeats, device)
    return {
        "plain / graph": ratio(times, "plain", "graph"),
        "equal tokens": f"{same} of {size.tokens}",
        "ms per token": {name: spread([1e3 * t / size.tokens for t in taken]) for name, taken in times.items()},
    }


def one_process(size: Size, device: torch.device) -> dict:
    """Train a few steps under torchrun with one process: NCCL on a GPU, gloo on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "minids", "train"]
        options = ["--preset", "nano", "--steps", "3", "--seq-len", "32", "--device", device.type]
        began = time.perf_counter()
        run = subprocess.run([*launch, *options], cwd=folder, env=with_minids(), capture_output=True, text=True)
        return {
            "exit_status": run.returncode,
            "seconds": time.perf_counter() - began,
            "errors": run.stderr[-2000:] if run.returncode else "",
        }


SECTIONS = {
    "tests": marked_tests,
    "fp8": fp8_linear,
    "pretraining": pretraining,
    "decoding": decoding,
    "processes": one_process,
}


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes, also without a GPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments or None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        parser.error("there is no GPU: --toy tries the script on a CPU")
    found: dict[str, dict] = {}
    for name in options.only:
        began = time.perf_counter()
        try:
            found[name] = SECTIONS[name](TOY if options.toy else Size(), device)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        found[name]["took_seconds"] = time.perf_counter() - began
        print(name, found[name], flush=True)
        record(options.results, toy=options.toy, found=found)


if __name__ == "__main__":
    main()
