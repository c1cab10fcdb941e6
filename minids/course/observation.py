"""Call an answer once, and record what a check has to know: result, changed arguments, gradients, functions of torch.

torch is imported only where it is needed: many exercises do without.
"""

import copy
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Observation(NamedTuple):
    """One call of an answer."""

    result: Any
    arguments: tuple  # as they are after the call
    gradients: tuple = ()  # of the sum of the result, with respect to the chosen arguments
    functions: tuple[str, ...] = ()  # names of torch's functions that were called
    largest: int = 0  # elements of the largest tensor that one of them returned


def observe(
    answer: Callable[..., Any], arguments: Sequence[Any], differentiate: Sequence[int] = (), watch: bool = False
) -> Observation:
    """Call `answer` with copies of the arguments.

    `differentiate` numbers the arguments (tensors, or lists of tensors) by which the sum of the result is
    differentiated; `watch` records torch's functions and the largest tensor. Raises whatever the answer raises.
    """
    given = [copy.deepcopy(argument) for argument in arguments]
    inputs = [_tensors(given[number]) for number in differentiate]
    watcher = _watcher() if watch else None
    with watcher or nullcontext():
        result = answer(*given)
    gradients: tuple = ()
    if inputs:
        found = iter(_gradients(result, [each for group in inputs for each in group]))
        parts = [[next(found) for _ in group] for group in inputs]
        gradients = tuple(
            part if isinstance(given[number], list) else part[0]
            for number, part in zip(differentiate, parts, strict=True)
        )
    names, largest = (tuple(sorted(watcher.names)), watcher.largest) if watcher is not None else ((), 0)
    return Observation(result, tuple(given), gradients, names, largest)


def _tensors(argument: Any) -> "list[Tensor]":
    """Return the tensors of an argument, one or a list of them, which record their gradients from now on."""
    return [each.requires_grad_() for each in (argument if isinstance(argument, list) else [argument])]


def place(error: BaseException) -> str:
    """Name the line of the learner's code in which an error arose; "" where it is not known."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "ipykernel" in frame.filename or frame.filename.startswith("<")]
    return f" (your line {own[-1].lineno}: {own[-1].line})" if own and own[-1].line else ""


def _gradients(result: Any, inputs: "list[Tensor]") -> "tuple[Tensor, ...]":
    """Differentiate the sum of the result; a gradient that does not flow is zero."""
    import torch

    if not isinstance(result, torch.Tensor) or not result.requires_grad:
        return tuple(torch.zeros_like(each) for each in inputs)
    found = torch.autograd.grad(result.sum(), inputs, allow_unused=True)
    return tuple(torch.zeros_like(each) if g is None else g for g, each in zip(found, inputs, strict=True))


def _watcher() -> Any:
    """Return a context that records the functions of torch that are called in it."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class Watcher(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()
            self.largest = 0

        def __torch_function__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            self.names.add(getattr(function, "__name__", ""))
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, Tensor):  # the storage: an expanded view takes no memory
                    self.largest = max(self.largest, each.untyped_storage().nbytes() // each.element_size())
            return result

    return Watcher()
