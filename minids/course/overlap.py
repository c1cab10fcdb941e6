"""Timeline of an overlapped pair: computation and communication of a forward and a backward chunk, for chapter 07."""

from dataclasses import dataclass

from minids.parallel.schedule import Span, busy_time, check_times

# One layer of both chunks, in the issue order of the streams: name, kind, the component that it waits for.
# A component listed before the one it waits for waits for that of the layer before. F is the forward chunk; I and W are
# the halves of the backward chunk, which visits its layers last to first and sends gradients: its dispatch belongs to
# the forward's combine.
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
    """Components of one chunk or two on the compute stream and the communication stream of a GPU."""

    compute: list[Span[str]]
    communication: list[Span[str]]

    @property
    def makespan(self) -> float:
        """End time of the last component on either stream."""
        return max(self.compute[-1].end, self.communication[-1].end)

    @property
    def exposed(self) -> float:
        """Exposed communication: the time in which nothing is computed because everything waits for communication."""
        return self.makespan - busy_time(self.compute)


def overlap(
    chunks: str = "FB", layers: int = 4, attention: float = 1, mlp: float = 1, communication: float = 1
) -> Streams:
    """Schedule a forward chunk ("F"), a backward chunk ("B") or the overlapped pair ("FB") of `layers` MoE layers.

    `attention` and `mlp` are the times of a layer's forward and of each half of its backward. `communication` is the
    time of all four all-to-alls of a pair relative to its computation: about 1 across nodes (V3 section 3.2.1; FACTS.md
    section 6). The sends between pipeline stages are not modelled. Raises `ValueError` for impossible sizes and times.
    """
    if chunks not in ("F", "B", "FB"):
        raise ValueError(f"chunks={chunks!r}: must be 'F', 'B' or 'FB'")
    if layers < 1:
        raise ValueError(f"layers={layers}: must be at least 1")
    check_times(attention=attention, mlp=mlp, communication=communication)
    time = {"attention": attention, "MLP": mlp, "all-to-all": communication * 3 * (attention + mlp) / 4}
    streams = Streams([], [])
    ended: dict[str, float] = {}
    for name, kind, awaited in layers * [row for row in PAIR if ("F" if row[0].endswith("F") else "B") in chunks]:
        stream = streams.communication if kind == "all-to-all" else streams.compute
        start = max(stream[-1].end if stream else 0, ended.get(awaited, 0))
        ended[name] = start + time[kind]
        stream.append(Span(name, start, ended[name]))
    return streams
