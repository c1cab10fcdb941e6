"""Inside an overlapped pair: computation and communication of a forward and a backward chunk, side by side."""

from dataclasses import dataclass

from minids.parallel.timeline import Span, busy_time, check_times

# One layer of both chunks, in the order in which the streams take up their components: name, kind, what it waits for.
# A component that stands above what it waits for waits for the layer before. F is the forward chunk; I and W are the
# halves of the backward one, which meets its layers last to first and sends gradients: its dispatch belongs to the
# forward's combine.
PAIR = (
    ("dispatch B", "all-to-all", "attention I"),
    ("attention F", "attention", "combine F"),
    ("MLP I", "MLP", "dispatch B"),
    ("dispatch F", "all-to-all", "attention F"),
    ("MLP W", "MLP", "MLP I"),
    ("combine B", "all-to-all", "MLP I"),
    ("MLP F", "MLP", "dispatch F"),
    ("combine F", "all-to-all", "MLP F"),
    ("attention I", "attention", "combine B"),
    ("attention W", "attention", "attention I"),
)


@dataclass(frozen=True)
class Streams:
    """The components of one chunk or two on the compute stream and the communication stream of a GPU."""

    compute: list[Span]
    communication: list[Span]

    @property
    def makespan(self) -> float:
        """The end of the last component on either stream."""
        return max(self.compute[-1].end, self.communication[-1].end)

    @property
    def exposed(self) -> float:
        """The time in which nothing is computed, because everything waits for communication."""
        return self.makespan - busy_time(self.compute)


def overlap(
    chunks: str = "FB", layers: int = 4, attention: float = 1, mlp: float = 1, communication: float = 1
) -> Streams:
    """Lay out a forward chunk ("F"), a backward chunk ("B") or the overlapped pair ("FB") of `layers` MoE layers.

    `attention` and `mlp` are the times of a layer's forward and of each half of its backward. `communication` is the
    time of all four all-to-alls of a pair relative to its computation: about 1 across nodes (V3 section 3.2.1; FACTS.md
    section 6). The sends between pipeline stages are left out. Raises `ValueError` for sizes and times that cannot be.
    """
    if chunks not in ("F", "B", "FB"):
        raise ValueError(f"chunks={chunks!r}: must be 'F', 'B' or 'FB'")
    if layers < 1:
        raise ValueError(f"layers={layers}: must be at least 1")
    check_times(attention=attention, mlp=mlp, communication=communication)
    time = {"attention": attention, "MLP": mlp, "all-to-all": communication * 3 * (attention + mlp) / 4}
    streams, ended = Streams([], []), {}
    for name, kind, awaited in layers * [row for row in PAIR if ("F" if row[0].endswith("F") else "B") in chunks]:
        stream = streams.communication if kind == "all-to-all" else streams.compute
        start = max(stream[-1].end if stream else 0, ended.get(awaited, 0))
        ended[name] = start + time[kind]
        stream.append(Span(name, start, ended[name]))
    return streams
