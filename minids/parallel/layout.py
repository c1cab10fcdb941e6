"""Parallel layout of a run: the numbers of pipeline, data and expert parallel ranks.

Notable choices:
- three axes: stages over `pp`, experts over `ep`, and `dp` copies of that; the batch is divided over dp * ep ranks;
- an impossible layout is refused before any memory is allocated, with the reason and the nearest possible layout.
"""

import itertools
import math
from dataclasses import dataclass, fields, replace

from minids.config import ModelConfig, check_fields, require
from minids.parallel.schedule import Schedule
from minids.parallel.schedules import SCHEDULES
from minids.training.pretrain import Recipe


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes of ranks: pipeline stages (pp), data parallel copies (dp), shards of experts (ep)."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    schedule: str = "dualpipev"

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def parse(cls, text: str, world: int, layers: int | None = None) -> "Layout":
        """Parse "ep=2,pp=2,schedule=zbv" for `world` processes; the default of `dp` is the remaining processes.

        The default schedule is DualPipeV, or 1F1B for a model with fewer `layers` than two stages per rank need.
        Raises `ValueError` for text that is not a layout; `check` tests whether a layout is possible.
        """
        values = {name: value for name, _, value in (part.partition("=") for part in text.split(",") if part)}
        known = [f.name for f in fields(cls)]
        for name, value in values.items():
            require(name in known, "parallel", text, f"allows {', '.join(known)}, not {name!r}")
            if name == "schedule":
                require(value in SCHEDULES, name, value, f"must be one of {', '.join(SCHEDULES)}")
            else:
                require(
                    value.isascii() and value.isdecimal() and int(value) > 0,
                    name,
                    value,
                    "must be a whole number, at least 1",
                )
        sizes = {name: int(value) for name, value in values.items() if name != "schedule"}
        rest = max(world // (sizes.get("pp", 1) * sizes.get("ep", 1)), 1)
        too_few_layers = layers is not None and layers < 2 * sizes.get("pp", 1)
        schedule = values.get("schedule", "one_f_one_b" if too_few_layers else cls.schedule)
        return cls(**{"dp": rest} | sizes, schedule=schedule)

    def __str__(self) -> str:
        return f"pp={self.pp},dp={self.dp},ep={self.ep}" + (f",schedule={self.schedule}" if self.pp > 1 else "")

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.pp * self.dp * self.ep

    @property
    def replicas(self) -> int:
        """Number of ranks among which the global batch is divided."""
        return self.dp * self.ep

    def check(self, config: ModelConfig, recipe: Recipe, world: int) -> None:
        """Raise `ValueError` with the reason, and the nearest possible layout, where this one is impossible."""
        reason = self._obstacle(config, recipe, world)
        if reason is None:
            return
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        cuts = ((pp, dp, ep) for pp, dp, ep in itertools.product(divisors, repeat=3) if pp * dp * ep == world)
        near = sorted((Layout(pp, dp, ep, self.schedule) for pp, dp, ep in cuts), key=self._unlikeness)
        others = [name for name in SCHEDULES if name != self.schedule]
        layouts = (
            replace(layout, schedule=name)
            for layout in near
            for name in (self.schedule, *(others if layout.pp > 1 else ()))
        )
        possible = (layout for layout in layouts if layout._obstacle(config, recipe, world) is None)  # costly: lazy
        found = next(possible, None)
        nearest = "no layout is possible" if found is None else f"nearest possible: {found}"
        raise ValueError(f"parallel={str(self)!r}: {reason}; with {world} processes {nearest}")

    def _unlikeness(self, other: "Layout") -> tuple[float, int]:
        """Return the distance in log sizes of the axes; of equally near layouts, the one with most `dp` is first."""
        factors = (getattr(self, axis) / getattr(other, axis) for axis in ("pp", "dp", "ep"))
        return round(sum(abs(math.log(factor)) for factor in factors), 9), -other.dp

    def _obstacle(self, config: ModelConfig, recipe: Recipe, world: int) -> str | None:
        try:
            require(self.world == world, "pp * dp * ep", self.world, f"must be the {world} processes")
            require(recipe.qk_clip is None, "qk_clip", recipe.qk_clip, "is for training in one process")
            moe, experts = config.num_moe_layers > 0, config.n_routed_experts
            require(self.ep == 1 or moe, "ep", self.ep, "there are no experts")
            require(experts % self.ep == 0, "ep", self.ep, f"must divide the {experts} experts of a layer")
            rows, rule = recipe.batch_size, f"must be divided evenly over dp * ep = {self.replicas} ranks"
            require(rows % self.replicas == 0, "batch_size", rows, rule)
            alone = world == 1 or recipe.index_stage == "sparse"
            require(alone, "index_stage", recipe.index_stage, "a warm-up of the indexers runs in one process")
            if self.pp > 1:
                for name, value in (("hc_mult", 1), ("engram", None), ("index_topk", None), ("num_hash_layers", None)):
                    require(getattr(config, name) == value, name, getattr(config, name), f"a pipeline has {value} only")
                layers, stages = config.num_hidden_layers, self.pipeline(recipe).stages
                require(layers >= stages, "num_hidden_layers", layers, f"must be at least the {stages} stages")
                without_mtp = recipe.mtp_weight == 0 and config.num_nextn_predict_layers > 0
                require(not without_mtp, "mtp_weight", 0, "must be above 0, since a pipeline trains the MTP modules")
        except ValueError as error:
            return str(error)
        return None

    def pipeline(self, recipe: Recipe) -> Schedule:
        """Return the schedule of a step; without a size in the recipe, with the largest possible micro-batches.

        Raises `ValueError` where the rows of a rank cannot be divided into such micro-batches.
        """
        rows, wanted = recipe.batch_size // self.replicas, recipe.micro_batch_size
        for size in [wanted] if wanted else range(rows, 0, -1):
            if rows % size == 0:
                try:
                    return SCHEDULES[self.schedule](self.pp, rows // size)
                except ValueError as error:
                    obstacle = str(error)
            else:
                obstacle = f"micro_batch_size={size}: must divide the {rows} rows of a rank"
        raise ValueError(f"{self.schedule} of {rows} rows per rank: {obstacle}")
