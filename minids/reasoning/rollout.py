"""Sample answers with their log-probabilities, recompute these for training, and evaluate a model by pass@k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minids.data.tokenizer import Tokenizer
from minids.inference.generate import Sampling, Trace, stream
from minids.model.layers import at_least_float32
from minids.model.moe import Routing
from minids.model.transformer import MiniDS
from minids.reasoning.rewards import Response, Reward, Score, apply_reward, read_response
from minids.reasoning.tasks import Problem
from minids.training.chunked_loss import in_chunks


@dataclass(frozen=True)
class Sample:
    """One answer of a model: the problem, the prompt, the response, the log-probability of each token, the score.

    `experts` and `allowed` are the decisions of sampling, where training keeps them (V3.2; see `generate.Trace`).
    """

    problem: Problem
    prompt: list[int]
    response: Response
    logps: list[float]
    score: Score
    experts: Int[Tensor, "read moe_layers k"] | None = field(default=None, compare=False, repr=False)
    allowed: Bool[Tensor, "new vocab"] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PaddedSamples:
    """Prompts and responses as one batch, padded on the right.

    `mask[:, t]` tells whether token t + 1 was sampled, `old_logp[:, t]` with which log-probability. `experts` are those
    that read token t in sampling, `allowed[:, t]` the tokens among which token t + 1 was drawn; None: not kept.
    """

    tokens: Int[Tensor, "batch seq_plus_1"]
    mask: Bool[Tensor, "batch seq"]
    old_logp: Float[Tensor, "batch seq"]
    experts: Int[Tensor, "moe_layers batch seq k"] | None = None
    allowed: Bool[Tensor, "batch seq vocab"] | None = None

    def rows(self, rows: Int[Tensor, "rows"]) -> "PaddedSamples":
        """Return some rows without common padding: `mask` ends at the longest of these rows."""
        seq = int(self.mask[rows].any(0).nonzero().max()) + 1
        experts = None if self.experts is None else self.experts[:, rows, :seq]
        allowed = None if self.allowed is None else self.allowed[rows, :seq]
        tokens, mask, old_logp = self.tokens[rows, : seq + 1], self.mask[rows, :seq], self.old_logp[rows, :seq]
        return PaddedSamples(tokens, mask, old_logp, experts, allowed)

    def tokens_per_expert(self, routing: Routing) -> Int[Tensor, "experts"]:
        """Return the number of tokens per expert in the forward pass, without padding."""
        used = self.mask.int().flip(1).cumsum(1).flip(1) > 0  # up to the last position that predicts a sampled token
        return torch.bincount(routing.experts[used].flatten(), minlength=routing.scores.shape[-1])


def pad(samples: Sequence[Sample], device: torch.device | str = "cpu") -> PaddedSamples:
    """Pad samples to one batch. In padding every token is allowed, and read by the first k experts."""
    sequences = [[*sample.prompt, *sample.response.tokens] for sample in samples]
    longest = max(map(len, sequences))
    tokens = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences], device=device)
    mask = torch.zeros(len(samples), longest - 1, dtype=torch.bool, device=device)
    old_logp = torch.zeros(len(samples), longest - 1, device=device)
    for row, sample in enumerate(samples):
        sampled = slice(len(sample.prompt) - 1, len(sequences[row]) - 1)  # position t predicts token t + 1
        mask[row, sampled] = True
        old_logp[row, sampled] = torch.tensor(sample.logps, device=device)
    experts = allowed = None
    if chosen := [sample.experts for sample in samples if sample.experts is not None]:
        layers, k = chosen[0].shape[1:]
        experts = torch.arange(k, device=device).repeat(layers, len(samples), longest - 1, 1)
        for row, of_row in enumerate(chosen):
            experts[:, row, : len(sequences[row]) - 1] = of_row.transpose(0, 1)
    if sets := [sample.allowed for sample in samples if sample.allowed is not None]:
        allowed = torch.ones(*mask.shape, sets[0].shape[1], dtype=torch.bool, device=device)
        for row, of_row in enumerate(sets):
            allowed[row, mask[row]] = of_row.to(device)
    return PaddedSamples(tokens, mask, old_logp, experts, allowed)


def sample(
    model: MiniDS,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    max_cache_bytes: int = 2**28,
    top_p: float = 1.0,
    trace: Trace | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample an answer to every prompt; return its tokens, up to and including `stop`, and their log-probabilities.

    The batch is as large as `max_cache_bytes` of KV cache allow. The decisions of sampling are added to `trace`.
    Raises `ValueError` where one sequence does not fit.
    """
    slots = max(map(len, prompts)) + max_new_tokens
    at_once = max_cache_bytes // model.new_cache(1, slots).num_bytes()
    if not at_once:
        raise ValueError(f"max_cache_bytes={max_cache_bytes}: the cache of one sequence of {slots} tokens does not fit")
    responses: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    for first in range(0, len(prompts), at_once):
        part = None if trace is None else Trace()
        steps = stream(
            model, prompts[first : first + at_once], max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p), stop=[stop], generator=generator, trace=part,
        )  # fmt: skip
        for alive, drawn, drawn_logps in steps:
            for row, token, logp in zip(alive, drawn, drawn_logps, strict=True):
                responses[first + row].append(token)
                logps[first + row].append(logp)
        if trace is not None and part is not None:
            trace.experts += part.experts
            trace.allowed += part.allowed
    return responses, logps


def token_logps(
    model: MiniDS,
    tokens: Int[Tensor, "batch seq_plus_1"],
    temperature: float = 1.0,
    experts: Int[Tensor, "moe_layers batch seq k"] | None = None,
    allowed: Bool[Tensor, "batch seq vocab"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"], list[Routing]]:
    """Return the log-probability of each next token under the sampling distribution, its entropy, and the routings.

    With `experts` and `allowed`, the decisions of sampling are kept: tokens are read by these experts, and the
    distribution is that among the allowed tokens.
    """
    out = model.states(tokens[:, :-1], experts=experts)

    def of_chunk(logits: Tensor, following: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(logits) / temperature
        if allowed is not None:
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)  # -inf has no entropy: 0 * -inf
        logp = logits.log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(-1, following[:, None])[:, 0], entropy

    columns = (out.head_inputs[0], tokens[:, 1:], *(() if allowed is None else (allowed,)))
    chunks = in_chunks(of_chunk, model.head, *(column.flatten(0, 1) for column in columns))
    logp, entropy = (torch.cat(parts).view_as(tokens[:, 1:]) for parts in zip(*chunks, strict=True))
    return logp, entropy, out.routings


def answer(
    model: MiniDS,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    group_size: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    max_cache_bytes: int = 2**28,
    top_p: float = 1.0,
    keep_routing: bool = False,
) -> list[list[Sample]]:
    """Sample a group of scored answers to each problem, with the arguments of `sample`.

    With `keep_routing` the samples hold their experts, with `top_p` below 1 the tokens among which each was drawn.
    """
    repeated = [problem for problem in problems for _ in range(group_size)]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(problem.prompt)] for problem in repeated]
    trace = Trace() if keep_routing or top_p < 1 else None
    tokens, logps = sample(
        model, prompts, stop=tokenizer.eos_id, max_new_tokens=max_new_tokens, temperature=temperature,
        generator=generator, max_cache_bytes=max_cache_bytes, top_p=top_p, trace=trace,
    )  # fmt: skip
    responses = [read_response(of_prompt, tokenizer) for of_prompt in tokens]
    scores = apply_reward(reward, repeated, responses)
    samples = list(map(Sample, repeated, prompts, responses, logps, scores))
    if trace is not None and keep_routing:
        samples = [replace(one, experts=torch.cat(parts)) for one, parts in zip(samples, trace.experts, strict=True)]
    if trace is not None and top_p < 1:
        samples = [replace(one, allowed=torch.stack(sets)) for one, sets in zip(samples, trace.allowed, strict=True)]
    return [samples[i : i + group_size] for i in range(0, len(samples), group_size)]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the probability that k samples, drawn without replacement, include a correct one.

    1 - C(n - c, k) / C(n, k) for n samples, c of them correct.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % confidence interval from the spread between problems."""
    sample = torch.tensor(values, dtype=torch.float64)
    return sample.mean().item(), 1.96 * sample.std().item() / math.sqrt(len(values))


def evaluate(
    model: MiniDS,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_cache_bytes: int = 2**28,
) -> dict[str, float]:
    """Return the `summary` of `samples` answers to each problem, sampled with a fixed seed; see `sample`."""
    groups = answer(
        model, tokenizer, problems, reward, samples, max_new_tokens=max_new_tokens, temperature=temperature,
        generator=torch.Generator(model.head.weight.device).manual_seed(0), max_cache_bytes=max_cache_bytes,
    )  # fmt: skip
    return summary(groups)


def summary(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Return pass@1 and pass@k of groups of k answers, with half their 95 % intervals; mean length and reward parts.

    A reward without "accuracy", for tasks without a correct answer, has no pass@k.
    """
    samples = len(groups[0])
    correct_counts = [sum(sample.score.parts.get("accuracy") == 1 for sample in group) for group in groups]
    metrics: dict[str, float] = {}
    for k in sorted({1, samples}) if "accuracy" in groups[0][0].score.parts else ():
        mean, half = mean_with_interval([pass_at_k(samples, correct, k) for correct in correct_counts])
        metrics |= {f"pass@{k}": mean, f"pass@{k}_interval": half}
    return metrics | averages([sample for group in groups for sample in group])


def averages(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean reward, its parts, the mean length in tokens, and the fraction of answers that did not end."""
    count, names = len(samples), samples[0].score.parts.keys()
    if any(s.score.parts.keys() != names for s in samples):
        raise ValueError(f"reward: the parts {', '.join(names) or 'none'} of one batch are not those of another")
    parts = {name: sum(s.score.parts[name] for s in samples) / count for name in names}
    return {
        "reward": sum(s.score.total for s in samples) / count,
        **{f"reward/{name}": value for name, value in parts.items()},
        "length": sum(len(s.response.tokens) for s in samples) / count,
        "unfinished": sum(not s.response.ended for s in samples) / count,
    }


def samples_as_text(groups: Sequence[Sequence[Sample]], of_each: int = 4) -> str:
    """Format every group's problem and its first answers, each with its score."""
    lines = []
    for group in groups:
        lines.append(group[0].problem.prompt)
        for sample in group[:of_each]:
            parts = ", ".join(f"{name} {value:.2g}" for name, value in sample.score.parts.items())
            lines.append(f"    {sample.response.text}    [{sample.score.total:.2f}: {parts}]")
    return "\n".join(lines) + "\n"
