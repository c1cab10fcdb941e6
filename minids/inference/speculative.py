"""Speculative decoding: the MTP modules draft tokens, and the model verifies all drafts in one forward pass.

Notable choices: drafts are verified by rejection sampling, so the text has exactly the distribution of plain decoding
(greedy: the same tokens); sequences of a batch accept different numbers of tokens and have their own lengths; the cache
slots of rejected tokens are overwritten later; one greedy sequence needs no distributions and has its own loop; with
one MTP module a whole round can run as one compiled function (`fused_round.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from minids.inference.compiled import load_step
from minids.inference.fused_round import FusedRound
from minids.inference.generate import Sampling, check_prompts, prefill
from minids.model.transformer import MiniDS


@dataclass
class Acceptance:
    """Acceptance statistics: `accepted[k-1]` counts the rounds in which the first k drafts were all accepted.

    A round is one verification of one sequence.
    """

    rounds: int = 0
    accepted: list[int] = field(default_factory=list)

    def rate(self, depth: int = 1) -> float:
        """Fraction of rounds in which the draft of this depth was accepted."""
        return self.accepted[depth - 1] / self.rounds

    @property
    def tokens_per_round(self) -> float:
        """Mean number of tokens per forward pass: the accepted drafts and one token of the model."""
        return 1 + sum(self.accepted) / self.rounds


class _Sequences:
    """State of the batch: `known` tokens of each sequence are final; all but the last of them are in the cache."""

    def __init__(self, model: MiniDS, prompts: Sequence[Sequence[int]], slots: int):
        self.model = model
        batch, device = len(prompts), model.head.weight.device
        self.cache, self.mtp_cache = model.new_cache(batch, slots), model.new_mtp_cache(batch, slots)
        self.tokens = torch.zeros(batch, slots, dtype=torch.int64, device=device)
        hidden, prompt_tokens = prefill(model, prompts, self.cache)
        self.hidden = hidden.new_zeros(batch, slots, *hidden.shape[2:])
        self.hidden[:, : hidden.shape[1]] = hidden
        self.tokens[:, : hidden.shape[1]] = prompt_tokens
        self.known = self.cache.lengths  # [batch]

    @property
    def rows(self) -> Int[Tensor, "batch 1"]:
        return torch.arange(len(self.known), device=self.known.device)[:, None]

    def settle(self, tokens: Int[Tensor, "batch new"], count: Int[Tensor, "batch"]) -> None:
        """Append `tokens`, of which the first `count` are final."""
        self.tokens[self.rows, self.known[:, None] + torch.arange(tokens.shape[1], device=count.device)] = tokens
        self.known = self.known + count
        self.cache.truncate(self.known - 1)

    def keep(self, rows: Int[Tensor, "kept"]) -> Int[Tensor, "kept"]:
        """Keep only these sequences of the batch; return them in their new order."""
        rows = rows[self.cache.keep(rows).argsort()]
        self.mtp_cache.keep(rows.sort().values)
        self.tokens, self.hidden, self.known = self.tokens[rows], self.hidden[rows], self.known[rows]
        return rows

    def draft(
        self, window: int, sampling: Sampling, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "batch depths"], Float[Tensor, "batch depths vocab"]]:
        """Sample a draft from each MTP module in turn; return the drafts and their distributions.

        Module k processes the last `window` positions of the model's hidden states, each with the token k places later:
        final tokens, and at the end the drafts of the modules before it. Earlier positions are in its cache.
        """
        start = (self.known - 1 - window).clamp_min(0)
        self.mtp_cache.truncate(start)
        positions = start[:, None] + torch.arange(window, device=start.device)
        last = (self.known - 2 - start)[:, None]
        context = self.model.attention_context(positions, self.mtp_cache)
        hidden = self.hidden[self.rows, positions]
        tokens, drafts, chances = self.tokens.clone(), [], []
        for depth, module in enumerate(self.model.mtp, start=1):
            following = tokens[self.rows, (positions + depth).clamp_max(tokens.shape[1] - 1)]
            embedding = self.model.embedding(following)
            hidden, _ = module(hidden, embedding, context, self.mtp_cache.layers[depth - 1])
            logits = self.model.head(module.norm(hidden[self.rows, last]))[:, 0]
            drafts.append(sampling.draw(logits, generator)[0])
            chances.append(sampling.probabilities(logits))
            tokens[self.rows[:, 0], self.known + depth - 1] = drafts[-1]
        return torch.stack(drafts, 1), torch.stack(chances, 1)

    def read(self, drafts: Int[Tensor, "batch depths"]) -> Float[Tensor, "batch depths_plus_1 vocab"]:
        """Run the model on the last final token and the drafts; return its logits after each of them."""
        newest = self.tokens[self.rows, self.known[:, None] - 1]
        hidden, _ = self.model.trunk(torch.cat((newest, drafts), 1), self.cache)
        offsets = torch.arange(hidden.shape[1], device=drafts.device)
        self.hidden[self.rows, self.known[:, None] - 1 + offsets] = hidden
        return self.model.logits(hidden)


def draft_window(depths: int) -> int:
    """Return how many positions the MTP modules process again in each round after the first.

    A round adds up to depths + 1 tokens, and the depths - 1 positions before them were processed together with drafts.
    """
    return 2 * depths


def verify(
    drafts: Int[Tensor, "batch depths"],
    draft_chances: Float[Tensor, "batch depths vocab"],
    chances: Float[Tensor, "batch depths_plus_1 vocab"],
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch depths_plus_1"], Int[Tensor, "batch"]]:
    """Verify drafts by rejection sampling; return the tokens and their number, distributed exactly as `chances` (p).

    Draft x is accepted with probability min(1, p(x) / q(x)), q being `draft_chances`. After the first rejection a token
    is sampled from the normalised residual max(p - q, 0); if all drafts are accepted, one more is sampled from p.
    In greedy decoding p and q have all their mass on one token. (PITFALLS 20.)
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
    compiled: bool = False,
) -> tuple[list[list[int]], Acceptance]:
    """Generate as `generate` does, with speculative decoding; also return the acceptance statistics.

    With `compiled` each round is one compiled function, where there is a compiler. Raises `ValueError` as `generate`
    does, for a model without MTP modules, and with `compiled` for one with several.
    """
    depths = len(model.mtp)
    if depths == 0:
        raise ValueError("num_nextn_predict_layers=0: speculative decoding needs at least one MTP module")
    check_prompts(model, prompts, max_new_tokens + depths)
    step = load_step(model, len(prompts), FusedRound) if compiled else None
    if step is not None:
        return _by_compiled_rounds(model, prompts, max_new_tokens, sampling, stop, generator, step, step.batch)
    if sampling.temperature == 0 and len(prompts) == depths == 1:
        completion, acceptance = _one_sequence_greedily(model, prompts[0], max_new_tokens, stop)
        return [completion], acceptance
    sequences = _Sequences(model, prompts, max(map(len, prompts)) + max_new_tokens + depths)
    first = sequences.hidden[sequences.rows, sequences.known[:, None] - 1]
    token, _ = sampling.draw(model.logits(first)[:, 0], generator)
    sequences.settle(token[:, None], torch.ones_like(sequences.known))

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
            kept = sequences.keep(torch.tensor(going, device=sequences.known.device))
            alive = [alive[row] for row in kept.tolist()]
        drafts, draft_chances = sequences.draft(window, sampling, generator)
        window = min(draft_window(depths), sequences.tokens.shape[1])
        chances = sampling.probabilities(sequences.read(drafts))
        settled, count = verify(drafts, draft_chances, chances, generator)
        sequences.settle(settled, count)
        fresh = [row[:n] for row, n in zip(settled.tolist(), count.tolist(), strict=True)]
        acceptance.rounds += len(alive)
        for depth in range(depths):
            acceptance.accepted[depth] += int((count > depth + 1).sum())


def _one_sequence_greedily(
    model: MiniDS, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int]
) -> tuple[list[int], Acceptance]:
    """Generate as `generate_speculatively` does, with what is left of it for one greedy sequence and one module.

    There are no distributions and no random numbers: a draft is accepted if it is the model's own token. The module
    processes just the positions that are new to it, one or two per round.
    """
    slots, device, module = len(prompt) + max_new_tokens + 1, model.head.weight.device, model.mtp[0]
    cache, mtp_cache = model.new_cache(1, slots), model.new_mtp_cache(1, slots)
    new_hidden, _ = model.trunk(torch.tensor([prompt], device=device), cache)  # of the positions new to the module
    tokens, acceptance = list(prompt), Acceptance(accepted=[0])
    completion: list[int] = []
    settled = [int(model.logits(new_hidden[:, -1:]).argmax())]
    while not _extend(completion, settled, max_new_tokens, stop):
        tokens += settled
        following = torch.tensor([tokens[-new_hidden.shape[1] :]], device=device)
        context = model.attention_context(following, mtp_cache)
        hidden, _ = module(new_hidden, model.embedding(following), context, mtp_cache.layers[0])
        mtp_cache.advance(following.shape[1])
        draft = int(model.head(module.norm(hidden[:, -1])).argmax())
        new_hidden, _ = model.trunk(torch.tensor([[tokens[-1], draft]], device=device), cache)
        own, after_draft = model.logits(new_hidden)[0].argmax(-1).tolist()
        accepted = _matches(draft, own)
        settled = [draft, after_draft] if accepted else [own]
        acceptance.rounds, acceptance.accepted[0] = acceptance.rounds + 1, acceptance.accepted[0] + accepted
        if not accepted:
            new_hidden = new_hidden[:, :1]
            cache.truncate(cache.lengths - 1)
    return completion, acceptance


def _matches(draft: int, own: int) -> bool:
    """Verify a greedy draft: it is accepted if it is the model's own token."""
    return draft == own


def _by_compiled_rounds(
    model: MiniDS,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int],
    generator: torch.Generator | None,
    step: Callable[..., Sequence[Tensor]],
    size: int,
) -> tuple[list[list[int]], Acceptance]:
    """Generate as `generate_speculatively` does, with rounds that are one call of `step`, a `FusedRound` of `size`.

    Finished sequences and padding are computed on, and their results are dropped. Drafts are sampled without top_p,
    which is as good a draft distribution as another: verification makes the text's distribution that of `sampling`.
    """
    batch, slots = len(prompts), max(map(len, prompts)) + max_new_tokens + 2
    padded = [*prompts, *[prompts[0]] * (size - batch)]
    cache, mtp_cache = model.new_cache(size, slots), model.new_mtp_cache(size, slots)
    hidden, prompt = prefill(model, padded, cache)
    if prompt.shape[1] > 1:  # the module has nothing to process before the second token
        context = model.attention_context(prompt[:, 1:], mtp_cache)
        model.mtp[0](hidden[:, :-1], model.embedding(prompt[:, 1:]), context, mtp_cache.layers[0])
    static = rearrange(torch.stack([*cache.layers, *mtp_cache.layers]), "layer b slot entry -> slot layer b entry")
    static, positions, rows = static.contiguous(), cache.lengths, torch.arange(size)
    states = hidden.new_zeros(size, slots, hidden.shape[-1])
    states[:, : hidden.shape[1]] = hidden
    tokens = F.pad(prompt, (0, slots - prompt.shape[1]))
    fresh, _ = sampling.draw(model.logits(hidden[rows, positions - 1][:, None])[:, 0], generator)
    tokens[rows, positions] = fresh

    greedy, two = sampling.temperature == 0, torch.arange(2)
    temperature = states.new_tensor(1.0 if greedy else sampling.temperature)
    drafted_by = Sampling(sampling.temperature)
    noise, advance = states.new_zeros(size, model.config.vocab_size), torch.zeros_like(positions)
    completions: list[list[int]] = [[] for _ in prompts]
    acceptance, alive, settled = Acceptance(accepted=[0]), set(range(batch)), [[token] for token in fresh.tolist()]
    while True:
        alive = {i for i in alive if not _extend(completions[i], settled[i], max_new_tokens, stop)}
        if not alive:
            return completions, acceptance
        positions = positions + advance * torch.tensor([i in alive for i in range(size)])
        if not greedy:
            noise = noise.exponential_(generator=generator).log_().neg_()
        back = (positions - 2).clamp_min(0)[:, None] + two
        inputs = tokens[rows[:, None], back + 1], states[rows[:, None], back], positions, noise, temperature
        used = static[: max(int(positions.max()), 2)]
        drafts, draft_logits, logits, new_states, own_entries, entries = step(*inputs, used)
        ahead = positions[:, None] + two
        static[back, -1, rows[:, None]] = own_entries.to(static.dtype)
        static[ahead, :-1, rows[:, None]] = entries.to(static.dtype)
        states[rows[:, None], ahead] = new_states
        if greedy:
            own = logits.argmax(-1).tolist()
            taken = [_matches(draft, pair[0]) for draft, pair in zip(drafts.tolist(), own, strict=True)]
            settled = [[d, b] if t else [a] for t, d, (a, b) in zip(taken, drafts.tolist(), own, strict=True)]
        else:
            chances = drafted_by.probabilities(draft_logits)[:, None], sampling.probabilities(logits)
            found, count = verify(drafts[:, None], *chances, generator)
            settled = [row[:n] for row, n in zip(found.tolist(), count.tolist(), strict=True)]
        acceptance.rounds += len(alive)
        acceptance.accepted[0] += sum(len(settled[i]) == 2 for i in alive)
        tokens[rows[:, None], ahead + 1] = torch.tensor([[*new, 0][:2] for new in settled])
        advance = torch.tensor([len(new) for new in settled])


def _extend(completion: list[int], tokens: list[int], limit: int, stop: Sequence[int]) -> bool:
    """Append tokens up to the limit or a stop token; return whether one was reached."""
    for token in tokens:
        completion.append(token)
        if token in stop or len(completion) == limit:
            return True
    return False
