"""Which process does what: the layout of a training run, its plan, and the mesh of the devices that follow it.

Notable choices:
- three axes: stages over `pp`, experts over `ep`, and `dp` copies of that; the batch is shared out over dp * ep ranks,
  over which FSDP2 shards everything but the experts, which it shards over dp alone;
- without a pipeline a layer's weights are gathered when they are needed (ZeRO stage 3); in a pipeline they and the
  gradients stay whole during a step (stage 1, as in V3), since halved backwards come back to them;
- everything that can be wrong with a layout is known before memory is taken, and the nearest layout that works named.
"""

import itertools
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from minids import cost
from minids.config import ModelConfig, check_fields, require
from minids.model.moe import Experts
from minids.model.transformer import Block, MiniDS
from minids.parallel.activations import activation_bytes
from minids.parallel.experts import shard_experts
from minids.parallel.pipeline import Stage
from minids.parallel.schedule import SCHEDULES
from minids.parallel.timeline import Schedule
from minids.training.loop import Recipe


@dataclass(frozen=True)
class Layout:
    """How many ways the layers (pp), the data (dp) and the experts (ep) are cut; each rank is one cell of the three."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    schedule: str = "dualpipev"

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def parse(cls, text: str, world: int) -> "Layout":
        """Read "ep=2,pp=2,schedule=zbv" for `world` processes; a `dp` that is not named takes those that are left.

        Raises `ValueError` for words that are no layout; `check` says whether one is possible.
        """
        values = dict(part.split("=", 1) if "=" in part else (part, "") for part in text.split(",") if part)
        known = [f.name for f in fields(cls)]
        for name, value in values.items():
            require(name in known, "parallel", text, f"knows {', '.join(known)}, not {name!r}")
            if name == "schedule":
                require(value in SCHEDULES, name, value, f"must be one of {', '.join(SCHEDULES)}")
            else:
                require(value.isdecimal() and int(value) > 0, name, value, "must be a whole number, at least 1")
        sizes = {name: value if name == "schedule" else int(value) for name, value in values.items()}
        rest = max(world // (sizes.get("pp", 1) * sizes.get("ep", 1)), 1)
        return cls(**{"dp": rest} | sizes)

    def __str__(self) -> str:
        return f"pp={self.pp},dp={self.dp},ep={self.ep}" + (f",schedule={self.schedule}" if self.pp > 1 else "")

    @property
    def world(self) -> int:
        """Processes."""
        return self.pp * self.dp * self.ep

    @property
    def replicas(self) -> int:
        """Ranks that share out the global batch."""
        return self.dp * self.ep

    def check(self, config: ModelConfig, recipe: Recipe, world: int) -> None:
        """Raise `ValueError` with the reason, and the nearest possible layout, where this one is impossible."""
        reason = self._obstacle(config, recipe, world)
        if reason is None:
            return
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        cuts = (cut for cut in itertools.product(divisors, repeat=3) if math.prod(cut) == world)
        layouts = sorted((Layout(*cut, self.schedule) for cut in cuts), key=self._unlikeness)
        possible = (layout for layout in layouts if layout._obstacle(config, recipe, world) is None)  # costly: lazy
        found = next(possible, None)
        nearest = "no layout is possible" if found is None else f"nearest possible: {found}"
        raise ValueError(f"parallel={str(self)!r}: {reason}; with {world} processes {nearest}")

    def _unlikeness(self, other: "Layout") -> tuple[float, int]:
        """By what factors the axes differ; of equally near layouts the one with most `dp` is simplest."""
        factors = (getattr(self, axis) / getattr(other, axis) for axis in ("pp", "dp", "ep"))
        return round(sum(abs(math.log(factor)) for factor in factors), 9), -other.dp

    def _obstacle(self, config: ModelConfig, recipe: Recipe, world: int) -> str | None:
        try:
            require(self.world == world, "pp * dp * ep", self.world, f"must be the {world} processes")
            moe, experts = config.num_moe_layers > 0, config.n_routed_experts
            require(self.ep == 1 or moe, "ep", self.ep, "there are no experts")
            require(experts % self.ep == 0, "ep", self.ep, f"must divide the {experts} experts of a layer")
            rows, rule = recipe.batch_size, f"must be shared out evenly over dp * ep = {self.replicas} ranks"
            require(rows % self.replicas == 0, "batch_size", rows, rule)
            if self.pp > 1:
                layers, stages = config.num_hidden_layers, self.pipeline(recipe).stages
                require(layers >= stages, "num_hidden_layers", layers, f"must be at least the {stages} stages")
                without_mtp = recipe.mtp_weight == 0 and config.num_nextn_predict_layers > 0
                require(not without_mtp, "mtp_weight", 0, "a pipeline trains its prediction modules")
        except ValueError as error:
            return str(error)
        return None

    def pipeline(self, recipe: Recipe) -> Schedule:
        """The schedule of a step, with the largest micro-batches that it allows where the recipe names no size.

        Raises `ValueError` where the rows of a rank cannot be cut so.
        """
        rows, wanted = recipe.batch_size // self.replicas, recipe.micro_batch_size
        for size in [wanted] if wanted else range(rows, 0, -1):
            if rows % size == 0:
                try:
                    return SCHEDULES[self.schedule](self.pp, rows // size)
                except ValueError as error:
                    obstacle = error
            else:
                obstacle = f"micro_batch_size={size}: must divide the {rows} rows of a rank"
        raise ValueError(f"{self.schedule} of {rows} rows per rank: {obstacle}")

    def plan(self, config: ModelConfig, recipe: Recipe, device: str) -> str:
        """What will stand where, as text; nothing is allocated."""
        count = parameters_per_rank(self, config, recipe)
        stage, moments = (3 if self.pp == 1 else 1), (4 if recipe.moments == "bf16" else 8)
        shares = ((count["experts"], self.dp), (count["others"], self.replicas))
        parts = [cost.zero_bytes_per_gpu(n, ranks, stage, 4, 4, moments) for n, ranks in shares if n]
        state = {name: sum(part[name] for part in parts) for name in parts[0]}
        rows = recipe.batch_size // self.replicas
        pipeline = self.pipeline(recipe) if self.pp > 1 else None
        micro = rows // pipeline.micro_batches if pipeline else min(recipe.micro_batch_size or rows, rows)
        kept = activation_bytes(config, recipe, micro, pipeline, self.ep)
        lines = [
            f"plan: {self.world} processes on {device}: {self}",
            f"  batch      {recipe.batch_size} x {recipe.seq_len} tokens; {rows} rows per rank, {micro} at a time",
            f"  parameters {sum(count.values()):,} at most on a rank before sharding, {count['experts']:,} in experts",
            f"  memory     {_size(sum(state.values()))} on the fullest device, computed: "
            + ", ".join(f"{name} {_size(value)}" for name, value in state.items())
            + f"; activations come on top: {_size(kept)} where experts are evenly loaded",
        ]
        if pipeline:
            timeline = pipeline.simulate()
            idle, count = max(timeline.bubble) / timeline.makespan, pipeline.micro_batches
            lines.append(f"  schedule   {pipeline.name}, {pipeline.stages} stages; {count} micro-batches ")
            lines[-1] += f"leave a rank idle for {idle:.0%} of the time, if a backward takes two forwards"
        return "\n".join(lines)

    def axes(self, device: str) -> "Axes":
        """This rank's place among the ranks [pp, dp, ep]."""
        mesh = init_device_mesh(device, (self.pp, self.dp, self.ep), mesh_dim_names=("pp", "dp", "ep"))
        return Axes(mesh["pp"], mesh["dp"], mesh["ep"], mesh["dp", "ep"]._flatten("data"))

    def parts(self, model: MiniDS, rank: int, schedule: Schedule | None) -> list[MiniDS]:
        """What of `model` rank number `rank` of the pipeline holds: the whole or some stages."""
        if schedule is None:
            return [model]
        held = sorted({stop.stage for route in schedule.routes for stop in route if stop.rank == rank})
        return [Stage(model, stage, schedule.stages) for stage in held]


class Axes(NamedTuple):
    """The lines of ranks that cross at this one; `data` runs along dp and ep."""

    pp: DeviceMesh
    dp: DeviceMesh
    ep: DeviceMesh
    data: DeviceMesh


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def parameters_per_rank(layout: Layout, config: ModelConfig, recipe: Recipe) -> dict[str, int]:
    """Parameters of the rank with most, before FSDP shards them: in its experts, and all others."""
    with torch.device("meta"):
        model = MiniDS(config)
    schedule = layout.pipeline(recipe) if layout.pp > 1 else None
    counts = []
    for rank in range(layout.pp):
        parts = layout.parts(model, rank, schedule)
        experts = {p for part in parts for m in part.modules() if isinstance(m, Experts) for p in m.parameters()}
        others = {p for part in parts for p in part.parameters()} - experts
        sizes = (sum(p.numel() for p in group) for group in (experts, others))
        counts.append(dict(zip(("experts", "others"), sizes, strict=True)))
    fullest = max(counts, key=lambda count: count["experts"] / layout.ep + count["others"])
    return {"experts": fullest["experts"] // layout.ep, "others": fullest["others"]}


def shard(parts: list[MiniDS], axes: Axes) -> None:
    """Leave on this rank its shard of every parameter of `parts`, in place; every rank calls it.

    Gradients become sums over the data ranks, of whose losses the sum is the global batch's. A router's bias stays
    whole on every rank.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # the view that experts return is never written to
    for part in parts:
        if axes.ep.size() > 1:
            shard_experts(part, axes.ep)
        for router in part.routers():
            if router.bias is not None:
                router.bias.data = router.bias.data.to(axes.data.device_type)
    whole = len(parts) == 1 and not isinstance(parts[0], Stage)
    for module in dict.fromkeys(module for part in parts for module in _units(part, whole)):
        biases = {p for p in module.parameters() if not p.requires_grad}
        axis = axes.dp if isinstance(module, Experts) else axes.data
        fully_shard(module, mesh=axis, reshard_after_forward=whole, ignored_params=biases)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _units(part: MiniDS, whole: bool) -> Iterator[torch.nn.Module]:
    """What FSDP gathers at a time, inner ones first: experts, blocks, and the rest with the root.

    A stage is no unit: another one on this rank may have the same embedding. Its other modules are their own units.
    """
    yield from (module for module in part.modules() if isinstance(module, Experts))
    blocks = [module for module in part.modules() if isinstance(module, Block)]
    yield from blocks
    if whole:
        yield part
    else:
        inside = {module for block in blocks for module in block.modules()}
        yield from (m for m in part.modules() if m not in inside and list(m.parameters(recurse=False)))


def reshard(parts: list[MiniDS]) -> None:
    """Let go of the weights that were gathered from other ranks."""
    for module in (module for part in parts for module in part.modules() if isinstance(module, FSDPModule)):
        module.reshard()


# Processes that torchrun started -------------------------------------------------------------------------------------


@contextmanager
def processes(device: str, patience: float = 60) -> Iterator[int]:
    """Join the processes that torchrun started with this one; gives their number, 1 where there is no torchrun.

    Who waits longer than `patience` seconds for another one gives up.
    """
    if not dist.is_torchelastic_launched():
        yield 1
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The store still holds the addresses of processes that were killed, so every attempt has names of its own.
    store = dist.PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", _store())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=patience))
    yield world
    dist.barrier()  # who leaves early cuts the others off
    dist.destroy_process_group()


def begins() -> bool:
    """Whether this process is the one to begin a new run: rank 0, unless a run was published before a restart."""
    return not dist.is_torchelastic_launched() or dist.get_rank() == 0 and not _store().check([RUN])


def published(directory: Path | None) -> Path:
    """The run's folder on every rank, from the one that began it and knows it; the others wait."""
    if not dist.is_torchelastic_launched():
        return directory
    store = _store()
    if directory is not None:
        store.set(RUN, str(directory))
    store.wait([RUN], timedelta(days=1))  # rank 0 may have to fetch and tokenize the text first
    return Path(store.get(RUN).decode())


def _store() -> dist.Store:
    """torchrun's own store, which outlives the processes."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)


RUN = "minids/run"  # the key in torchrun's store
