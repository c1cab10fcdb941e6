"""Text generation: a prefill of the whole batch, then cached decoding of one token per sequence and step.

Notable choices: prompts of different lengths are padded on the right, where padding has no effect (its cache slots are
overwritten before any token attends to them); finished sequences are removed from the batch; temperature 0 is greedy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minids.config import Fraction, check_fields, require
from minids.inference.compiled import FusedDecoder, load_step
from minids.model.kv_cache import KVCache
from minids.model.layers import at_least_float32
from minids.model.moe import Routing
from minids.model.transformer import MiniDS

LOWEST_TEMPERATURE = 1e-6  # below, logits divided by it overflow in float32


@dataclass(frozen=True)
class Sampling:
    """Sampling of the next token from the logits."""

    temperature: float = 1.0
    """Divisor of the logits; below 1 sharpens the distribution, 0 takes the most probable token (greedy)."""
    top_p: Fraction = 1.0
    """Nucleus sampling: keep the most probable tokens that reach this total probability; 1 keeps all."""

    def __post_init__(self):
        check_fields(self, may_be_zero=("temperature",))
        usable = self.temperature == 0 or self.temperature >= LOWEST_TEMPERATURE
        require(usable, "temperature", self.temperature, f"must be 0 (greedy) or at least {LOWEST_TEMPERATURE}")

    def log_probabilities(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """Log-probabilities of the sampling distribution; -inf for tokens excluded by top_p or greedy decoding."""
        if self.temperature == 0:
            return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
        logp = (at_least_float32(logits) / self.temperature).log_softmax(-1)
        if self.top_p < 1:
            ranked, order = logp.exp().sort(-1, descending=True)
            beyond = ranked.cumsum(-1) - ranked >= self.top_p
            beyond[..., 0] = False  # the most probable token is kept, also where top_p is 0 in float32
            logp = logp.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf).log_softmax(-1)
        return logp

    def probabilities(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """Probabilities of the sampling distribution."""
        return self.log_probabilities(logits).exp()

    def draw(
        self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Sample one token per row; return the tokens and their log-probabilities."""
        if self.temperature == 0:
            best = logits.argmax(-1)
            return best, logits.new_zeros(best.shape)
        logp = self.log_probabilities(logits)
        tokens = torch.multinomial(logp.exp(), 1, generator=generator)
        return tokens[:, 0], logp.gather(1, tokens)[:, 0]


@dataclass
class Trace:
    """What was decided while prompts were continued; one entry per prompt. `stream` fills it.

    V3.2 trains on answers with these decisions: the same experts, the same set of tokens (FACTS.md section 10.2).
    """

    experts: list[list[Int[Tensor, "read moe_layers k"]]] = field(default_factory=list)
    """Of each token that was read, the experts of every MoE layer, in parts; none for a dense model."""
    allowed: list[list[Bool[Tensor, "vocab"]]] = field(default_factory=list)
    """Of each token that was drawn, the set of tokens that could be drawn."""

    def read(
        self, routings: Sequence[Routing], prompts: Sequence[int], rows: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Add a forward pass: for the j-th of `prompts` the first `lengths[j]` tokens of row `rows[j]`."""
        if routings:
            experts = torch.stack([routing.experts for routing in routings], 2)  # [batch, seq, moe_layers, k]
            for prompt, row, length in zip(prompts, rows, lengths, strict=True):
                self.experts[prompt].append(experts[row, : max(0, length)])


def check_prompts(model: MiniDS, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `ValueError` for a prompt that is empty, has an unknown token, or exceeds the context length."""
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not prompts:
        raise ValueError("prompts=[]: must hold at least one prompt")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: it must hold at least one token")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, max_new_tokens={max_new_tokens}: the context holds {context}"
            )
        if not (0 <= min(prompt) and max(prompt) < vocab):
            raise ValueError(f"prompt {i} holds token {max(prompt)}: the vocabulary has {vocab}")


def prefill(
    model: MiniDS,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    chunk: int | None = None,
    trace: Trace | None = None,
) -> tuple[Float[Tensor, "batch longest *streams dim"], Int[Tensor, "batch longest"]]:
    """Prefill an empty cache with all prompts, `chunk` positions at a time; return hidden states and padded prompts.

    Prompts are padded on the right; the cache has the lengths without padding.
    """
    device = cache.lengths.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    hidden, read = [], 0
    for part in tokens.split(chunk or longest, dim=1):
        of_part, routings = model.trunk(part, cache)
        hidden.append(of_part)
        if trace is not None:
            trace.read(routings, range(len(prompts)), range(len(prompts)), (lengths - read).tolist())
        read += part.shape[1]
    cache.truncate(lengths)
    return torch.cat(hidden, 1), tokens


class CachedDecoder:
    """Decoding by the model itself, from a KV cache on; has the interface of `compiled.FusedDecoder`."""

    def __init__(self, model: MiniDS, cache: KVCache):
        self.model, self.cache = model, cache
        self.rows = torch.arange(len(cache.lengths), device=cache.lengths.device)  # of the active sequences
        self.routings: list[Routing] = []  # of the last step

    def step(self, tokens: Int[Tensor, "active"]) -> Float[Tensor, "active vocab"]:
        """Add one token to each active sequence; return the logits after it."""
        stored = torch.empty_like(tokens).index_put_((self.rows,), tokens)
        hidden, self.routings = self.model.trunk(stored[:, None], self.cache)
        return self.model.logits(hidden)[:, 0].index_select(0, self.rows)

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep only these of the active sequences."""
        self.rows = self.cache.keep(self.rows[rows])


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
    compiled: bool = False,
    trace: Trace | None = None,
) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """Generate; yield after each step the active prompts' indices, their new tokens, and the log-probabilities.

    A prompt is active until one of the `stop` tokens was generated. With `compiled`, decoding runs the fused step that
    `compiled.load_step` returns (the first time for a config it compiles for about a minute), and the model itself
    where there is no compiler. A `trace` is filled; it cannot be `compiled`, which does not tell its routing. Raises
    `ValueError` for both together, and as `check_prompts` and `load_step` do.
    """
    check_prompts(model, prompts, max_new_tokens)
    if trace is not None:
        require(not compiled, "compiled", compiled, "must be False with a trace, which a compiled step cannot fill")
        trace.experts[:], trace.allowed[:] = ([[] for _ in prompts] for _ in range(2))
    step = load_step(model, len(prompts)) if compiled else None
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    hidden, _ = prefill(model, prompts, cache, prefill_chunk, trace)
    last = hidden[torch.arange(len(prompts)), cache.lengths - 1][:, None]  # [batch, 1, dim]
    logits = model.logits(last)[:, 0]
    decoder = CachedDecoder(model, cache) if step is None else FusedDecoder(step, step.batch, cache, max_new_tokens)
    alive = list(range(len(prompts)))
    ends = set(stop)
    for left in reversed(range(max_new_tokens)):
        tokens, logps = sampling.draw(logits, generator)
        drawn = tokens.tolist()
        if trace is not None:
            for prompt, possible in zip(alive, sampling.log_probabilities(logits) > -torch.inf, strict=True):
                trace.allowed[prompt].append(possible)
        yield alive, drawn, logps.tolist()
        going = [row for row, token in enumerate(drawn) if token not in ends]
        if not going or not left:
            return
        if len(going) < len(alive):
            rows = torch.tensor(going, device=tokens.device)
            decoder.keep(rows)
            tokens = tokens[rows]
            alive = [alive[row] for row in going]
        logits = decoder.step(tokens)
        if trace is not None and isinstance(decoder, CachedDecoder):
            trace.read(decoder.routings, alive, decoder.rows.tolist(), [1] * len(alive))


def generate(model: MiniDS, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
    """Generate a completion of each prompt, up to `max_new_tokens` tokens or a stop token, which is included.

    Options as in `stream`: max_new_tokens, sampling, stop, generator, prefill_chunk, compiled. Raises `ValueError` for
    prompts that are empty, too long or not within the vocabulary, and for models that cannot be compiled.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    for alive, drawn, _ in stream(model, prompts, **options):
        for i, token in zip(alive, drawn, strict=True):
            completions[i].append(token)
    return completions
