"""Run a pipeline schedule on real processes: every rank holds its stages of a MiniDS and executes its list of actions.

Notable choices:
- torch's pipeline runtime executes the actions; `program` lists what each rank computes, sends and receives, in order;
- a `Stage` holds a slice of the model's layers under their original names, so that the parameters of all ranks together
  form the whole model again; the prediction modules are placed on the last stage with the head, as in V3;
- a parameter held by two ranks (in DualPipe every parameter) gets the sum of both gradients, so its copies stay equal;
- where FSDP2 shards a stage, its weights are gathered once per step and its gradients are reduced over the data ranks
  once: gathering per pass would free weights that a pass split into I and W still needs.

Not covered: times on a GPU, because the clock is the host's. Torch's runtime and FSDP's reduction are private; what is
used of them is in _torch_private.py.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from minids.config import require
from minids.model.moe import balance_loss
from minids.model.transformer import MiniDS, Output
from minids.parallel._torch_private import pipeline_runtime, pop_backward_state, reduce_gradients
from minids.parallel.schedule import Action, Pair, Schedule, Span, Stop

Loss = Callable[[Output, Any], Float[Tensor, ""]]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class MicroBatch:
    """A micro-batch as every stage receives it, and the accumulators of what the whole step returns."""

    tokens: Int[Tensor, "batch seq"]
    target: Any
    loss: Loss
    share: float  # fraction of the sequences of the global batch
    total_loss: Float[Tensor, ""]
    tokens_per_expert: Int[Tensor, "layers experts"]


class Stage(MiniDS):
    """Stage number `stage` of `stages`: a slice of the layers of `model`, the same modules under their own names."""

    def __init__(self, model: MiniDS, stage: int, stages: int):
        nn.Module.__init__(self)
        self.config, dense = model.config, model.config.first_k_dense_replace
        self.attention_context = model.attention_context  # type: ignore[method-assign]  # it reads the embedding
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        start, end = (model.config.num_hidden_layers * i // stages for i in (stage, stage + 1))
        layers = {str(i): model.layers[i] for i in range(start, end)}
        self.layers = nn.ModuleDict(layers)  # type: ignore[assignment]  # a list would number them from 0
        self.rows = [i - dense for i in range(max(start, dense), end)]  # this stage's rows of `tokens_per_expert`
        if self.is_first or self.is_last and model.mtp:
            self.embedding = model.embedding
        if self.is_last:
            self.norm, self.head, self.mtp = model.norm, model.head, model.mtp
            self.rows += range(model.config.num_moe_layers, len(model.routers()))

    def forward(  # type: ignore[override]  # most stages get a residual stream instead of tokens
        self, x: Float[Tensor, "batch seq dim"] | None = None, *, batch: MicroBatch
    ) -> Float[Tensor, "batch seq dim"] | Float[Tensor, ""]:
        """Return the residual stream, the last stage the loss; each stage adds the balance loss of its layers."""
        x = self.embedding(batch.tokens) if self.is_first else x
        assert x is not None  # only the first stage may be called without it
        context, routings, loss = self.attention_context(batch.tokens), [], x.new_zeros(())
        for layer in self.layers.children():
            x, routing = layer(x, context)
            if routing is not None:
                routings.append(routing)
        if self.is_last:
            out = Output(x, [self.norm(x)], self.head, routings)
            self._predict_further(batch.tokens, out)
            loss = batch.loss(replace(out, routings=[]), batch.target)
            batch.total_loss += loss.detach()
        for row, routing in zip(self.rows, routings, strict=False):
            batch.tokens_per_expert[row] += routing.tokens_per_expert
            balance = batch.share * balance_loss(routing, self.config)
            batch.total_loss += balance.detach()
            loss = loss + balance
        return loss if self.is_last else _WithLoss.apply(x, loss)

    def update_balance_bias(self, tokens_per_expert: Int[Tensor, "layers experts"], speed: float) -> None:
        """Update the biases of this stage's routers; `tokens_per_expert` has the rows of all layers of the model."""
        super().update_balance_bias(tokens_per_expert[self.rows], speed)


def stages_of_rank(model: MiniDS, rank: int, schedule: Schedule | None) -> list[MiniDS]:
    """Return the stages of `model` that rank `rank` of a pipeline holds; without a pipeline, the whole model."""
    if schedule is None:
        return [model]
    held = sorted({stop.stage for route in schedule.routes for stop in route if stop.rank == rank})
    return [Stage(model, stage, schedule.stages) for stage in held]


class _WithLoss(torch.autograd.Function):
    """Identity of `x`; in backward `loss` gets the gradient 1, as if the last stage had added it to its loss."""

    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()  # torch detaches in place what a stage returns, which a view does not allow

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_ones(())


def program(schedule: Schedule) -> list[list[str]]:
    """Return the actions of each rank in torch's notation, with the sends and receives between them.

    Messages have no label. Therefore the send and its receive are listed together, as soon as the pass that sends has
    run: any two ranks list the messages between them in the same order, and none waits for a later one.
    """
    numbers = _numbers(schedule)
    rank_of = {number: stop.rank for stop, number in numbers.items()}
    programs: list[list[str]] = [[] for _ in schedule.actions]
    for rank, action in schedule.in_order():
        own = [numbers[Stop(rank, part.stage, part.direction)] for part in action.parts]
        cells = [f"{n}{part.kind}{part.micro_batch}" for n, part in zip(own, action.parts, strict=True)]
        programs[rank].append(cells[0] if len(cells) == 1 else f"({';'.join(cells)})OVERLAP_F_B")
        for number, part in zip(own, action.parts, strict=True):
            letter, ahead = {"F": ("F", 1), "B": ("B", -1), "I": ("B", -1), "W": ("", 0)}[part.kind]
            peer = rank_of.get(number + ahead, rank)
            if peer != rank:
                programs[rank].append(f"{number}SEND_{letter}{part.micro_batch}")
                programs[peer].append(f"{number + ahead}RECV_{letter}{part.micro_batch}")
    return programs


def _numbers(schedule: Schedule) -> dict[Stop, int]:
    """Return torch's number of each stop. Consecutive numbers are connected, so a gap separates two routes."""
    return {s: s.stage + i * (schedule.stages + 1) for i, route in enumerate(schedule.routes) for s in route}


class _Runner(PipelineStage):
    """A stop of a route as a stage of torch's runtime; records its actions with their times in `spans`."""

    def __init__(self, stage: Stage, stop: Stop, number: int, numbers: int, shape: tuple[int, int], group):
        weight = next(stage.parameters())
        stream = torch.empty(*shape, stage.config.hidden_size, dtype=weight.dtype, device="meta", requires_grad=True)
        super().__init__(stage, number, numbers, weight.device, () if stage.is_first else stream, stream, group=group)
        self.stop = stop
        self.batches: list[MicroBatch] = []
        self.spans: list[Span[Action]] = []
        self.autocast: AbstractContextManager = nullcontext()

    is_first = property(lambda self: self.submod.is_first)  # for torch only number 0 is a first stage

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):
        with self._recorded("F", fwd_chunk_id), self.autocast:
            return super().forward_one_chunk(fwd_chunk_id, args, {"batch": self.batches[fwd_chunk_id]}, False)

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        with self._recorded("B" if full_backward else "I", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        with self._recorded("W", bwd_chunk_id):
            if not self.is_first:
                return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            # A first stage has no input gradient, so its I has computed nothing and W runs the whole backward.
            torch.autograd.backward(*pop_backward_state(self, bwd_chunk_id))

    @contextmanager
    def _recorded(self, kind: str, micro_batch: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.spans.append(Span(Action(kind, micro_batch, self.stop.stage, self.stop.direction), start, end))


class Pipeline:
    """One rank of a pipeline: its `stages`, and the runtime that executes its actions.

    Every process of `group` creates one, with the same schedule and an equal `model`; `shape` is [batch, seq] of a
    micro-batch. The last stage calls `loss(output, target)`; its sum over all micro-batches is the global batch's loss
    without the balance loss (mean over sequences), which every stage adds for its layers: `output` has no routings.
    `loss` may be set later, and anew before every step.
    `replicas` is the number of pipelines, each in its own group, among which the global batch and its loss are divided.
    Raises `ValueError` where the sizes do not fit together, `ScheduleError` for a schedule that cannot run.
    """

    def __init__(
        self,
        model: MiniDS,
        schedule: Schedule,
        loss: Loss | None,
        shape: tuple[int, int],
        group: dist.ProcessGroup | None = None,
        replicas: int = 1,
    ):
        schedule.check()
        ranks, processes = len(schedule.actions), dist.get_world_size(group)
        layers, stages, context = model.config.num_hidden_layers, schedule.stages, model.config.max_position_embeddings
        require(processes == ranks, "processes", processes, f"must be the {ranks} ranks of the schedule")
        require(layers >= stages, "num_hidden_layers", layers, f"must be at least the {stages} stages of the schedule")
        require(shape[1] <= context, "shape", shape, f"the context holds {context} tokens")
        self.schedule, self.loss, self.group, self.rank = schedule, loss, group, dist.get_rank(group)
        self.shape, self.replicas = tuple(shape), replicas
        self.load_shape = len(model.routers()), model.config.n_routed_experts
        parts = [Stage(model, i, stages) for i in range(stages)]
        self.shared_parameters = _shared_parameters(schedule, parts, self.rank)
        numbers = _numbers(schedule)
        self.runners = [
            _Runner(parts[stop.stage], stop, number, number + stages - stop.stage, shape, group)
            for stop, number in numbers.items()
            if stop.rank == self.rank
        ]
        self.at = {runner.stop: parts[runner.stop.stage] for runner in self.runners}
        self.stages, self.device = list(self.at.values()), self.runners[0].device
        self.per_route = schedule.micro_batches // len(schedule.routes)
        rank_of = {number: stop.rank for stop, number in numbers.items()}
        self.runtime = pipeline_runtime(self.runners, self.per_route, program(schedule), rank_of)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters that this rank holds, by their name in the whole model."""
        return {name: p for stage in self.stages for name, p in stage.named_parameters() if p.requires_grad}

    def step(self, tokens: Sequence[Tensor], targets: Sequence[Any]) -> tuple[float, Tensor, list[Span]]:
        """Compute the gradients of a global batch, which every rank gets as micro-batches; they replace `.grad`.

        Returns the loss, the tokens per expert [layers, experts], and this rank's actions in seconds from a common
        start; a pair ends with its backward. Where micro-batches enter at both ends, the first half enters at rank 0.
        """
        shapes, wanted = [tuple(each.shape) for each in tokens], [self.shape] * self.schedule.micro_batches
        assert self.loss is not None, "set `loss` before the first step"
        rule = f"must be {len(wanted)} micro-batches of shape {self.shape}"
        require(shapes == wanted, "tokens", {shape: shapes.count(shape) for shape in shapes}, rule)
        (loss, tokens_per_expert), share = self._zeros(), 1 / (len(tokens) * self.replicas)
        batches = [
            MicroBatch(each.to(self.device), target, self.loss, share, loss, tokens_per_expert)
            for each, target in zip(tokens, targets, strict=True)
        ]
        sharded = list({m: None for stage in self.stages for m in stage.modules() if isinstance(m, FSDPModule)})
        for module in sharded:
            _set_last(module, False)
        for weight in self.parameters().values():
            weight.grad = None  # an earlier gradient would count twice where two ranks share the parameter
        spans: list[Span[Action]] = []
        for runner in self.runners:
            route = next(i for i, stops in enumerate(self.schedule.routes) if runner.stop in stops)
            runner.batches, runner.spans = batches[route * self.per_route :][: self.per_route], spans
        dist.barrier(self.group)
        start = time.perf_counter()
        self.runtime.step(target=torch.arange(self.per_route), return_outputs=False)
        for module in sharded:
            _set_last(module, True)
        reduce_gradients(sharded)
        self._add_shared_gradients()
        for count in (loss, tokens_per_expert):
            dist.all_reduce(count, group=self.group)
        parts, whole = iter(spans), []
        for action in self.schedule.actions[self.rank]:
            done, starts, ends = zip(*(next(parts) for _ in action.parts), strict=True)
            whole.append(Span(done[0] if len(done) == 1 else Pair(*done), starts[0] - start, ends[-1] - start))
        return loss.item(), tokens_per_expert, whole

    def _zeros(self) -> tuple[Float[Tensor, ""], Int[Tensor, "layers experts"]]:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        return loss, torch.zeros(self.load_shape, dtype=torch.int64, device=self.device)

    def _add_shared_gradients(self) -> None:
        """Add the gradients of the other ranks' copies of this rank's parameters."""
        held = self.parameters()
        gradients = {}
        for name, weight in held.items():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients[name] = local(weight.grad)
        for peer, names in self.shared_parameters.items():
            mine = torch.cat([gradients[name].flatten() for name in names])
            theirs = torch.empty_like(mine)
            send = dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer)
            receive = dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer)
            for work in dist.batch_isend_irecv([send, receive]):
                work.wait()
            for name, other in zip(names, theirs.split([gradients[name].numel() for name in names]), strict=True):
                gradients[name] += other.view_as(gradients[name])

    @torch.no_grad()
    def evaluate(self, tokens: Int[Tensor, "batch seq"], target: Any, loss: Loss) -> float:
        """Return `loss(output, target)` of a batch of any shape, given to every rank; stage by stage, no gradients."""
        dtype = next(self.stages[0].parameters()).dtype
        x = torch.empty(*tokens.shape, self.stages[0].config.hidden_size, dtype=dtype, device=self.device)
        total, tokens_per_expert = self._zeros()
        batch = MicroBatch(tokens.to(self.device), target, loss, 0.0, total, tokens_per_expert)
        route = self.schedule.routes[0]
        for stop, following in zip(route, (*route[1:], None), strict=True):
            if stop.rank == self.rank:
                x = self.at[stop](x, batch=batch)
            if following is None or following.rank == stop.rank:
                continue
            if stop.rank == self.rank:
                dist.send(x, group=self.group, group_dst=following.rank)
            elif following.rank == self.rank:
                dist.recv(x, group=self.group, group_src=stop.rank)
        dist.all_reduce(total, group=self.group)
        return total.item()


def _shared_parameters(schedule: Schedule, stages: list[Stage], rank: int) -> dict[int, list[str]]:
    """Return by rank the names of the trainable parameters that it shares with `rank` (no third rank has them)."""
    held: defaultdict[int, set[str]] = defaultdict(set)
    for stop in _numbers(schedule):
        held[stop.rank].update(name for name, p in stages[stop.stage].named_parameters() if p.requires_grad)
    return {peer: sorted(held[rank] & held[peer]) for peer in held if peer != rank and held[rank] & held[peer]}


def _set_last(module: FSDPModule, last: bool) -> None:
    """Set whether FSDP reduces gradients and frees gathered weights after the next backward pass of `module`."""
    module.set_is_last_backward(last)
    module.set_reshard_after_backward(last, recurse=False)
    module.set_requires_gradient_sync(last, recurse=False)
