"""Plain data crosses unchanged, functions can be called from the other side, and a hostile peer gets nowhere."""

import json
import socket
import struct
import threading
import time

import pytest
import torch

from minids.config import ModelConfig
from minids.course.exercises.chapter02 import Weights
from minids.course.observation import Observation
from minids.course.wire import Broken, NotDefined, Opaque, Peer, Raised
from minids.parallel.dualpipe import dualpipe


@pytest.fixture
def connect():
    """Two peers; the second one serves `functions` in a thread."""
    sockets = []

    def connected(*functions):
        ours, theirs = socket.socketpair()
        sockets.extend((ours, theirs))
        threading.Thread(target=Peer(theirs, functions).serve, daemon=True).start()
        return Peer(ours)

    yield connected
    for each in sockets:
        each.close()


VALUES = [
    None, True, 0, -(10**30), 0.1, float("inf"), "text ☺ \ud800 \0", b"\xff", [], [1, (2.5, "a")],
    {"a": [1], (1, 2): None}, {1, 2}, frozenset({"x"}),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_cross_unchanged(connect, value):
    got = connect(lambda x: x).call(0, [value])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int64]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_cross_unchanged(connect, dtype, shape):
    value = (4 * torch.randn(shape)).to(dtype)
    got = connect(lambda x: x).call(0, [value])
    assert got.dtype == dtype and got.shape == value.shape
    assert got.tolist() == value.tolist() if dtype.is_complex else torch.equal(got.float(), value.float())


def test_records_cross_as_themselves_or_as_named_tuples(connect):
    echo = connect(lambda x: x)
    config = ModelConfig.preset("nano")
    assert echo.call(0, [config]) == config
    schedule = dualpipe(4, 8)
    assert (
        echo.call(0, [schedule]).simulate(F=1, B=2, W=1, FB=3).bubble == schedule.simulate(F=1, B=2, W=1, FB=3).bubble
    )
    weights = echo.call(0, [Weights(*(torch.ones(1) for _ in range(4)))])
    assert weights._fields == Weights._fields and torch.equal(weights.norm, torch.ones(1))


def test_functions_can_be_called_from_the_other_side_and_come_home_as_themselves(connect):
    def double(x):
        return 2 * x

    peer = connect(lambda function, x: function(x) + 1, lambda function: function)
    assert peer.call(0, [double, 4]) == 9
    assert peer.call(1, [double]) is double


def test_a_function_gets_a_new_number_each_time():
    peer = Peer(None)
    assert peer.encode(len) != peer.encode(len)


def test_a_generator_advances_where_it_is_used(connect):
    peer = connect(lambda generator: torch.rand(3, generator=generator))
    generator = torch.Generator().manual_seed(1)
    first, second = peer.call(0, [generator]), peer.call(0, [generator])
    alone = torch.Generator().manual_seed(1)
    assert torch.equal(first, torch.rand(3, generator=alone)) and torch.equal(second, torch.rand(3, generator=alone))


def test_what_is_no_data_is_described(connect):
    assert connect(lambda: object()).call(0, []) == Opaque("a object")


@pytest.mark.parametrize("error", [NotImplementedError("a"), NotDefined("b"), AssertionError("c")])
def test_errors_that_a_check_distinguishes_keep_their_type(connect, error):
    def fail():
        raise error

    with pytest.raises(type(error), match=str(error)):
        connect(fail).call(0, [])


@pytest.mark.parametrize("error", [ZeroDivisionError("a"), SystemExit("b"), KeyboardInterrupt("c")])
def test_other_errors_arrive_as_text(connect, error):
    def fail():
        raise error

    with pytest.raises(Raised, match=f"{type(error).__name__}: {error}"):
        connect(fail).call(0, [])


HOSTILE = {
    "no JSON": b"{",
    "no object": b"[1]",
    "a number": b"7",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "no result": b"{}",
    "an unknown kind": json.dumps({"result": ["module", "os"], "generators": ["list", []]}).encode(),
    "a record that nobody allowed": json.dumps(
        {"result": ["record", "subprocess", "Popen", [["args", "true"]]], "generators": ["list", []]}
    ).encode(),
    "a tensor of another length": json.dumps(
        {"result": ["tensor", "float32", [9], "AAAA"], "generators": ["list", []]}
    ).encode(),
    "a huge tensor": json.dumps({"result": ["tensor", "float32", [10**12], ""], "generators": ["list", []]}).encode(),
    "a negative tensor": json.dumps({"result": ["tensor", "float32", [-1], ""], "generators": ["list", []]}).encode(),
    "an object for a tensor": json.dumps(
        {"result": ["tensor", "__class__", [], ""], "generators": ["list", []]}
    ).encode(),
    "a number of 5000 digits": json.dumps({"result": ["int", "9" * 5000], "generators": ["list", []]}).encode(),
    "a list with a hole": json.dumps({"result": ["list", 5], "generators": ["list", []]}).encode(),
    "an unhashable key": json.dumps({"result": ["dict", [[["list", []], 1]]], "generators": ["list", []]}).encode(),
    "generators that were not sent": json.dumps({"result": None, "generators": ["list", [1]]}).encode(),
    "an error of another form": json.dumps({"error": 7}).encode(),
}


@pytest.mark.parametrize("frame", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_message_is_one_error(frame):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", len(frame)) + frame)
        peer = Peer(ours)
        peer.deadline = time.monotonic() + 5
        try:
            got = peer.call(0, [])
        except Broken:
            return
        assert type(got).__name__ == "Popen" and isinstance(got, tuple), "a name is all that is left of it"


@pytest.mark.parametrize(
    "sent, words",
    [(b"", "took too long"), (b"\0\0", "took too long"), (struct.pack(">I", 2**31), "an answer of 2048 MiB")],
)
def test_silence_and_endless_messages_end(sent, words):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent)
        peer = Peer(ours)
        peer.deadline = time.monotonic() + 0.2
        with pytest.raises(Broken, match=words):
            peer.call(0, [])


def test_a_peer_that_asks_for_a_function_that_nobody_gave_it_gets_an_error(connect):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = json.dumps({"call": 3, "arguments": ["list", []], "named": ["dict", []]}).encode()
        done = json.dumps({"result": 5.0, "generators": ["list", []]}).encode()
        for frame in (request, done):
            theirs.sendall(struct.pack(">I", len(frame)) + frame)
        peer = Peer(ours)
        peer.deadline = time.monotonic() + 5
        assert peer.call(0, []) == 5.0
        assert b"KeyError" in theirs.recv(2**16)


def test_an_observation_crosses_as_itself(connect):
    seen = connect(lambda: Observation(1, (2,), (), ("matmul",), 5)).call(0, [])
    assert isinstance(seen, Observation) and seen == Observation(1, (2,), (), ("matmul",), 5)
