"""Mixture of experts: who reads which token, the experts themselves, and keeping their load even.

Notable choices:
- affinities are computed in float32; the balancing bias takes part in choosing experts and in nothing else;
- no token is ever dropped: tokens are sorted by expert and all experts run as one grouped matrix multiplication;
- nothing is counted behind the reader's back: a forward pass returns how many tokens each expert received, and
  `update_balance_bias` is the one place where a bias changes, once per optimizer step.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.layers import SwiGLU, at_least_float32


@dataclass
class Routing:
    """Who reads which token: k experts and their weights for each token, and its affinities to all experts."""

    experts: Int[Tensor, "batch seq k"]
    weights: Float[Tensor, "batch seq k"]
    scores: Float[Tensor, "batch seq experts"]

    @cached_property
    def load(self) -> Int[Tensor, "experts"]:
        """How many of these tokens each expert reads."""
        return torch.bincount(self.experts.flatten(), minlength=self.scores.shape[-1])


class Router(nn.Module):
    """Choose k experts per token and weigh them (V3 eq. 12-16; V2 section 2.2; FACTS.md section 3)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = nn.Parameter(torch.zeros(config.n_routed_experts), requires_grad=False)
        self.register_parameter("bias", bias if config.selects_with_bias else None)

    def _apply(self, fn, recurse=True):
        bias = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if self.bias is not None and self.bias.dtype != torch.float32:  # steps of 0.001 would be lost in bfloat16
            self.bias.data = bias.to(self.bias.device, torch.float32)
        return self

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Routing:
        scores = self.scores(x)
        experts = self.choose(scores.detach())
        weights = scores.gather(-1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.config.routed_scaling_factor, scores)

    def scores(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq experts"]:
        """The affinity of each token to each expert, in float32 at least, also under autocast."""
        x = at_least_float32(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, self.weight.to(x.dtype))
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    def choose(self, scores: Float[Tensor, "batch seq experts"]) -> Int[Tensor, "batch seq k"]:
        """The k best experts of the best groups, by biased score."""
        if self.bias is not None:
            scores = scores + self.bias
        if self.config.topk_group < self.config.n_group:
            scores = self.within_best_groups(scores)
        return scores.topk(self.config.num_experts_per_tok, sorted=False).indices

    def within_best_groups(self, scores: Float[Tensor, "batch seq experts"]) -> Float[Tensor, "batch seq experts"]:
        """The scores with -inf in all but the best groups (0 instead of -inf would beat a negative biased score).

        V3 ranks groups by the sum of their two best biased scores, V2 by their best score.
        """
        groups = scores.unflatten(-1, (self.config.n_group, -1))
        rank = groups.topk(2 if self.config.selects_with_bias else 1).values.sum(-1)
        kept = rank.topk(self.config.topk_group, sorted=False).indices
        outside = torch.full_like(rank, -torch.inf).scatter_(-1, kept, 0.0)
        return (groups + outside[..., None]).flatten(-2)


def grouped_matmul(
    x: Float[Tensor, "rows in"], weight: Float[Tensor, "experts in out"], load: Int[Tensor, "experts"]
) -> Float[Tensor, "rows out"]:
    """Multiply the first load[0] rows by weight[0], the next load[1] rows by weight[1], and so on.

    One kernel for all experts, whatever their number. Autocast does not know it, so it casts for itself; and it has no
    float64, where the rows are padded to equal counts.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != torch.float64:
        return F.grouped_mm(x, weight, offs=load.cumsum(0).to(torch.int32))
    slot = torch.arange(len(x), device=x.device) - (load.cumsum(0) - load).repeat_interleave(load)
    expert = torch.arange(len(load), device=x.device).repeat_interleave(load)
    padded = x.new_zeros(len(load), int(load.max()), x.shape[1]).index_put((expert, slot), x)
    return torch.bmm(padded, weight)[expert, slot]


class Experts(nn.Module):
    """All routed experts of a layer, each a SwiGLU, stacked along the first dimension."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, dim, inner_dim = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, dim, inner_dim))
        self.up_proj = nn.Parameter(torch.empty(experts, dim, inner_dim))
        self.down_proj = nn.Parameter(torch.empty(experts, inner_dim, dim))

    def forward(self, x: Float[Tensor, "batch seq dim"], routing: Routing) -> Float[Tensor, "batch seq dim"]:
        """The sum of each token's experts, each times its weight.

        The weight is put on before the last matrix, where rows are narrow; that matrix is linear.
        """
        rows, weights = x.flatten(0, 1), routing.weights.to(x.dtype)
        if routing.experts.numel() < len(self.gate_proj) and not torch.is_grad_enabled():
            return self.by_token(rows, routing.experts.flatten(0, 1), weights.flatten(0, 1)).view_as(x)
        return self.by_expert(rows, routing.experts.flatten(0, 1), weights.flatten(0, 1), routing.load).view_as(x)

    def by_expert(self, x, experts, weights, load) -> Float[Tensor, "tokens dim"]:
        """Sort the tokens by expert, so that each expert's lie together, and multiply each run by its matrices."""
        order = experts.flatten().argsort(stable=True)
        rows = x.index_select(0, order // experts.shape[1])
        out = self.multiply(rows, weights.flatten().index_select(0, order)[:, None], load)
        return out.index_select(0, order.argsort()).unflatten(0, experts.shape).sum(1)

    def multiply(self, rows, weights, load) -> Float[Tensor, "rows dim"]:
        """The first load[0] rows through the first expert, the next load[1] through the second, and so on."""
        gate, up, down = self.matrices()
        inner = F.silu(grouped_matmul(rows, gate, load)) * grouped_matmul(rows, up, load)
        return grouped_matmul(inner * weights, down, load)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj, self.up_proj, self.down_proj

    def by_token(self, x, experts, weights) -> Float[Tensor, "tokens dim"]:
        """Fetch each token's matrices: what a decoding step with fewer rows than experts does."""
        chosen, k = experts.flatten(), experts.shape[1]
        gate, up, down = (weight.index_select(0, chosen) for weight in self.matrices())
        rows = x[:, None].expand(-1, k, -1).reshape(-1, 1, x.shape[1])
        inner = F.silu(rows @ gate) * (rows @ up) * weights.flatten()[:, None, None]
        return (inner @ down).squeeze(1).unflatten(0, experts.shape).sum(1)


class MoE(nn.Module):
    """Shared experts for every token plus the weighted routed ones (V3 eq. 12); returns the routing too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared = SwiGLU(config.hidden_size, shared_width) if shared_width else None

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> tuple[Float[Tensor, "batch seq dim"], Routing]:
        routing = self.router(x)
        out = self.experts(x, routing)
        return (out if self.shared is None else out + self.shared(x)), routing


def update_balance_bias(bias: Float[Tensor, "experts"], load: Int[Tensor, "experts"], speed: float) -> None:
    """Nudge each expert's selection bias toward equal load (V3 section 2.1.2; FACTS.md section 3).

    `load` counts the tokens of the whole global batch, summed over micro-batches and data-parallel ranks.
    Overloaded experts go down by `speed`, underloaded ones up; an expert at the mean stays. In place, no gradient.
    """
    load = load.float()
    bias.data.add_(speed * torch.sign(load.mean() - load))


def max_violation(load: Int[Tensor, "*layers experts"]) -> Float[Tensor, "*layers"]:
    """MaxVio: how far the busiest expert lies above the mean load, in means; 0 is perfect (FACTS.md section 3)."""
    load = load.float()
    return load.amax(-1) / load.mean(-1) - 1


def sequence_balance_loss(scores: Float[Tensor, "batch seq experts"], k: int) -> Float[Tensor, ""]:
    """V3's sequence-wise balance loss without its factor alpha, mean over sequences (V3 eq. 17-20; FACTS.md section 3).

    1 where every expert is chosen equally often. Counts the top k of the plain scores: no bias, no groups.
    """
    chosen = scores.detach().topk(k, sorted=False).indices
    frequency, probability = _frequency_and_probability(chosen, scores)
    return (frequency * probability).sum(-1).mean()


def auxiliary_balance_losses(routing: Routing, groups: int, groups_per_token: int) -> Float[Tensor, "3"]:
    """V2's losses by expert, by device and by communication, without their factors (V2 eq. 23-31), mean over sequences.

    A device is a group of experts. The third counts how many of the `groups_per_token` sendings of a token go to each
    device. All three are 1 at perfect balance.
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
    """All balance losses of one layer with the factors that the config gives them."""
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
    """f and P of each sequence: how often an expert is chosen relative to an equal share, and its mean affinity."""
    tokens, experts = scores.shape[1:]
    counts = F.one_hot(chosen.flatten(1), experts).sum(1).to(scores.dtype)
    frequency = counts * experts / (chosen.shape[-1] * tokens)
    return frequency, (scores / scores.sum(-1, keepdim=True)).mean(1)
