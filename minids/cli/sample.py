"""`minids sample`: generate text with a trained model."""

import contextlib
from pathlib import Path

import torch
from tyro.conf import Positional

from minids.cli.options import Device, call, choose_device
from minids.cli.text import print_continuation
from minids.inference.generate import Sampling
from minids.training.run import load_run, newest_run


def run(command: str, arguments: list[str]) -> None:
    call(sample, command, arguments)


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
    """Generate text with a trained model. Without --prompt, read prompts from the terminal until one is empty.

    Args:
        run: Folder of the run, of any kind; by default the newest.
        prompt: Text to continue.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Divisor of the logits before the softmax; lower it for less variety, 0 takes the likeliest token.
        top_p: Sample only from the likeliest tokens that together have this probability; 1 allows all tokens.
        speculative: Speculative decoding: draft with the MTP modules, and print the acceptance rate.
        seed: Seed of the sampling; change it for another text.
        device: Device to compute on; auto selects CUDA where available.
    """
    model, tokenizer = load_run(run or newest_run(), choose_device(device))
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    options = dict(max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_p), generator=generator)
    if prompt is not None:
        print_continuation(model, tokenizer, prompt, speculative, **options)
        return
    with contextlib.suppress(EOFError):
        while prompt := input("\nprompt (empty to exit)> "):
            try:
                print_continuation(model, tokenizer, prompt, speculative, **options)
            except ValueError as error:
                print(error)
