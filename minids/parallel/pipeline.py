"""Runs a pipeline schedule on real processes: every rank holds its stages of a MiniDS and follows its list of actions.

Notable choices:
- torch's pipeline runtime does the work; `program` tells it what each rank computes, sends and receives, in order;
- a `Stage` is a MiniDS with holes, so parameters keep their names, and what all ranks hold fits together again; the
  prediction modules live on the last stage, beside the head, as in V3;
- a parameter that two ranks hold, in DualPipe every one, gets the sum of both gradients, so that its copies stay equal;
- where FSDP2 shards a stage, its weights are gathered once a step and its gradients added up over the data ranks once:
  gathering for each pass would take weights away while a pass that is split into I and W still needs them.

Not covered: the times of a GPU, for the clock is the host's. Torch's runtime is private, and so is FSDP's reduction.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from minids.config import require
from minids.model.moe import balance_loss
from minids.model.transformer import MiniDS, Output
from minids.parallel.timeline import Action, Pair, Schedule, Span, Stop

Loss = Callable[[Output, Any], Float[Tensor, ""]]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be shared out over several."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class MicroBatch:
    """A micro-batch as every stage sees it, and where the stages add up what the whole step returns."""

    tokens: Int[Tensor, "batch seq"]
    target: Any
    loss: Loss
    share: float  # of the sequences of the global batch
    total_loss: Float[Tensor, ""]
    loads: Int[Tensor, "layers experts"]


class Stage(MiniDS):
    """One of `stages` consecutive parts of `model`, made of its very modules under their own names."""

    def __init__(self, model: MiniDS, stage: int, stages: int):
        nn.Module.__init__(self)
        self.config, dense = model.config, model.config.first_k_dense_replace
        self.step = model.step
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        start, end = (model.config.num_hidden_layers * i // stages for i in (stage, stage + 1))
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in range(start, end)})
        self.rows = [i - dense for i in range(max(start, dense), end)]  # this stage's among the loads of all layers
        if self.is_first or self.is_last and model.mtp:
            self.embedding = model.embedding
        if self.is_last:
            self.norm, self.head, self.mtp = model.norm, model.head, model.mtp
            self.rows += range(model.config.num_moe_layers, len(model.routers()))

    def forward(
        self, x: Float[Tensor, "batch seq dim"] | None = None, *, batch: MicroBatch
    ) -> Float[Tensor, "batch seq dim"] | Float[Tensor, ""]:
        """The stream after this stage, after the last one the loss; each adds the balance loss of its own layers."""
        x = self.embedding(batch.tokens) if self.is_first else x
        step, routings, loss = self.step(batch.tokens), [], x.new_zeros(())
        for layer in self.layers.values():
            x, routing = layer(x, step)
            if routing is not None:
                routings.append(routing)
        if self.is_last:
            out = Output(self.logits(x), x, routings=routings)
            self._predict_further(batch.tokens, out)
            loss = batch.loss(replace(out, routings=[]), batch.target)
            batch.total_loss += loss.detach()
        for row, routing in zip(self.rows, routings, strict=False):
            batch.loads[row] += routing.load
            balance = batch.share * balance_loss(routing, self.config)
            batch.total_loss += balance.detach()
            loss = loss + balance
        return loss if self.is_last else _WithLoss.apply(x, loss)

    def update_balance_bias(self, loads: Int[Tensor, "layers experts"], speed: float) -> None:
        """As in a whole model; `loads` has the rows of all its layers."""
        super().update_balance_bias(loads[self.rows], speed)


class _WithLoss(torch.autograd.Function):
    """`x` as it is; on the way back `loss` gets the gradient 1, as if the last stage had added it to its own."""

    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()  # torch detaches in place what a stage returns, which a view does not allow

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_ones(())


def program(schedule: Schedule) -> list[list[str]]:
    """The actions of each rank as torch writes them, and between them what it sends and receives.

    Messages bear no label. So both ends are written down together, as soon as the pass that sends has run: any two
    ranks then list what passes between them in the same order, and nobody waits for what comes later in that order.
    """
    numbers = _numbers(schedule)
    rank_of = {number: stop.rank for stop, number in numbers.items()}
    programs = [[] for _ in schedule.actions]
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
    """Torch's number of each stop. Neighbours in number are connected, so a gap parts two routes."""
    return {s: s.stage + i * (schedule.stages + 1) for i, route in enumerate(schedule.routes) for s in route}


class _Runner(PipelineStage):
    """A stop of a route as torch's runtime drives it; notes in `spans` when it did what."""

    def __init__(self, stage: Stage, stop: Stop, number: int, numbers: int, shape: tuple[int, int], group):
        weight = next(stage.parameters())
        stream = torch.empty(*shape, stage.config.hidden_size, dtype=weight.dtype, device="meta", requires_grad=True)
        super().__init__(stage, number, numbers, weight.device, () if stage.is_first else stream, stream, group=group)
        self.stop, self.batches, self.spans, self.autocast = stop, [], [], nullcontext()

    is_first = property(lambda self: self.submod.is_first)  # torch knows only number 0 for one

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):
        with self._noting("F", fwd_chunk_id), self.autocast:
            return super().forward_one_chunk(fwd_chunk_id, args, {"batch": self.batches[fwd_chunk_id]}, False)

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        with self._noting("B" if full_backward else "I", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        with self._noting("W", bwd_chunk_id):
            if not self.is_first:
                return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            # A first stage has no input gradient, so its I has left everything to W.
            _, _, output, gradients = self.backward_state.pop(bwd_chunk_id)
            torch.autograd.backward(output, gradients)

    @contextmanager
    def _noting(self, kind: str, micro_batch: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.spans.append(Span(Action(kind, micro_batch, self.stop.stage, self.stop.direction), start, end))


class Pipeline:
    """This process's part in a schedule: the `stages` of its rank, and how they are run.

    Every process of `group` makes one, with the same schedule and an equal `model`; `shape` is [batch, seq] of a
    micro-batch. The last stage calls `loss(output, target)`, which over all micro-batches adds up to the global batch's
    loss but for the balance loss (mean over sequences): that is added on every stage, so the output has no routings.
    With `replicas`, as many pipelines, each in a group of its own, share the global batch and its loss evenly.
    Raises `ValueError` where the sizes do not fit together, `ScheduleError` for a schedule that cannot run.
    """

    def __init__(
        self, model: MiniDS, schedule: Schedule, loss: Loss, shape: tuple[int, int], group=None, replicas: int = 1
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
        self.twins = _twins(schedule, parts, self.rank)
        numbers = _numbers(schedule)
        self.runners = [
            _Runner(parts[stop.stage], stop, number, number + stages - stop.stage, shape, group)
            for stop, number in numbers.items()
            if stop.rank == self.rank
        ]
        self.at = {runner.stop: runner.submod for runner in self.runners}
        self.stages, self.device = list(self.at.values()), self.runners[0].device
        self.per_route = schedule.micro_batches // len(schedule.routes)
        self.runtime = _PipelineScheduleRuntime(self.runners, self.per_route, lambda loss, _: loss, scale_grads=False)
        programs = [list(map(_Action.from_str, cells)) for cells in program(schedule)]
        self.runtime.pipeline_order_with_comms = dict(enumerate(programs))
        for runner in self.runners:
            runner.stage_index_to_group_rank = {number: stop.rank for stop, number in numbers.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters that this rank holds, by their name in the whole model."""
        return {name: p for stage in self.stages for name, p in stage.named_parameters() if p.requires_grad}

    def step(self, tokens: Sequence[Tensor], targets: Sequence[Any]) -> tuple[float, Tensor, list[Span]]:
        """Put the gradients of a global batch, given as micro-batches to every rank, into `.grad`, in place of others.

        Returns its loss, its expert loads [layers, experts], and this rank's actions in seconds from a common start; a
        pair ends with its backward. Where micro-batches enter from both ends, the first half goes in at rank 0.
        """
        shapes, wanted = [tuple(each.shape) for each in tokens], [self.shape] * self.schedule.micro_batches
        rule = f"must be {len(wanted)} micro-batches of shape {self.shape}"
        require(shapes == wanted, "tokens", {shape: shapes.count(shape) for shape in shapes}, rule)
        (loss, loads), share = self._zeros(), 1 / (len(tokens) * self.replicas)
        batches = [
            MicroBatch(each.to(self.device), target, self.loss, share, loss, loads)
            for each, target in zip(tokens, targets, strict=True)
        ]
        sharded = list({m: None for stage in self.stages for m in stage.modules() if isinstance(m, FSDPModule)})
        for module in sharded:
            _set_last(module, False)
        for weight in self.parameters().values():
            weight.grad = None  # the rest of another step would count twice where two ranks add up
        spans = []
        for runner in self.runners:
            route = next(i for i, stops in enumerate(self.schedule.routes) if runner.stop in stops)
            runner.batches, runner.spans = batches[route * self.per_route :][: self.per_route], spans
        dist.barrier(self.group)
        start = time.perf_counter()
        self.runtime.step(target=torch.arange(self.per_route), return_outputs=False)
        _reduce_gradients(sharded)
        self._add_twins()
        for count in (loss, loads):
            dist.all_reduce(count, group=self.group)
        parts, whole = iter(spans), []
        for action in self.schedule.actions[self.rank]:
            done, starts, ends = zip(*(next(parts) for _ in action.parts), strict=True)
            whole.append(Span(done[0] if len(done) == 1 else Pair(*done), starts[0] - start, ends[-1] - start))
        return loss.item(), loads, whole

    def _zeros(self) -> tuple[Float[Tensor, ""], Int[Tensor, "layers experts"]]:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        return loss, torch.zeros(self.load_shape, dtype=torch.int64, device=self.device)

    def _add_twins(self) -> None:
        """Add the gradients of the other ranks' copies of what this rank holds."""
        held = self.parameters()
        for weight in held.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients = {name: local(weight.grad) for name, weight in held.items()}
        for peer, names in self.twins.items():
            mine = torch.cat([gradients[name].flatten() for name in names])
            theirs = torch.empty_like(mine)
            both = ((dist.isend, mine), (dist.irecv, theirs))
            for work in dist.batch_isend_irecv([dist.P2POp(*way, None, self.group, group_peer=peer) for way in both]):
                work.wait()
            for name, other in zip(names, theirs.split([gradients[name].numel() for name in names]), strict=True):
                gradients[name] += other.view_as(gradients[name])

    @torch.no_grad()
    def evaluate(self, tokens: Int[Tensor, "batch seq"], target: Any, loss: Loss) -> float:
        """`loss(output, target)` of a batch of any shape, given to every rank: no gradients, stage after stage."""
        dtype = next(self.stages[0].parameters()).dtype
        x = torch.empty(*tokens.shape, self.stages[0].config.hidden_size, dtype=dtype, device=self.device)
        total, loads = self._zeros()
        batch = MicroBatch(tokens.to(self.device), target, loss, 0.0, total, loads)
        for stop, following in pairwise((*self.schedule.routes[0], None)):
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


def _twins(schedule: Schedule, stages: list[Stage], rank: int) -> dict[int, list[str]]:
    """By rank, the names of the trained parameters that it shares with `rank` (no third rank has them)."""
    held = defaultdict(set)
    for stop in _numbers(schedule):
        held[stop.rank].update(name for name, p in stages[stop.stage].named_parameters() if p.requires_grad)
    return {peer: sorted(held[rank] & held[peer]) for peer in held if peer != rank and held[rank] & held[peer]}


def _reduce_gradients(sharded: list[FSDPModule]) -> None:
    """Add up over the data ranks what the micro-batches have left behind, and keep this rank's shards of the sum."""
    for module in sharded:
        _set_last(module, True)
    for state in map(fully_shard.state, sharded):
        for group in state._fsdp_param_groups:
            group.post_backward()
        if state._is_root:
            state._root_post_backward_final_callback()


def _set_last(module: FSDPModule, last: bool) -> None:
    module.set_is_last_backward(last)
    module.set_reshard_after_backward(last, recurse=False)
    module.set_requires_gradient_sync(last, recurse=False)


def launch(work: Callable[[int], Any], ranks: int) -> list[Any]:
    """What `work(rank)` returns on each of `ranks` new processes, forks that form a gloo group (CPU only).

    Raises `RuntimeError` naming the first rank that failed or was killed, and why; no process is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(_member, (work, ranks, Path(folder)), ranks, join=False, start_method="fork")
        try:
            while not context.join(grace_period=1):
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise RuntimeError(f"rank {error.error_index} failed: {reason}") from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]


def _member(rank: int, work: Callable[[int], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    silence = timedelta(minutes=1)  # who hears nothing for so long gives up; no action should take as long
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", silence, ranks, rank)
    try:
        torch.save(work(rank), folder / f"{rank}.pt")
    except Exception as error:
        cause = error.__cause__ or error  # torch wraps what goes wrong in a stage
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from error
    dist.barrier()  # who leaves early cuts the others off
    dist.destroy_process_group()
