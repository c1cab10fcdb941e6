"""Speculative decoding: the MTP modules propose the tokens after the next, the model checks them all in one pass.

Notable choices: nothing is accepted on trust, so the text has exactly the distribution of plain decoding (greedy: the
same tokens); sequences of a batch accept different numbers of tokens and keep their own lengths; rejected tokens are
not cleaned up, their cache slots are written over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.inference.generate import Sampling, check_prompts, prefill
from minids.model.transformer import MiniDS


@dataclass
class Acceptance:
    """How the drafts fared: `accepted[k-1]` counts the rounds in which the first k drafts were all accepted."""

    rounds: int = 0
    accepted: list[int] = field(default_factory=list)

    def rate(self, depth: int = 1) -> float:
        """The share of rounds in which the draft of this depth was accepted."""
        return self.accepted[depth - 1] / self.rounds

    @property
    def tokens_per_round(self) -> float:
        """Tokens gained by one pass of the model: the accepted drafts and the one it draws itself."""
        return 1 + sum(self.accepted) / self.rounds


class _Sequences:
    """The batch as it grows. Of each sequence `known` tokens are settled; the model has read all but the last."""

    def __init__(self, model: MiniDS, prompts: Sequence[Sequence[int]], slots: int):
        self.model = model
        batch, device = len(prompts), model.head.weight.device
        self.cache, self.mtp_cache = model.new_cache(batch, slots), model.new_mtp_cache(batch, slots)
        self.tokens = torch.zeros(batch, slots, dtype=torch.int64, device=device)
        hidden, prompt_tokens = prefill(model, prompts, self.cache)
        self.hidden = hidden.new_zeros(batch, slots, hidden.shape[-1])
        self.hidden[:, : hidden.shape[1]] = hidden
        self.tokens[:, : hidden.shape[1]] = prompt_tokens
        self.known = self.cache.lengths

    @property
    def rows(self) -> Int[Tensor, "batch 1"]:
        return torch.arange(len(self.known), device=self.known.device)[:, None]

    def settle(self, tokens: Int[Tensor, "batch new"], count: Int[Tensor, "batch"]) -> None:
        """Append `tokens`, of which the first `count` are settled."""
        self.tokens[self.rows, self.known[:, None] + torch.arange(tokens.shape[1], device=count.device)] = tokens
        self.known = self.known + count
        self.cache.truncate(self.known - 1)

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Drop every sequence but these."""
        self.cache.keep(rows)
        self.mtp_cache.keep(rows)
        self.tokens, self.hidden, self.known = self.tokens[rows], self.hidden[rows], self.known[rows]

    def draft(
        self, window: int, sampling: Sampling, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "batch depths"], Float[Tensor, "batch depths vocab"]]:
        """A token from each MTP module in turn, and the distributions that they were drawn from.

        Module k reads the last `window` positions that the model has read, with the token k places after each: settled
        ones, and at the end the drafts of the modules before it. Longer memories come from its cache.
        """
        start = (self.known - 1 - window).clamp_min(0)
        self.mtp_cache.truncate(start)
        positions = start[:, None] + torch.arange(window, device=start.device)
        last = (self.known - 2 - start)[:, None]
        step = self.model.step(positions, self.mtp_cache)
        hidden = self.hidden[self.rows, positions]
        tokens, drafts, chances = self.tokens.clone(), [], []
        for depth, module in enumerate(self.model.mtp, start=1):
            following = tokens[self.rows, (positions + depth).clamp_max(tokens.shape[1] - 1)]
            embedding = self.model.embedding(following)
            hidden, _ = module(hidden, embedding, step, self.mtp_cache.layers[depth - 1])
            logits = self.model.head(module.norm(hidden[self.rows, last]))[:, 0]
            drafts.append(sampling.draw(logits, generator))
            chances.append(sampling.probabilities(logits))
            tokens[self.rows[:, 0], self.known + depth - 1] = drafts[-1]
        return torch.stack(drafts, 1), torch.stack(chances, 1)

    def read(self, drafts: Int[Tensor, "batch depths"]) -> Float[Tensor, "batch depths_plus_1 vocab"]:
        """Let the model read the last settled token and the drafts; its logits after each of them."""
        newest = self.tokens[self.rows, self.known[:, None] - 1]
        hidden, _ = self.model.trunk(torch.cat((newest, drafts), 1), self.cache)
        offsets = torch.arange(hidden.shape[1], device=drafts.device)
        self.hidden[self.rows, self.known[:, None] - 1 + offsets] = hidden
        return self.model.logits(hidden)


def verify(
    drafts: Int[Tensor, "batch depths"],
    draft_chances: Float[Tensor, "batch depths vocab"],
    chances: Float[Tensor, "batch depths_plus_1 vocab"],
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch depths_plus_1"], Int[Tensor, "batch"]]:
    """Rejection sampling: the settled tokens and how many of them count, with exactly the distribution `chances`.

    Draft x is accepted with probability min(1, p(x) / q(x)). At the first rejection the token is drawn from the part of
    p that q has not covered, max(p - q, 0) normalised; if there is none, one more is drawn from p after the last draft.
    Greedy is the case where p and q have all their mass on one token. (PITFALLS 20.)
    """
    batch, depths = drafts.shape
    p = chances[:, :-1].gather(-1, drafts[..., None])[..., 0]
    q = draft_chances.gather(-1, drafts[..., None])[..., 0]
    draws = torch.rand(batch, depths, device=drafts.device, generator=generator)
    accepted = (draws * q < p).cumprod(1).sum(1)
    rows = torch.arange(batch, device=drafts.device)
    covered = torch.cat((draft_chances, torch.zeros_like(chances[:, :1])), 1)[rows, accepted]
    remainder = (chances[rows, accepted] - covered).clamp_min(0)
    final = torch.multinomial(remainder, 1, generator=generator)
    settled = torch.cat((drafts, final), 1).scatter(1, accepted[:, None], final)
    return settled, accepted + 1


@torch.inference_mode()
def generate_speculatively(
    model: MiniDS,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], Acceptance]:
    """As `generate`, faster by the drafts that are accepted; also returns how many were.

    Raises `ValueError` as `generate` does, and for a model without MTP modules.
    """
    depths = len(model.mtp)
    if depths == 0:
        raise ValueError("num_nextn_predict_layers=0: speculative decoding needs at least one MTP module")
    check_prompts(model, prompts, max_new_tokens + depths)
    sequences = _Sequences(model, prompts, max(map(len, prompts)) + max_new_tokens + depths)
    first = sequences.hidden[sequences.rows, sequences.known[:, None] - 1]
    sequences.settle(sampling.draw(model.logits(first)[:, 0], generator)[:, None], torch.ones_like(sequences.known))

    completions: list[list[int]] = [[] for _ in prompts]
    acceptance = Acceptance(accepted=[0] * depths)
    alive, window = list(range(len(prompts))), max(map(len, prompts))
    fresh = sequences.tokens[sequences.rows, sequences.known[:, None] - 1].tolist()
    while True:
        going = []
        for row, (i, tokens) in enumerate(zip(alive, fresh, strict=True)):
            if not _extend(completions[i], tokens, max_new_tokens, stop):
                going.append(row)
        if not going:
            return completions, acceptance
        if len(going) < len(alive):
            sequences.keep(torch.tensor(going, device=sequences.known.device))
            alive = [alive[row] for row in going]
        drafts, draft_chances = sequences.draft(window, sampling, generator)
        # A round settles up to depths + 1 tokens, and the depths - 1 before them were read with drafts beside them.
        window = min(2 * depths, sequences.tokens.shape[1])
        chances = sampling.probabilities(sequences.read(drafts))
        settled, count = verify(drafts, draft_chances, chances, generator)
        sequences.settle(settled, count)
        fresh = [row[:n] for row, n in zip(settled.tolist(), count.tolist(), strict=True)]
        acceptance.rounds += len(alive)
        for depth in range(depths):
            acceptance.accepted[depth] += int((count > depth + 1).sum())


def _extend(completion: list[int], tokens: list[int], limit: int, stop: Sequence[int]) -> bool:
    """Append tokens until the limit or a stop token; whether that was reached."""
    for token in tokens:
        completion.append(token)
        if token in stop or len(completion) == limit:
            return True
    return False
