"""What `minids bench` measures of training: time, memory, number of experts; on a GPU the share of its peak."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from minids import cost
from minids.cli import loss_memory
from minids.cli.side_by_side import CONFIG, compare, in_transformers, row_of
from minids.config import ModelConfig
from minids.model.transformer import MiniDS
from minids.training.compile import compile_layers

BATCH, SEQ_LEN = 8, 256
SMALL_SEQ_LEN = 1024
WORDS = 32_768  # vocabulary of the loss whose memory is compared


def training(repeats: int) -> list[dict]:
    """Compare a training step with transformers' experts implementations; float32 and AdamW on both sides."""
    model, twin = MiniDS(CONFIG), in_transformers(MiniDS(CONFIG))
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    ours, theirs = _training_step(model, tokens), _training_step(twin, tokens)
    rows = []
    for implementation in ("grouped_mm", "eager"):
        twin.set_experts_implementation(implementation)
        what = f"training step, transformers {implementation} / minids"
        rows.append(compare(what, theirs, ours, repeats, ">= 1.25"))
    in_bf16 = _training_step(model, tokens, torch.bfloat16)
    if torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"):
        rows.append(compare("training step, float32 / bfloat16", ours, in_bf16, repeats, ">= 1.6"))
    return rows


def compiled_training(repeats: int) -> list[dict]:
    """Compare a training step, ours and transformers', with one of compiled layers, compiled first (about a minute)."""
    plain, compiled = MiniDS(CONFIG), MiniDS(CONFIG)
    compile_layers(compiled)
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    ours, theirs, faster = (_training_step(model, tokens) for model in (plain, in_transformers(plain), compiled))
    return [
        compare("training step, plain / compiled", ours, faster, repeats, ""),
        compare("training step, transformers grouped_mm / compiled", theirs, faster, repeats, ">= 1.25"),
    ]


def peak_memory(repeats: int) -> list[dict]:
    """Compare the peak memory of three training steps, transformers over minids; on Linux only."""
    if not Path("/proc/self/status").exists():
        return []
    code = "from minids.cli.bench_training import measure_peak_memory; print(measure_peak_memory({!r}))"
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", code.format(side)], stderr=subprocess.DEVNULL, text=True))
        for side in ("transformers", "minids")
    ]
    ratio = peaks[0] / peaks[1]
    return [row_of("peak memory of training, transformers / minids", [ratio], ">= 1")]


def measure_peak_memory(side: str) -> int:
    """Take three training steps; return the peak memory of this process above that before them, in bytes (Linux)."""
    torch.set_num_threads(1)
    model = MiniDS(CONFIG) if side == "minids" else in_transformers(MiniDS(CONFIG))
    before = _memory("VmRSS")
    step = _training_step(model, torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1)))
    for _ in range(3):
        step()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    """Return this process's memory in bytes: VmRSS is the current memory, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_of_loss(repeats: int) -> list[dict]:
    """Compare the peak memory of the head and its loss at a large vocabulary, from whole logits over in chunks."""
    whole, chunked = loss_memory.peaks(WORDS, BATCH * SEQ_LEN, CONFIG.hidden_size).values()
    return [row_of(f"peak memory of the loss of {WORDS:,} words, whole logits / chunks", [whole / chunked], ">= 3")]


def number_of_experts(repeats: int) -> list[dict]:
    """Compare a training step of 64 and of 256 experts with one of 8 experts of the same size, top-k fixed."""
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    few = _training_step(MiniDS(CONFIG.replace(n_routed_experts=8)), tokens)
    rows = []
    for count, aim in ((64, "<= 1.4"), (256, "<= 1.6")):
        many = _training_step(MiniDS(CONFIG.replace(n_routed_experts=count)), tokens)
        rows.append(compare(f"training step, {count} experts / 8 experts", many, few, repeats, aim))
    return rows


def cuda_training(repeats: int) -> list[dict]:
    """Measure tokens per second and model FLOPs utilisation of the preset `small` in bfloat16 on the GPU."""
    config = ModelConfig.preset("small")
    model = MiniDS(config).cuda()
    tokens = torch.randint(config.vocab_size, (32, SMALL_SEQ_LEN + 1), device="cuda")
    step = _training_step(model, tokens, torch.bfloat16)
    seconds = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    rates = [tokens[:, 1:].numel() / s for s in seconds[2:]]
    rows = [row_of("small on the GPU, thousand tokens/s in bf16", [rate / 1e3 for rate in rates], "")]
    if torch.cuda.get_device_capability() == (9, 0):  # Hopper, whose peak is the default of `cost.mfu`
        flops = cost.training_flops_per_token(config, SMALL_SEQ_LEN)
        shares = [cost.mfu(rate, flops) for rate in rates]
        rows.append(row_of("small on the GPU, FLOPs of the model over the peak of an H800", shares, ""))
    return rows


def _training_step(
    model: torch.nn.Module, tokens: torch.Tensor, dtype: torch.dtype | None = None
) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast(tokens.device.type, dtype, enabled=dtype is not None):
            logits = model(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
