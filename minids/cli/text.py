"""Print a prompt and a model's continuation on the terminal, token by token."""

import torch

from minids.data.tokenizer import Tokenizer
from minids.inference.generate import Sampling, stream
from minids.inference.speculative import generate_speculatively
from minids.model.transformer import MiniDS


def print_continuation(
    model: MiniDS,
    tokenizer: Tokenizer,
    prompt: str,
    speculative: bool = False,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    compiled: bool = False,
) -> None:
    """Print the prompt and its continuation, token by token, up to `max_new_tokens` tokens or <eos>.

    Raises `ValueError` for a prompt that is not UTF-8, and as `generate.stream` does.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
        raise ValueError(f"prompt={prompt!r}: must be UTF-8 text") from None
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    stop = [tokenizer.eos_id]
    if speculative:
        (completion,), acceptance = generate_speculatively(
            model, [ids], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, generator=generator
        )
        print(prompt + tokenizer.decode(completion))
        if acceptance.rounds:
            rate, gain = acceptance.rate(), acceptance.tokens_per_round
            print(f"[{rate:.0%} of the drafts accepted, {gain:.2f} tokens per pass]")
        else:
            print("[no drafts: the first token was the last]")
        return
    print(prompt, end="", flush=True)
    completion, shown = [], ""
    steps = stream(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        generator=generator,
        compiled=compiled,
    )
    for _, (token,), _ in steps:
        completion.append(token)
        text = tokenizer.decode(completion)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
