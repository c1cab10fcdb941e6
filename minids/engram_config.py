"""Configuration of the hashed n-gram memory (Engram), with the sizes of its tables; imports no torch."""

import functools
import itertools
import math
from dataclasses import dataclass

from minids.validation import check_fields, require


@dataclass(frozen=True)
class EngramConfig:
    """Hashed n-gram memory in some layers (Engram, arXiv 2601.07372; `minids.model.engram`). minids only.

    The defaults are those of DeepSeek's demonstration code.
    """

    layers: tuple[int, ...] = (1, 15)
    """Layers that read the memory before their attention, counted from 0; each has tables of its own."""
    rows: int = 646400
    """Least number of rows of a table; the tables have prime numbers of rows from this on, all different."""
    max_ngram: int = 3
    """Longest n-gram, in tokens; each length from 2 on has its own tables."""
    heads: int = 8
    """Tables, and so hashes, per length of n-gram; two n-grams that collide in one differ in the others."""
    dim: int = 512
    """Width of what is read per length of n-gram, from all its tables together, in channels."""
    pad_token: int = 2
    """Token id that stands in an n-gram before the first token of a sequence."""
    bos_token: int | None = None
    """Token id that starts a document, across which no n-gram reaches; None for no such limit."""
    seed: int = 0
    """Seed of the multipliers of the hash, which also depend on the layer."""

    def __post_init__(self):
        check_fields(self, may_be_zero=("pad_token", "bos_token", "seed"))
        whole = isinstance(self.layers, tuple) and all(type(i) is int and i >= 0 for i in self.layers)
        ascending = whole and 0 < len(self.layers) and sorted(set(self.layers)) == list(self.layers)
        require(ascending, "layers", self.layers, "must be layer numbers in ascending order, at least one")
        require(self.max_ngram >= 2, "max_ngram", self.max_ngram, "must be at least 2")
        require(self.dim % self.heads == 0, "dim", self.dim, f"must be a multiple of heads={self.heads}")

    def table_rows(self) -> dict[int, list[list[int]]]:
        """Return the rows of every table, by layer, then by length of n-gram (2, 3, ...), then by head."""
        return _prime_tables(self.layers, self.max_ngram - 1, self.heads, self.rows)


@functools.lru_cache(maxsize=8)
def _prime_tables(layers: tuple[int, ...], orders: int, heads: int, least: int) -> dict[int, list[list[int]]]:
    """Return different primes per layer, length of n-gram and head; each length takes the next free ones from `least`.

    As in DeepSeek's demonstration code, so that no two tables of the model have the same size.
    """
    taken: set[int] = set()

    def free_prime(start: int) -> int:
        prime = next(n for n in itertools.count(max(start, 2)) if n not in taken and _is_prime(n))
        taken.add(prime)
        return prime

    tables: dict[int, list[list[int]]] = {layer: [] for layer in layers}
    for of_layer in tables.values():
        for _ in range(orders):
            of_length: list[int] = []
            for _ in range(heads):
                of_length.append(free_prime(of_length[-1] + 1 if of_length else least))
            of_layer.append(of_length)
    return tables


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
