"""Side-by-side measurements: this package against transformers, and against itself, in one run each.

Both sides have the same weights and batches, take turns, and are compared pair by pair, so that a machine that slows
down slows down both. Printed is the median ratio with its spread (smallest to largest). Work is counted in CPU seconds
of this process; on one thread that is the time it takes undisturbed.
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from tyro.conf import Positional

from minids import cost
from minids.config import ModelConfig
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively
from minids.interop.hf import save_pretrained
from minids.model.transformer import MiniDS
from minids.run import load_run, newest_run

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=6,
    num_nextn_predict_layers=0, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1, n_routed_experts=16,
    num_experts_per_tok=4, n_group=4, topk_group=2, max_position_embeddings=2048, initializer_range=None,
    aux_loss_alpha=0.0,
)  # fmt: skip
BATCH, SEQ_LEN = 8, 256
SMALL_SEQ_LEN = 1024
PROMPTS = (
    "The with statement is used to", "import os\n\ndef ", "    Return the ", "class Parser:\n    def __init__(self, ",
    "This module provides", "        if self._closed:\n            raise ", "for line in ", "An object of this type",
)  # fmt: skip


def training(repeats: int) -> list[dict]:
    """A training step against transformers with each of its experts implementations, float32 and AdamW on both."""
    model, twin = MiniDS(CONFIG), _transformers_twin(MiniDS(CONFIG))
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    ours, theirs = _training_step(model, tokens), _training_step(twin, tokens)
    rows = []
    for implementation in ("grouped_mm", "eager"):
        twin.set_experts_implementation(implementation)
        what = f"training step, transformers {implementation} / minids"
        rows.append(_compare(what, theirs, ours, repeats, ">= 1.2"))
    in_bf16 = _training_step(model, tokens, torch.bfloat16)
    if torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"):
        rows.append(_compare("training step, float32 / bfloat16", ours, in_bf16, repeats, ""))
    return rows


def peak_memory(repeats: int) -> list[dict]:
    """Peak memory of a process that takes three training steps, transformers over minids; on Linux only."""
    if not Path("/proc/self/status").exists():
        return []
    code = "from minids import bench; print(bench.measure_peak_memory({!r}))"
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", code.format(side)], stderr=subprocess.DEVNULL, text=True))
        for side in ("transformers", "minids")
    ]
    ratio = peaks[0] / peaks[1]
    return [_row("peak memory of training, transformers / minids", [ratio], ">= 1")]


def measure_peak_memory(side: str) -> int:
    """Take three training steps and return the peak of this process's memory beyond the start, in bytes (Linux)."""
    torch.set_num_threads(1)
    model = MiniDS(CONFIG) if side == "minids" else _transformers_twin(MiniDS(CONFIG))
    before = _memory("VmRSS")
    step = _training_step(model, torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1)))
    for _ in range(3):
        step()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    """Of this process, in bytes: VmRSS is what it has now, VmHWM the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def decoding(repeats: int) -> list[dict]:
    """Cached greedy decoding against transformers `generate`, at batch 1 and 16."""
    model = MiniDS(CONFIG).eval()
    twin = _transformers_twin(model).eval()
    rows = []
    for batch in (1, 16):
        prompts = torch.randint(1, CONFIG.vocab_size, (batch, 16))

        def ours(prompts=prompts):
            generate(model, prompts.tolist(), max_new_tokens=64, sampling=Sampling(0.0))

        def theirs(prompts=prompts):
            with torch.inference_mode():
                twin.generate(prompts, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)

        for implementation in ("eager", "grouped_mm"):
            twin.set_experts_implementation(implementation)
            what = f"decoding at batch {batch}, transformers {implementation} / minids"
            rows.append(_compare(what, theirs, ours, repeats, ">= 4"))
    return rows


def number_of_experts(repeats: int) -> list[dict]:
    """A training step with 64 experts against one with 8 of the same size, top-k fixed."""
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    many, few = (_training_step(MiniDS(CONFIG.replace(n_routed_experts=n)), tokens) for n in (64, 8))
    return [_compare("training step, 64 experts / 8 experts", many, few, repeats, "<= 1.4")]


def context_length(repeats: int) -> list[dict]:
    """A cached decoding step at position 1024 against one at position 128."""
    model = MiniDS(CONFIG).eval()

    def steps_at(position: int) -> Callable[[], None]:
        cache = model.new_cache(1, 2048)

        @torch.inference_mode()
        def steps():
            cache.truncate(torch.tensor([position]))
            for _ in range(32):
                model.trunk(torch.zeros(1, 1, dtype=torch.int64), cache)

        return steps

    return [_compare("decoding step, position 1024 / 128", steps_at(1024), steps_at(128), repeats, "< 1.5")]


def speculation(repeats: int) -> list[dict]:
    """Greedy decoding with the trained MTP module against plain decoding, at batch 1."""
    model, tokenizer = load_run(newest_run())
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    options = dict(max_new_tokens=32, sampling=Sampling(0.0))  # longer ones of a small model are loops
    rates = []

    def plain():
        for prompt in prompts:
            generate(model, [prompt], **options)

    def speculative():
        for prompt in prompts:
            rates.append(generate_speculatively(model, [prompt], **options)[1].rate())

    row = _compare("decoding at batch 1, plain / speculative", plain, speculative, repeats, ">= 1.25")
    return [row, _row("acceptance rate of the first draft", rates, "")]


def cuda_training(repeats: int) -> list[dict]:
    """Tokens per second and model FLOPs utilisation of the preset `small` in bfloat16 on the GPU."""
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
    rows = [_row("small on the GPU, thousand tokens/s in bf16", [rate / 1e3 for rate in rates], "")]
    if torch.cuda.get_device_capability() == (9, 0):  # Hopper, whose peak is the default of `cost.mfu`
        flops = cost.training_flops_per_token(config, SMALL_SEQ_LEN)
        shares = [cost.mfu(rate, flops) for rate in rates]
        rows.append(_row("small on the GPU, FLOPs of the model over the peak of an H800", shares, ""))
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


def _transformers_twin(model: MiniDS) -> torch.nn.Module:
    """The same weights in transformers' own model, with the implementation of experts that trains fastest."""
    from transformers import AutoModelForCausalLM  # slow to import, and needed by this command only

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        twin = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    twin.set_experts_implementation("grouped_mm")
    return twin


def _compare(what: str, numerator: Callable, denominator: Callable, repeats: int, aim: str) -> dict:
    """CPU seconds of the first over those of the second, pair by pair, after one pair to warm up."""
    ratios, seconds = [], []
    for _ in range(repeats + 1):
        pair = [_cpu_seconds(numerator), _cpu_seconds(denominator)]
        ratios.append(pair[0] / pair[1])
        seconds.append(pair)
    return _row(what, ratios[1:], aim) | {"cpu_seconds": seconds[1:]}


def _cpu_seconds(function: Callable) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def _row(what: str, figures: list[float], aim: str) -> dict:
    return {"what": what, "median": statistics.median(figures), "low": min(figures), "high": max(figures), "aim": aim}


QUESTIONS = {
    "train": training,
    "memory": peak_memory,
    "decode": decoding,
    "experts": number_of_experts,
    "context": context_length,
    "speculative": speculation,
}


def bench_command(
    names: Positional[tuple[Literal[*QUESTIONS], ...]] = tuple(QUESTIONS), repeats: int = 7, json: bool = False
) -> None:
    """Measure side by side with transformers, and print ratios with their spread.

    Args:
        names: What to measure; speculative decoding takes the newest run.
        repeats: How often both sides are measured in turn.
        json: Print the figures as JSON.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: a spread needs at least 2")
    torch.set_num_threads(1)
    rows = [row for name in tqdm(names, disable=json) for row in QUESTIONS[name](repeats)]
    if torch.cuda.is_available():
        rows += cuda_training(repeats)
    machine = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if json:
        print(dumps({"machine": machine, "rows": rows}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("| what | figure | smallest to largest | aim |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['median']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['aim']} |")
