"""Computation and communication that overlap in a pair of chunks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids.course.overlap import overlap


def test_one_layer_of_a_pair_by_hand():
    """Attention and MLP 1 each way, an all-to-all 1.5: only the first half unit of a dispatch stays exposed."""
    streams = overlap("FB", layers=1)
    assert streams.compute == [
        ("attention F", 0, 1), ("MLP I", 1.5, 2.5), ("MLP W", 2.5, 3.5), ("MLP F", 3.5, 4.5), ("attention I", 4.5, 5.5),
        ("attention W", 5.5, 6.5),
    ]  # fmt: skip
    assert streams.communication == [
        ("dispatch B", 0, 1.5),
        ("dispatch F", 1.5, 3),
        ("combine B", 3, 4.5),
        ("combine F", 4.5, 6),
    ]
    assert (streams.makespan, streams.exposed) == (6.5, 0.5)


@pytest.mark.parametrize("layers", [1, 4, 7])
def test_pairing_hides_what_single_chunks_expose(layers):
    """A forward alone hides nothing; a backward what its weight halves cover; a pair all but its start."""
    assert overlap("F", layers).exposed == 3 * layers
    assert overlap("B", layers).exposed == 1.5 + 0.5 * layers + 0.5 * (layers - 1)
    assert overlap("FB", layers).exposed == 0.5


@given(st.integers(1, 5), *[st.integers(0, 4)] * 3)
def test_streams_do_one_thing_at_a_time_and_wait_for_their_inputs(layers, attention, mlp, communication):
    pair, alone = overlap("FB", layers, attention, mlp, communication), {}
    for chunk in "FB":
        streams = overlap(chunk, layers, attention, mlp, communication)
        alone[chunk] = streams.compute + streams.communication
        if communication == 0:
            assert streams.exposed == 0
    for stream in (pair.compute, pair.communication):
        assert all(before.end <= after.start for before, after in zip(stream, stream[1:], strict=False))
    paired = pair.compute + pair.communication
    work = Counter((name, end - start) for name, start, end in paired)
    assert work == Counter((name, end - start) for chunk in alone.values() for name, start, end in chunk)
    total = {s: sum(span.end - span.start for span in getattr(pair, s)) for s in ("compute", "communication")}
    assert total["communication"] == communication * total["compute"]

    when = {}
    for name, start, end in paired:
        when.setdefault(name, []).append((start, end))
    forward = ["attention F", "dispatch F", "MLP F", "combine F"]
    backward = ["dispatch B", "MLP I", "combine B", "attention I"]
    for chain in (forward, backward):
        in_order = [when[name][layer] for layer in range(layers) for name in chain]
        assert all(before[1] <= after[0] for before, after in zip(in_order, in_order[1:], strict=False))
    for half in ("MLP", "attention"):
        assert all(i[1] <= w[0] for i, w in zip(when[f"{half} I"], when[f"{half} W"], strict=True))


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (dict(chunks="BF"), "chunks='BF': must be 'F', 'B' or 'FB'"),
        (dict(layers=0), "layers=0: must be at least 1"),
        (dict(mlp=-1), "mlp=-1: must be a finite number of at least 0"),
    ],
)
def test_a_layout_that_cannot_be_is_named(arguments, complaint):
    with pytest.raises(ValueError) as error:
        overlap(**arguments)
    assert str(error.value) == complaint
