"""Compare an answer's result with the expected one, and put the first difference into words for a learner."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHOWN = 12  # elements up to which a value is shown whole


class Wrong(Exception):
    """An incorrect answer; the message explains why to the learner."""


def compare(got: Any, wanted: Any, what: str, parts: Sequence[str] = ()) -> None:
    """Raise `Wrong` with the first difference: type, then shape, then dtype, then the first value that differs.

    `what` names the value, `parts` those of a tuple.
    """
    if callable(wanted) and not isinstance(wanted, Tensor):
        return
    if isinstance(wanted, tuple | list):
        _compare_sequences(got, wanted, what, parts)
    elif isinstance(wanted, Tensor):
        _compare_tensors(got, wanted, what)
    elif isinstance(wanted, float):
        if isinstance(got, bool) or not isinstance(got, int | float | Tensor) or torch.as_tensor(got).numel() != 1:
            raise Wrong(f"{what} should be a number, got {describe(got)}")
        if not torch.isclose(torch.as_tensor(got, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)):
            raise Wrong(f"{what}: got {float(got):.6g}, expected {wanted:.6g}")
    elif type(got) is not type(wanted) or got != wanted:
        if isinstance(wanted, int) and isinstance(got, int | float | Tensor) and _equal(got, wanted):
            own = "tensor" if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(
                f"{what}: the value is correct, but return {_article(type(wanted).__name__)}, not {_article(own)}"
            )
        raise Wrong(f"{what}: got {describe(got)}, expected {describe(wanted)}")


def _compare_sequences(got: Any, wanted: tuple | list, what: str, parts: Sequence[str]) -> None:
    if not isinstance(got, tuple | list):
        named = f": {', '.join(parts)}" if parts else ""
        raise Wrong(f"{what} should be {_article(type(wanted).__name__)} of {len(wanted)}{named}; got {describe(got)}")
    if len(got) != len(wanted):
        both = f"got {describe(got)}, expected {describe(wanted)}"
        raise Wrong(f"{what} should have {len(wanted)} parts, not {len(got)}: {both}")
    flat = all(isinstance(each, bool | int | float | str | None) for each in wanted)
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        name = parts[number] if parts else f"{what}[{number}]"
        try:
            compare(one, other, name)
        except Wrong as wrong:
            if flat and not parts and len(wanted) <= SHOWN:
                raise Wrong(f"{wrong}\n  got      {describe(got)}\n  expected {describe(wanted)}") from None
            raise


def _compare_tensors(got: Any, wanted: Tensor, what: str) -> None:
    if not isinstance(got, Tensor):
        raise Wrong(f"{what} should be a tensor, got {describe(got)}")
    if got.shape != wanted.shape:
        raise Wrong(f"{what} should have shape {tuple(wanted.shape)}, got {tuple(got.shape)}")
    if got.dtype != wanted.dtype:
        raise Wrong(f"{what} should be of {wanted.dtype}, got {got.dtype}")
    one, other = (torch.view_as_real(x) if x.is_complex() else x for x in (got.detach(), wanted.detach()))
    off = ~torch.isclose(one.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
    if off.any():
        first = tuple(off.nonzero()[0].tolist())
        values = f"got {one[first].item():.4g}, expected {other[first].item():.4g}"
        count = (
            "" if off.numel() == 1 else f"{int(off.sum())} of {off.numel()} values differ; the first at {list(first)}: "
        )
        whole = f"\n  got      {_values(got)}\n  expected {_values(wanted)}" if 1 < wanted.numel() <= SHOWN else ""
        raise Wrong(f"{what}: {count}{values}{whole}")


def describe(value: Any) -> str:
    """Describe a value briefly: a short list in full, the shape of a tensor, the parts of a tuple."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.dim() else f"a tensor of value {value.item():.6g}"
    if isinstance(value, tuple | list) and any(isinstance(each, Tensor | tuple | list | float) for each in value):
        inside = ", ".join(map(describe, value))
        if len(inside) > 200:
            return f"{_article(type(value).__name__)} of {len(value)}"
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, float):
        return f"{value:.6g}"
    if callable(value):
        return "a function"
    words = repr(value)
    return words if len(words) <= 120 else _article(type(value).__name__)


def _values(tensor: Tensor) -> str:
    return str([round(each, 4) if isinstance(each, float) else each for each in tensor.flatten().tolist()])


def _equal(got: Any, wanted: Any) -> bool:
    try:
        return bool(got == wanted)
    except Exception:
        return False


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
