"""What `minids bench` measures of generation: prefill, decoding plain, compiled and speculative."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from minids.cli.side_by_side import CONFIG, compare, in_transformers, row_of
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively
from minids.model.transformer import MiniDS
from minids.training.run import load_run, newest_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (
    "The with statement is used to", "import os\n\ndef ", "    Return the ", "class Parser:\n    def __init__(self, ",
    "This module provides", "        if self._closed:\n            raise ", "for line in ", "An object of this type",
)  # fmt: skip


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
            rows.append(compare(what, partial(_greedy, twin, prompts), ours, repeats, ">= 1"))
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
            rows.append(compare(f"decoding at batch {batch}, {name} / compiled", side, compiled, repeats, aim))
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

    return [compare("prefill of 2,000 tokens, transformers / minids", theirs, ours, repeats, ">= 1")]


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

    return [compare("decoding step, position 1024 / 128", steps_at(1024), steps_at(128), repeats, "< 1.5")]


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

    row = compare("decoding at batch 1, plain / speculative", plain, speculative, repeats, ">= 1.25")
    return [row, row_of("acceptance rate of the first draft", rates, "")]
