"""`minids sample`: generate text with a trained model."""

import contextlib
import functools
from pathlib import Path

import torch
from tyro.conf import Positional

from minids.cli.options import Device, call, choose_device
from minids.cli.text import print_continuation
from minids.inference.generate import Sampling
from minids.training.run import load_run, newest_run
from minids.validation import check_value


def run(command: str, arguments: list[str]) -> None:
    call(sample, command, arguments)


def sample(
    run: Positional[Path | None] = None,
    prompt: str | None = None,
    max_new_tokens: int = 300,
    temperature: float = 0.8,
    top_p: float = 0.95,
    speculative: bool = False,
    compile: bool = False,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Generate text with a trained model. Without --prompt, read prompts from the terminal until one is empty.

    Args:
        run: Folder of the run, of any kind; by default the newest.
        prompt: Text to continue.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Divisor of the logits before the softmax; lower it for less variety, 0 takes the likeliest token.
        top_p: Sample only from the likeliest tokens that together have this probability; 1 allows all tokens.
        speculative: Speculative decoding: draft with the MTP modules, and print the acceptance rate.
        compile: Decode several times as fast by a compiled step; the first time for a model's config and number of
            threads it compiles for about a minute, later starts load it from the cache folder. Needs a C++ compiler.
        seed: Seed of the sampling; change it for another text.
        device: Device to compute on; auto selects CUDA where available.
    """
    if compile and speculative:
        raise ValueError("--compile: not allowed with --speculative; leave out one of them")
    check_value("seed", seed, int, may_be_zero=True)
    model, tokenizer = load_run(run or newest_run(), choose_device(device))
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    show = functools.partial(
        print_continuation,
        model,
        tokenizer,
        speculative=speculative,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p),
        generator=generator,
        compiled=compile,
    )
    if prompt is not None:
        show(prompt)
        return
    with contextlib.suppress(EOFError):
        while prompt := input("\nprompt (empty to exit)> "):
            try:
                show(prompt)
            except ValueError as error:
                print(error)
