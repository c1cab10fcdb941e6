"""`minids bench`: compare this package with transformers, and with itself, in one run each.

Both sides have the same weights and batches, run in alternation, and are compared pair by pair, so that a machine that
slows down affects both. The output is the median ratio with its spread (smallest to largest). Work is measured in CPU
seconds of this process, which on one thread exclude the time of other processes.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from tyro.conf import Positional

from minids import cost
from minids.cli import loss_memory
from minids.cli.options import call
from minids.config import ModelConfig
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively
from minids.interop.hf import save_pretrained
from minids.model.transformer import MiniDS
from minids.training.run import load_run, newest_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=6,
    num_nextn_predict_layers=0, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1, n_routed_experts=16,
    num_experts_per_tok=4, n_group=4, topk_group=2, max_position_embeddings=2048, initializer_range=None,
    aux_loss_alpha=0.0,
)  # fmt: skip
BATCH, SEQ_LEN = 8, 256
SMALL_SEQ_LEN = 1024
WORDS = 32_768  # vocabulary of the loss whose memory is compared
PROMPTS = (
    "The with statement is used to", "import os\n\ndef ", "    Return the ", "class Parser:\n    def __init__(self, ",
    "This module provides", "        if self._closed:\n            raise ", "for line in ", "An object of this type",
)  # fmt: skip


def training(repeats: int) -> list[dict]:
    """Compare a training step with transformers' experts implementations; float32 and AdamW on both sides."""
    model, twin = MiniDS(CONFIG), in_transformers(MiniDS(CONFIG))
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
    """Compare the peak memory of three training steps, transformers over minids; on Linux only."""
    if not Path("/proc/self/status").exists():
        return []
    code = "from minids.cli import bench; print(bench.measure_peak_memory({!r}))"
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", code.format(side)], stderr=subprocess.DEVNULL, text=True))
        for side in ("transformers", "minids")
    ]
    ratio = peaks[0] / peaks[1]
    return [_row("peak memory of training, transformers / minids", [ratio], ">= 1")]


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
    return [_row(f"peak memory of the loss of {WORDS:,} words, whole logits / chunks", [whole / chunked], ">= 3")]


def decoding(repeats: int) -> list[dict]:
    """Compare cached greedy decoding with transformers' `generate`, at batch 1 and 16."""
    model = MiniDS(CONFIG).eval()
    twin = in_transformers(model).eval()
    rows = []
    for batch in (1, 16):
        prompts = torch.randint(1, CONFIG.vocab_size, (batch, 16))

        def ours(prompts=prompts):
            generate(model, prompts.tolist(), max_new_tokens=64, sampling=Sampling(0.0))

        for implementation in ("eager", "grouped_mm"):
            twin.set_experts_implementation(implementation)
            what = f"decoding at batch {batch}, transformers {implementation} / minids"
            rows.append(_compare(what, partial(_greedy, twin, prompts), ours, repeats, ">= 1"))
    return rows


def compiled_decoding(repeats: int) -> list[dict]:
    """Compare plain decoding and transformers' with the compiled step, which is built once (about a minute)."""
    model = MiniDS(CONFIG).eval()
    twin = in_transformers(model).eval()
    rows = []
    for batch, aims in ((1, (">= 3", ">= 4")), (16, ("", ">= 2"))):
        prompts = torch.randint(1, CONFIG.vocab_size, (batch, 16))
        ours = partial(generate, model, prompts.tolist(), max_new_tokens=64, sampling=Sampling(0.0))
        sides: dict[str, Callable] = {"minids": ours, "transformers grouped_mm": partial(_greedy, twin, prompts)}
        compiled = partial(ours, compiled=True)
        for (name, side), aim in zip(sides.items(), aims, strict=True):
            rows.append(_compare(f"decoding at batch {batch}, {name} / compiled", side, compiled, repeats, aim))
    return rows


@torch.inference_mode()
def _greedy(twin: "PreTrainedModel", prompts: torch.Tensor) -> None:
    twin.generate(prompts, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)


def prefill(repeats: int) -> list[dict]:
    """Compare the prefill of a prompt of 2,000 tokens with transformers'."""
    model = MiniDS(CONFIG).eval()
    twin = in_transformers(model).eval()
    prompt = torch.randint(1, CONFIG.vocab_size, (1, 2000))

    @torch.inference_mode()
    def ours() -> None:
        model.logits(model.trunk(prompt, model.new_cache(1, 2000))[0][:, -1:])

    @torch.inference_mode()
    def theirs() -> None:
        twin(prompt, use_cache=True, logits_to_keep=1)

    return [_compare("prefill of 2,000 tokens, transformers / minids", theirs, ours, repeats, ">= 1")]


def number_of_experts(repeats: int) -> list[dict]:
    """Compare a training step of 64 and of 256 experts with one of 8 experts of the same size, top-k fixed."""
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, SEQ_LEN + 1))
    few = _training_step(MiniDS(CONFIG.replace(n_routed_experts=8)), tokens)
    rows = []
    for count, aim in ((64, "<= 1.4"), (256, "<= 1.6")):
        many = _training_step(MiniDS(CONFIG.replace(n_routed_experts=count)), tokens)
        rows.append(_compare(f"training step, {count} experts / 8 experts", many, few, repeats, aim))
    return rows


def context_length(repeats: int) -> list[dict]:
    """Compare a cached decoding step at position 1024 with one at position 128."""
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
    """Compare plain greedy decoding with speculative decoding by the trained MTP module, at batch 1."""
    model, tokenizer = load_run(newest_run())
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    options = dict(max_new_tokens=32, sampling=Sampling(0.0))  # longer outputs of a small model repeat themselves
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


def in_transformers(model: MiniDS) -> "PreTrainedModel":
    """Return transformers' model with the same weights, and the experts implementation that trains fastest."""
    from transformers import AutoModelForCausalLM  # slow to import; only this command needs it

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        twin = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    twin.set_experts_implementation("grouped_mm")
    return twin


def _compare(what: str, numerator: Callable, denominator: Callable, repeats: int, aim: str) -> dict:
    """Measure the ratio of CPU seconds, numerator over denominator, pair by pair, after one warm-up pair."""
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


def startup(repeats: int) -> list[dict]:
    """CPU seconds until a command can begin, over those of `import torch`; each in a process of its own."""
    commands = {
        "minids --help": ["-m", "minids", "--help"],
        "minids cost v3": ["-m", "minids", "cost", "v3"],
        "minids train --help": ["-m", "minids", "train", "--help"],
    }

    def start(arguments: list[str]) -> float:
        began = os.times()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        ended = os.times()
        return ended.children_user + ended.children_system - began.children_user - began.children_system

    rows = []
    for name, arguments in commands.items():
        ratios = [start(arguments) / start(["-c", "import torch"]) for _ in range(repeats + 1)]
        rows.append(_row(f"start-up, {name} / import torch", ratios[1:], "<= 1.6"))
    return rows


Question = Literal[
    "train", "memory", "loss", "decode", "compiled", "prefill", "experts", "context", "speculative", "startup"
]
QUESTIONS: dict[Question, Callable[[int], list[dict]]] = {
    "train": training,
    "memory": peak_memory,
    "loss": memory_of_loss,
    "decode": decoding,
    "compiled": compiled_decoding,
    "prefill": prefill,
    "experts": number_of_experts,
    "context": context_length,
    "speculative": speculation,
    "startup": startup,
}


def run(command: str, arguments: list[str]) -> None:
    call(bench_command, command, arguments)


def bench_command(
    names: Positional[tuple[Question, ...]] = tuple(QUESTIONS), repeats: int = 7, json: bool = False
) -> None:
    """Compare this package with transformers, and print ratios with their spread.

    Args:
        names: Measurements to run; `speculative` uses the newest run.
        repeats: Number of measurements of both sides in alternation; raise it on a busy machine.
        json: Print the figures as JSON, for a program to read.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2, to measure a spread")
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
