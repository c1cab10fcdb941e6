"""Mixture of experts (MoE): router, experts and load balancing.

Notable choices:
- affinities are computed in float32; the balancing bias affects the selection of experts only, not the gate weights;
- no token is dropped: tokens are sorted by expert, and all experts run as one grouped matrix multiplication;
- a forward pass changes no state: it returns the number of tokens per expert, and only `update_balance_bias` changes
  the biases, once per optimizer step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.kernels import grouped_mm
from minids.model.layers import SwiGLU, at_least_float32


@dataclass
class Routing:
    """Routing of the tokens: the k chosen experts, their gate weights, and the affinities to all experts."""

    experts: Int[Tensor, "batch seq k"]
    weights: Float[Tensor, "batch seq k"]
    scores: Float[Tensor, "batch seq experts"]

    @property
    def tokens_per_expert(self) -> Int[Tensor, "experts"]:
        """Number of tokens routed to each expert (`bincount` would have a GPU wait for the length of the result)."""
        chosen = self.experts.flatten()
        return chosen.new_zeros(self.scores.shape[-1]).scatter_add_(0, chosen, torch.ones_like(chosen))


def sqrt_softplus(logits: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
    """Affinity of V4, sqrt(ln(1 + e^x)): about sqrt(x) for a large x, so it does not saturate as the sigmoid does."""
    return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()  # the slope at 0 would be infinite


AFFINITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "sqrtsoftplus": sqrt_softplus,
}


class Router(nn.Module):
    """Choose k experts per token and compute their gate weights (V3 eq. 12-16; V2 section 2.2; FACTS.md section 3).

    Experts can also be given, such as those of sampling (V3.2's kept routing); then only the weights are computed.
    """

    bias: nn.Parameter | None
    """A parameter although it has no gradient: V3's published parameter count and checkpoints include it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = nn.Parameter(torch.zeros(config.n_routed_experts), requires_grad=False)
        self.register_parameter("bias", bias if config.selects_with_bias else None)

    def _apply(self, fn, recurse=True):
        """Move or cast the module, but keep the bias in float32: bfloat16 would round off its steps of 0.001."""
        bias = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if self.bias is not None and self.bias.dtype != torch.float32:
            self.bias.data = bias.to(self.bias.device, torch.float32)
        return self

    def forward(self, x: Float[Tensor, "batch seq dim"], experts: Int[Tensor, "batch seq k"] | None = None) -> Routing:
        scores = self.scores(x)  # [batch, seq, experts]
        if experts is None:  # not given
            experts = self.choose(scores.detach())  # [batch, seq, k]
        weights = scores.gather(-1, experts)  # [batch, seq, k]; without the bias
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.config.routed_scaling_factor, scores)

    def scores(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq experts"]:
        """Compute the affinity of each token to each expert, in float32 or float64, also under autocast."""
        x = at_least_float32(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, self.weight.to(x.dtype))
        return AFFINITIES[self.config.scoring_func](logits)

    def choose(self, scores: Float[Tensor, "batch seq experts"]) -> Int[Tensor, "batch seq k"]:
        """Choose the k experts with the highest biased scores within the best groups."""
        if self.bias is not None:
            scores = scores + self.bias
        if self.config.topk_group < self.config.n_group:
            scores = self.within_best_groups(scores)
        return scores.topk(self.config.num_experts_per_tok, sorted=False).indices

    def within_best_groups(self, scores: Float[Tensor, "batch seq experts"]) -> Float[Tensor, "batch seq experts"]:
        """Set the scores outside the best groups to -inf (0 would exceed negative biased scores).

        V3 ranks groups by the sum of their two highest biased scores, V2 by their highest score.
        """
        groups = scores.unflatten(-1, (self.config.n_group, -1))  # [batch, seq, groups, experts_per_group]
        rank = groups.topk(2 if self.config.selects_with_bias else 1).values.sum(-1)  # [batch, seq, groups]
        kept = rank.topk(self.config.topk_group, sorted=False).indices
        outside = torch.full_like(rank, -torch.inf).scatter_(-1, kept, 0.0)
        return (groups + outside[..., None]).flatten(-2)


def grouped_matmul(
    x: Float[Tensor, "rows in"], weight: Float[Tensor, "experts in out"], tokens_per_expert: Int[Tensor, "experts"]
) -> Float[Tensor, "rows out"]:
    """Multiply the first `tokens_per_expert[0]` rows by `weight[0]`, the next `tokens_per_expert[1]` by `weight[1]`...

    One kernel computes all experts. Autocast does not cover it, so the cast is explicit. It supports neither float64
    nor widths whose rows are no multiple of 16 bytes; for these the rows of each expert are padded to equal counts.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])
    if aligned and x.dtype != torch.float64:
        ends = tokens_per_expert.cumsum(0).to(torch.int32)
        return grouped_mm(x, weight, ends) if torch.compiler.is_compiling() else F.grouped_mm(x, weight, offs=ends)
    first_row = tokens_per_expert.cumsum(0) - tokens_per_expert
    expert = torch.arange(len(weight), device=x.device).repeat_interleave(tokens_per_expert)
    slot = torch.arange(len(x), device=x.device) - first_row[expert]
    padded = x.new_zeros(len(weight), int(tokens_per_expert.max()), x.shape[1]).index_put((expert, slot), x)
    return torch.bmm(padded, weight)[expert, slot]


class Arithmetic(Protocol):
    """Arithmetic of experts, `Experts.arithmetic`: it computes rows that are sorted by expert."""

    def __call__(
        self,
        rows: Float[Tensor, "rows dim"],
        weights: Float[Tensor, "rows 1"],
        tokens_per_expert: Int[Tensor, "experts"],
        matrices: tuple[Tensor, Tensor, Tensor],
    ) -> Float[Tensor, "rows dim"]:
        """Return the output of each row's expert times the gate weight; `matrices` are gate, up and down."""

    def computes_in(self, weight: Tensor) -> str:
        """Describe the precision, for `MiniDS.precision_report`."""


class GroupedSwiGLU:
    """Arithmetic of experts: SwiGLU as grouped matmuls, on rows sorted by expert.

    The gate weight multiplies the inner activations: they are narrower than the output, and the down projection is
    linear, so the result is the same.
    """

    def __call__(
        self,
        rows: Float[Tensor, "rows dim"],
        weights: Float[Tensor, "rows 1"],
        tokens_per_expert: Int[Tensor, "experts"],
        matrices: tuple[Tensor, Tensor, Tensor],
    ) -> Float[Tensor, "rows dim"]:
        gate, up, down = matrices
        # inner [rows, inner_dim]
        inner = F.silu(grouped_matmul(rows, gate, tokens_per_expert)) * grouped_matmul(rows, up, tokens_per_expert)
        return grouped_matmul(inner * weights, down, tokens_per_expert)

    def computes_in(self, weight: Tensor) -> str:
        """Describe the precision, for `MiniDS.precision_report`."""
        return str(weight.dtype).removeprefix("torch.")


class Dispatcher:
    """Dispatch of rows to the processes of their experts and back, `Experts.dispatcher`; the default sends nothing."""

    def held(self, weight: Float[Tensor, "experts in out"]) -> Float[Tensor, "held in out"]:
        """Return the matrices of the experts that this process holds."""
        return weight

    def slots(
        self, experts: Int[Tensor, "tokens k"], tokens_per_expert: Int[Tensor, "experts"]
    ) -> tuple[Int[Tensor, "tokens k"], Int[Tensor, "slots"]]:
        """Return the slot that computes each chosen expert, and the tokens per slot; by default a slot is an expert."""
        return experts, tokens_per_expert

    def __call__(
        self,
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: Float[Tensor, "rows dim"],
        weights: Float[Tensor, "rows 1"],
        tokens_per_expert: Int[Tensor, "slots"],
    ) -> Float[Tensor, "rows dim"]:
        """Call `compute(rows, weights, tokens_per_expert)`; its input and output rows are sorted by slot."""
        return compute(rows, weights, tokens_per_expert)


class AllExpertsHere(Dispatcher):
    """Dispatcher of a single process, which holds all experts: no communication."""


class Experts(nn.Module):
    """All routed experts of a layer, each a SwiGLU, stacked along the first dimension.

    Two parts can be replaced: `arithmetic` computes rows sorted by expert (in FP8: fp8/linear.py), `dispatcher` sends
    rows to the processes that hold their experts, and back (parallel/expert_parallel.py).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, dim, inner_dim = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, dim, inner_dim))
        self.up_proj = nn.Parameter(torch.empty(experts, dim, inner_dim))
        self.down_proj = nn.Parameter(torch.empty(experts, inner_dim, dim))
        self.arithmetic: Arithmetic = GroupedSwiGLU()
        self.dispatcher: Dispatcher = AllExpertsHere()

    def forward(self, x: Float[Tensor, "batch seq dim"], routing: Routing) -> Float[Tensor, "batch seq dim"]:
        """Sum the outputs of each token's experts, weighted by the gate weights."""
        rows, weights = x.flatten(0, 1), routing.weights.to(x.dtype)  # rows [tokens, dim]
        experts, weights = routing.experts.flatten(0, 1), weights.flatten(0, 1)  # each [tokens, k]
        if self.fetching_is_cheaper(experts):
            return self.by_token(rows, experts, weights).view_as(x)
        return self.by_expert(rows, experts, weights, routing.tokens_per_expert).view_as(x)

    def by_expert(self, x, experts, weights, tokens_per_expert) -> Float[Tensor, "tokens dim"]:
        """Sort the token copies by expert, apply all experts as grouped matmuls, restore the order, and sum over k."""
        experts, tokens_per_expert = self.dispatcher.slots(experts, tokens_per_expert)
        order = experts.flatten().argsort(stable=True)  # [tokens * k]: token copies, sorted by slot
        rows = x.index_select(0, order // experts.shape[1])  # [tokens * k, dim]
        out = self.dispatcher(self.compute, rows, weights.flatten().index_select(0, order)[:, None], tokens_per_expert)
        return out.index_select(0, order.argsort()).unflatten(0, experts.shape).sum(1)

    def compute(self, rows, weights, tokens_per_expert) -> Float[Tensor, "rows dim"]:
        """Apply the experts held by this process to rows sorted by expert."""
        return self.arithmetic(rows, weights, tokens_per_expert, self.matrices())

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gate, up and down matrices of the experts held by this process."""
        gate, up, down = (self.dispatcher.held(w) for w in (self.gate_proj, self.up_proj, self.down_proj))
        return gate, up, down

    def fetching_is_cheaper(self, experts: Int[Tensor, "tokens k"]) -> bool:
        """Whether to gather single matrices: in decoding with fewer rows than experts, without FP8 and parallelism."""
        plain = isinstance(self.arithmetic, GroupedSwiGLU) and isinstance(self.dispatcher, AllExpertsHere)
        return plain and experts.numel() < len(self.gate_proj) and not torch.is_grad_enabled()

    def by_token(self, x, experts, weights) -> Float[Tensor, "tokens dim"]:
        """Gather the matrices of each token's experts and apply them as batched matmuls."""
        chosen, k = experts.flatten(), experts.shape[1]
        gate, up, down = (weight.index_select(0, chosen) for weight in self.matrices())  # each [tokens * k, in, out]
        rows = x[:, None].expand(-1, k, -1).reshape(-1, 1, x.shape[1])
        inner = F.silu(rows @ gate) * (rows @ up) * weights.flatten()[:, None, None]
        return (inner @ down).squeeze(1).unflatten(0, experts.shape).sum(1)

    @property
    def computes_in(self) -> str:
        """Describe the precision, for `MiniDS.precision_report`."""
        return self.arithmetic.computes_in(self.gate_proj)


class MoE(nn.Module):
    """Sum of the shared experts and the weighted routed experts (V3 eq. 12), chosen or given; and the routing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared = SwiGLU(config.hidden_size, shared_width) if shared_width else None

    def forward(
        self, x: Float[Tensor, "batch seq dim"], experts: Int[Tensor, "batch seq k"] | None = None
    ) -> tuple[Float[Tensor, "batch seq dim"], Routing]:
        routing = self.router(x, experts)
        out = self.experts(x, routing)  # [batch, seq, dim]
        return (out if self.shared is None else out + self.shared(x)), routing


def update_balance_bias(
    bias: Float[Tensor, "experts"], tokens_per_expert: Int[Tensor, "experts"], speed: float
) -> None:
    """Update the selection biases toward equal load, in place (V3 section 2.1.2; FACTS.md section 3).

    `tokens_per_expert` counts the tokens of the whole global batch, summed over micro-batches and data-parallel ranks.
    The bias decreases by `speed` above the mean load, increases by `speed` below it, and stays at the mean.
    """
    tokens_per_expert = tokens_per_expert.float()
    bias.data.add_(speed * torch.sign(tokens_per_expert.mean() - tokens_per_expert))


def max_violation(tokens_per_expert: Int[Tensor, "*layers experts"]) -> Float[Tensor, "*layers"]:
    """MaxVio: (maximum load - mean load) / mean load; 0 is perfect balance (FACTS.md section 3)."""
    tokens_per_expert = tokens_per_expert.float()
    return tokens_per_expert.amax(-1) / tokens_per_expert.mean(-1) - 1


def sequence_balance_loss(scores: Float[Tensor, "batch seq experts"], k: int) -> Float[Tensor, ""]:
    """V3's sequence-wise balance loss without its factor alpha, mean over sequences (V3 eq. 17-20; FACTS.md section 3).

    It is 1 if all experts are chosen equally often. It counts the top k of the unbiased scores, without groups.
    """
    chosen = scores.detach().topk(k, sorted=False).indices
    frequency, probability = _frequency_and_probability(chosen, scores)
    return (frequency * probability).sum(-1).mean()


def auxiliary_balance_losses(routing: Routing, groups: int, groups_per_token: int) -> Float[Tensor, "3"]:
    """V2's expert, device and communication balance losses without factors, mean over sequences (V2 eq. 23-31).

    A device is a group of experts. The third counts the tokens sent to each device, of which a token can reach
    `groups_per_token`. All three are 1 at perfect balance.
    """
    frequency, probability = _frequency_and_probability(routing.experts, routing.scores)
    by_expert = (frequency * probability).sum(-1)

    device_probability = probability.unflatten(-1, (groups, -1)).sum(-1)
    device_frequency = frequency.unflatten(-1, (groups, -1)).mean(-1)
    by_device = (device_frequency * device_probability).sum(-1)

    device = routing.experts // (routing.scores.shape[-1] // groups)
    reached = F.one_hot(device, groups).amax(-2)
    sent = reached.to(probability.dtype).mean(-2) * groups / groups_per_token
    by_communication = (sent * device_probability).sum(-1)
    return torch.stack((by_expert, by_device, by_communication)).mean(-1)


def balance_loss(routing: Routing, config: ModelConfig) -> Float[Tensor, ""]:
    """Sum of the balance losses of one layer, with the config's factors."""
    loss = routing.scores.new_zeros(())
    if config.aux_loss_alpha:
        loss = config.aux_loss_alpha * sequence_balance_loss(routing.scores, config.num_experts_per_tok)
    v2_factors = (config.expert_balance_alpha, config.device_balance_alpha, config.communication_balance_alpha)
    if any(v2_factors):
        losses = auxiliary_balance_losses(routing, config.n_group, config.topk_group)
        loss = loss + (losses * losses.new_tensor(v2_factors)).sum()
    return loss


def _frequency_and_probability(
    chosen: Int[Tensor, "batch seq k"], scores: Float[Tensor, "batch seq experts"]
) -> tuple[Float[Tensor, "batch experts"], Float[Tensor, "batch experts"]]:
    """f and P per sequence: an expert's count relative to an equal share, and its mean normalised affinity."""
    tokens, experts = scores.shape[1:]
    counts = F.one_hot(chosen.flatten(1), experts).sum(1).to(scores.dtype)
    frequency = counts * experts / (chosen.shape[-1] * tokens)
    return frequency, (scores / scores.sum(-1, keepdim=True)).mean(1)
