"""Calls between two processes that do not trust each other, and the plain data that they exchange.

Notable choices:
- a message is a frame: its length in four bytes, then JSON. `Peer.decode` builds Python's own types, tensors,
  generators and a few records; nothing in a message chooses code to run;
- a function crosses as a number. To call what arrives is to send the arguments to the process that has the function:
  neither side learns more about the other's functions than their results;
- torch is imported only where a tensor arrives: many notebooks do without.
"""

import base64
import builtins
import collections
import dataclasses
import importlib
import json
import secrets
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

LARGEST_MESSAGE = 2**27  # bytes
RECORDS = {
    "minids.config": ("ModelConfig", "YaRN"),
    "minids.parallel.schedule": ("Action", "Pair", "Schedule", "Span", "Stop", "Timeline"),
    "minids.course.observation": ("Observation",),
}
DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128".split()
DTYPES += ["float8_e4m3fn", "float8_e5m2"]


class Broken(Exception):
    """The other process ended, took too long, or sent something else than plain data; the message says which."""


class Raised(Exception):
    """The called function raised; the message holds the error's type, its text, and where in the answer it was."""


class NotDefined(Exception):
    """The notebook does not define the function that was asked for."""


@dataclasses.dataclass(frozen=True)
class Opaque:
    """Stands for a value that is not plain data, such as a NumPy array, and describes it."""

    description: str

    def __repr__(self) -> str:
        return self.description


class Connection(Protocol):
    """What a `Peer` needs of a socket."""

    def recv(self, size: int, /) -> bytes: ...

    def sendall(self, data: bytes, /) -> None: ...

    def settimeout(self, seconds: float | None, /) -> None: ...


class Peer:
    """One end of a connection. `functions` are those that the other end may call from the start, as 0, 1, ...

    A function that is sent gets a new number each time, so that numbers say nothing about functions.
    """

    def __init__(self, connection: Connection, functions: Sequence[Callable[..., Any]] = ()):
        self.connection = connection
        self.functions = dict(enumerate(functions))
        self.received = bytearray()
        self.deadline: float | None = None  # of the call in progress, on the clock of time.monotonic
        self.meanwhile: Callable[[], None] = lambda: None  # called every second while an answer is awaited
        self.transferring = False  # an interrupt in the middle of a message would lose a part of it

    def call(self, function: int, arguments: Sequence[Any], named: Mapping[str, Any] | None = None) -> Any:
        """Call a function of the other process; meanwhile serve its calls.

        Generators among the arguments advance as the function used them. Raises `Raised` if the function raises, but
        `NotImplementedError`, `AssertionError` or `NotDefined` if that is what it raised; and `Broken`.
        """
        generators: list[Any] = []
        self.send({
            "call": function,
            "arguments": self.encode(list(arguments), generators),
            "named": self.encode(dict(named or {}), generators),
        })  # fmt: skip
        while True:
            message = self.receive()
            if "call" in message:
                self.answer(message)
            elif "error" in message:
                raise _as_error(message["error"])
            else:
                self._advance(generators, self.decode(message.get("generators")))
                return self.decode(message.get("result"))

    def _advance(self, generators: list[Any], states: Any) -> None:
        try:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
        except Exception:
            raise Broken("an answer that is not plain data") from None

    def answer(self, message: dict[str, Any]) -> None:
        """Call the function that a message asks for, and send its result or its error."""
        try:
            generators: list[Any] = []
            arguments = self.decode(message["arguments"], generators)
            named = self.decode(message["named"], generators)
            result = self.functions[_index(message["call"])](*arguments, **named)
            states = [generator.get_state() for generator in generators]
            reply = {"result": self.encode(result), "generators": self.encode(states)}
        except BaseException as error:  # the student's code may also raise SystemExit or KeyboardInterrupt
            if isinstance(error, Broken):
                raise
            reply = {"error": [type(error).__name__, _text(error)]}
        self.send(reply)

    def serve(self) -> None:
        """Answer calls until the other end closes the connection."""
        while True:
            try:
                message = self.receive()
            except Broken:
                return
            self.answer(message)

    def send(self, message: dict[str, Any]) -> None:
        frame = json.dumps(message).encode()
        self.transferring = True
        try:
            self.connection.settimeout(self._left())
            self.connection.sendall(struct.pack(">I", len(frame)) + frame)
        except TimeoutError:
            raise Broken("took too long") from None
        except OSError:
            pass  # closed: a reply that was sent before can still be received
        finally:
            self.transferring = False

    def receive(self) -> dict[str, Any]:
        """Return the next message. Raises `Broken`."""
        self.transferring = True
        try:
            (length,) = struct.unpack(">I", self._take(4))
            if length > LARGEST_MESSAGE:
                raise Broken(f"an answer of {length >> 20} MiB: at most {LARGEST_MESSAGE >> 20} are accepted")
            frame = self._take(length)
        finally:
            self.transferring = False
        try:
            message = json.loads(frame)
        except (ValueError, RecursionError):
            raise Broken("an answer that is not plain data") from None
        if not isinstance(message, dict):
            raise Broken("an answer that is not plain data")
        return message

    def _take(self, length: int) -> bytes:
        while len(self.received) < length:
            try:
                left = self._left()
                self.connection.settimeout(1.0 if left is None else min(left, 1.0))
                more = self.connection.recv(2**20)
            except TimeoutError:
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    raise Broken("took too long") from None
                self.meanwhile()
                continue
            except OSError:
                more = b""
            if not more:
                raise Broken("the process ended without an answer")
            self.received += more
        taken = bytes(self.received[:length])
        del self.received[:length]
        return taken

    def _left(self) -> float | None:
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 1e-3)

    def encode(self, value: Any, generators: list[Any] | None = None) -> Any:
        """Return JSON for a value; what is not plain data becomes its description. Generators are also collected."""
        if value is None or isinstance(value, bool | str):
            return value if value is None or type(value) in (bool, str) else str(value)
        if isinstance(value, int | float):
            return ["int", str(int(value))] if isinstance(value, int) else float(value)
        if isinstance(value, bytes):
            return ["bytes", base64.b64encode(value).decode()]
        if isinstance(value, RemoteFunction) and value.peer is self:
            return ["yours", value.number]
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Opaque):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
            return self._record(value, fields, generators)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._record(value, dict(zip(value._fields, value, strict=True)), generators)
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                return [kind.__name__, [self.encode(each, generators) for each in value]]
        if isinstance(value, dict):
            return [
                "dict",
                [[self.encode(key, generators), self.encode(each, generators)] for key, each in value.items()],
            ]
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return _encode_tensor(value)
        if torch is not None and isinstance(value, torch.Generator):
            if generators is not None:
                generators.append(value)
            return ["generator", _encode_tensor(value.get_state())]
        if callable(value) and not isinstance(value, type):
            number = secrets.randbits(48)
            self.functions[number] = value
            return ["function", number]
        return ["opaque", value.description if isinstance(value, Opaque) else f"a {type(value).__name__}"]

    def _record(self, value: Any, fields: dict[str, Any], generators: list[Any] | None) -> list[Any]:
        kind = type(value)
        return ["record", kind.__module__, kind.__name__, [[n, self.encode(v, generators)] for n, v in fields.items()]]

    def decode(self, data: Any, generators: list[Any] | None = None) -> Any:
        """Return the value of JSON that `encode` made, on the other side. Raises `Broken` for any other JSON."""
        try:
            return self._decode(data, generators)
        except Broken:
            raise
        except Exception:  # whatever a constructor makes of arguments that nobody checked
            raise Broken("an answer that is not plain data") from None

    def _decode(self, data: Any, generators: list[Any] | None) -> Any:
        if not isinstance(data, list):
            if data is None or isinstance(data, bool | float | str):
                return data
            raise Broken("an answer that is not plain data")
        kind, content, *more = data
        if kind == "int":
            return int(content)
        if kind == "bytes":
            return base64.b64decode(content)
        if kind in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, kind)(self._decode(each, generators) for each in content)
        if kind == "dict":
            return {self._decode(key, generators): self._decode(value, generators) for key, value in content}
        if kind == "record":
            return _record_of(content, more[0], {name: self._decode(value, generators) for name, value in more[1]})
        if kind == "tensor":
            return _decode_tensor(content, *more)
        if kind == "generator":
            generator = importlib.import_module("torch").Generator()
            generator.set_state(self._decode(content, None))
            if generators is not None:
                generators.append(generator)
            return generator
        if kind == "function":
            return RemoteFunction(self, _index(content))
        if kind == "yours":
            return self.functions[_index(content)]
        if kind == "opaque":
            return Opaque(str(content)[:100])
        raise Broken("an answer that is not plain data")


@dataclasses.dataclass(frozen=True)
class RemoteFunction:
    """A function of the other process."""

    peer: Peer
    number: int

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.peer.call(self.number, arguments, named)


def _index(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise Broken("an answer that is not plain data")
    return number


def _text(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except Exception:
        return ""


def _as_error(content: Any) -> Exception:
    if not (isinstance(content, list) and len(content) == 2 and all(isinstance(part, str) for part in content)):
        return Broken("an answer that is not plain data")
    name, text = content
    kinds = {kind.__name__: kind for kind in (NotImplementedError, AssertionError, NotDefined)}
    return kinds[name](text) if name in kinds else Raised(f"{name[:100]}: {text}")


def _record_of(module: str, name: str, fields: dict[str, Any]) -> Any:
    if name in RECORDS.get(module, ()):
        return getattr(importlib.import_module(module), name)(**fields)
    return collections.namedtuple(name, fields)(**fields)  # noqa: PYI024 - of a type that only the other side knows


def _encode_tensor(tensor: Any) -> list[Any]:
    torch = sys.modules["torch"]
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return ["tensor", str(tensor.dtype).removeprefix("torch."), list(tensor.shape), base64.b64encode(raw).decode()]


def _decode_tensor(dtype: str, shape: list[int], content: str) -> Any:
    torch = importlib.import_module("torch")
    if dtype not in DTYPES:
        raise Broken(f"a tensor of {dtype}")
    raw = bytearray(base64.b64decode(content))
    empty = torch.empty([_index(size) for size in shape], dtype=getattr(torch, dtype), device="meta")
    if len(raw) != empty.numel() * empty.element_size():
        raise Broken("an answer that is not plain data")
    if not raw:
        return torch.empty(empty.shape, dtype=empty.dtype)
    return torch.frombuffer(raw, dtype=empty.dtype).reshape(empty.shape)
