"""Generation: one prefill of the whole batch, then a token per sequence and step from the cache.

Notable choices: prompts of different length are padded on the right, where padding is harmless (its cache slots are
written over before anything may look at them); a sequence that has stopped leaves the batch; temperature 0 is greedy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.config import Share, check_fields
from minids.model.transformer import KVCache, MiniDS


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits. Temperature 0 takes the best; top_p cuts the tail before drawing."""

    temperature: float = 1.0
    top_p: Share = 1.0

    def __post_init__(self):
        check_fields(self, may_be_zero=("temperature",))

    def probabilities(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """The distribution that tokens are drawn from; greedy is the one that has all its mass on the best token."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        p = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, order = p.sort(-1, descending=True)
            beyond = ranked.cumsum(-1) - ranked >= self.top_p
            p = p.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def draw(
        self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "batch"]:
        """One token per row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


def check_prompts(model: MiniDS, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `ValueError` for a prompt that is empty, holds an unknown token or does not fit the context."""
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not prompts:
        raise ValueError("prompts=[]: there must be at least one")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: it must hold at least one token")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and {max_new_tokens} are to follow: the context holds {context}"
            )
        if not (0 <= min(prompt) and max(prompt) < vocab):
            raise ValueError(f"prompt {i} holds token {max(prompt)}: the vocabulary has {vocab}")


def prefill(
    model: MiniDS, prompts: Sequence[Sequence[int]], cache: KVCache, chunk: int | None = None
) -> tuple[Float[Tensor, "batch longest dim"], Int[Tensor, "batch longest"]]:
    """Read all prompts into an empty cache, `chunk` positions at a time; returns the hidden states and padded prompts.

    Padding lies right of each prompt; the cache keeps the true lengths.
    """
    device = cache.lengths.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    hidden = torch.cat([model.trunk(part, cache)[0] for part in tokens.split(chunk or longest, dim=1)], 1)
    cache.truncate(lengths)
    return hidden, tokens


@torch.inference_mode()
def stream(
    model: MiniDS,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield after each step which prompts got a token and which; a prompt falls out once it got one of `stop`."""
    check_prompts(model, prompts, max_new_tokens)
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    hidden, _ = prefill(model, prompts, cache, prefill_chunk)
    hidden = hidden[torch.arange(len(prompts)), cache.lengths - 1][:, None]
    alive = list(range(len(prompts)))
    stop = set(stop)
    for left in reversed(range(max_new_tokens)):
        tokens = sampling.draw(model.logits(hidden)[:, -1], generator)
        drawn = tokens.tolist()
        yield alive, drawn
        going = [row for row, token in enumerate(drawn) if token not in stop]
        if not going or not left:
            return
        if len(going) < len(alive):
            rows = torch.tensor(going, device=tokens.device)
            cache.keep(rows)
            tokens = tokens[rows]
            alive = [alive[row] for row in going]
        hidden, _ = model.trunk(tokens[:, None], cache)


def generate(model: MiniDS, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
    """The tokens that follow each prompt, up to and including the stop token if one came.

    Options as in `stream`: max_new_tokens, sampling, stop, generator, prefill_chunk. Raises `ValueError` for prompts
    that are empty, too long or out of the vocabulary.
    """
    completions = [[] for _ in prompts]
    for alive, drawn in stream(model, prompts, **options):
        for i, token in zip(alive, drawn, strict=True):
            completions[i].append(token)
    return completions
