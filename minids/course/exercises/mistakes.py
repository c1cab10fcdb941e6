"""Known mistakes that are changed keyword arguments of a reference: each alone, and two at once."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import Any

Changes = Mapping[str, Mapping[str, Any]]  # of each mistake, the keywords with which the reference makes it


def variants(reference: Callable[..., Any], changes: Changes) -> dict[str, Callable[..., Any]]:
    """Map each mistake to the reference with its keywords, and "one and another" to that with the keywords of both.

    Two mistakes that name the same keyword exclude each other, also where one of them names its default.
    """
    alone: dict[str, Callable[..., Any]] = {words: partial(reference, **change) for words, change in changes.items()}
    together: dict[str, Callable[..., Any]] = {
        f"{one} and {other}": partial(reference, **first, **second)
        for (one, first), (other, second) in combinations(changes.items(), 2)
        if not first.keys() & second.keys()
    }
    return alone | together
