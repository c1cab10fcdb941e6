"""Validation of settings: one-line `ValueError`s that name the field, its value and the rule."""

import dataclasses
import math
import sys
from collections.abc import Container
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

Fraction = Annotated[float, "above 0 and at most 1"]

_NUMBERS = {int: "a whole number, at least 1", float: "a finite number above 0", Fraction: "above 0 and at most 1"}
_LARGEST = {int: 2**63 - 1, float: sys.float_info.max, Fraction: 1}


def require(holds: bool, field: str, value: Any, rule: str) -> None:
    """Raise `ValueError` naming `field`, `value` and `rule` unless the rule holds."""
    if not holds:
        raise ValueError(f"{field}={value!r}: {rule}")


def check_value(name: str, value: Any, kind: Any, may_be_zero: bool = False) -> None:
    """Raise `ValueError` unless `value` is of the annotated `kind`.

    Numbers must be finite and above 0 (or 0 with `may_be_zero`), an `int` also whole and below 2^63, a `Fraction` also
    at most 1; a `Literal` must be one of its values; a `kind | None` may be None.
    """
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        require(value in parts, name, value, f"must be one of {', '.join(map(str, parts))}")
    elif NoneType in parts:
        if value is not None:
            check_value(name, value, parts[0], may_be_zero)
    elif kind in _NUMBERS:
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        rule = f"must be {_NUMBERS[kind]}{', or 0' if may_be_zero else ''}"
        require(number and (0 < value < math.inf or may_be_zero and value == 0), name, value, rule)
        require(value <= _LARGEST[kind], name, value, rule if kind is Fraction else f"must be at most {_LARGEST[kind]}")
    elif isinstance(kind, type):
        require(isinstance(value, kind), name, value, f"must be a {kind.__name__}")


def check_fields(config: Any, may_be_zero: Container[str] = ()) -> None:
    """Apply `check_value` to every field of a dataclass."""
    for field in dataclasses.fields(config):
        check_value(field.name, getattr(config, field.name), field.type, field.name in may_be_zero)
