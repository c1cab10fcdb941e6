"""Ways to choose the tokens that a query attends to, compared on a task and on text (chapter 11).

A model with indexers attends to the `index_topk` tokens with the highest index scores. Here other scores take the place
of the indexer's: the position, for a window of the last tokens, and the attention probabilities themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.model.sparse_attention import SparseLatentAttention, choose, visible_slots
from minids.model.transformer import MiniDS

Scores = Callable[..., Float[Tensor, "batch seq slots"]]


def sparse_attentions(model: MiniDS) -> list[SparseLatentAttention]:
    """Return the attention of each layer that has an indexer."""
    return [layer.attention for layer in model.layers if isinstance(layer.attention, SparseLatentAttention)]


def by_window(attention: SparseLatentAttention) -> Scores:
    """Scores that grow with the position: the last k tokens are chosen."""
    return lambda x, latent, keys, context: torch.arange(keys.shape[1]).float().expand(*x.shape[:2], -1)


def by_probability(attention: SparseLatentAttention) -> Scores:
    """Scores equal to the attention probabilities, summed over heads: the exact top k, which costs dense attention."""

    def scores(x, latent, keys, context):
        mask = torch.full((len(x), 1, x.shape[1], x.shape[1]), -torch.inf).triu(1)
        return attention.probabilities(*attention.query_and_entry(x, context), mask)

    return scores


def choosing(model: MiniDS, k: int, scores: Callable[[SparseLatentAttention], Scores] | None = None) -> MiniDS:
    """Return a copy that attends to k tokens per query, chosen by its indexers or, if given, by other `scores`."""
    chooser = MiniDS(model.config.replace(index_topk=k))
    chooser.load_state_dict(model.state_dict())
    if scores is not None:
        for attention in sparse_attentions(chooser):
            attention.indexer.scores = scores(attention)  # type: ignore[method-assign]
    return chooser.eval()


def passages(count: int, half: int, vocab: int, generator: torch.Generator) -> Int[Tensor, "count tokens"]:
    """Draw passages of `half` random tokens, each followed by itself."""
    passage = torch.randint(vocab, (count, half), generator=generator)
    return torch.cat((passage, passage), 1)


@torch.no_grad()
def copy_accuracy(model: MiniDS, half: int, sequences: int = 64) -> float:
    """Share of the tokens of the second half that are predicted, on sequences that are always the same."""
    tokens = passages(sequences, half, model.config.vocab_size, torch.Generator().manual_seed(5))
    predicted = model(tokens[:, :-1]).logits[:, half:].argmax(-1)
    return (predicted == tokens[:, half + 1 :]).float().mean().item()


@torch.no_grad()
def caught_mass(model: MiniDS, tokens: Int[Tensor, "batch seq"], first: int = 0) -> list[float]:
    """Return the share of each layer's attention probabilities that its choice keeps, from position `first` on."""
    caught: list[float] = []

    def measure(attention: SparseLatentAttention, inputs: tuple[Any, ...]) -> None:
        x, context = inputs[:2]
        query, entries = attention.query_and_entry(x, context)
        keys = attention.indexer.key(x, context)
        scores = attention.indexer.scores(x, attention.query_latent(x), keys, context)
        visible = visible_slots(scores, None)
        mask = torch.zeros(()).where(visible, -torch.inf)[:, None]
        kept = attention.probabilities(query, entries, mask) * choose(scores, visible, attention.topk)
        caught.append(kept.sum(-1)[:, first:].mean().item())

    hooks = [attention.register_forward_pre_hook(measure) for attention in sparse_attentions(model)]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return caught
