"""Print a prompt and a model's continuation on the terminal, token by token."""

from typing import Any

from minids.data.tokenizer import Tokenizer
from minids.inference.generate import stream
from minids.inference.speculative import generate_speculatively
from minids.model.transformer import MiniDS


def print_continuation(
    model: MiniDS, tokenizer: Tokenizer, prompt: str, speculative: bool = False, **options: Any
) -> None:
    """Print the prompt and its continuation, token by token; `options` are those of `generate.stream`."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    stop = [tokenizer.eos_id]
    if speculative:
        (completion,), acceptance = generate_speculatively(model, [ids], stop=stop, **options)
        print(prompt + tokenizer.decode(completion))
        if acceptance.rounds:
            rate, gain = acceptance.rate(), acceptance.tokens_per_round
            print(f"[{rate:.0%} of the drafts accepted, {gain:.2f} tokens per pass]")
        else:
            print("[no drafts: the first token was the last]")
        return
    print(prompt, end="", flush=True)
    completion, shown = [], ""
    for _, (token,), _ in stream(model, [ids], stop=stop, **options):
        completion.append(token)
        text = tokenizer.decode(completion)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
