"""What a text's own statistics reach: the size that xz compresses it to, and the bits per byte of byte n-grams."""

import lzma

import numpy as np


def xz_bytes(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))


def ngram_bits(training: bytes, held_out: bytes, order: int) -> float:
    """Bits per byte of a byte n-gram, interpolated with all shorter ones by Witten and Bell's rule."""
    seen, asked = (np.frombuffer(text, np.uint8).astype(np.int64) for text in (training, held_out))
    chance = np.full(len(asked), 1 / 256)
    grams, wanted = np.zeros_like(seen), np.zeros_like(asked)
    for n in range(order):
        grams[n:] += seen[: len(seen) - n] << 8 * n
        wanted[n:] += asked[: len(asked) - n] << 8 * n
        kinds, counts = np.unique(grams[n:], return_counts=True)
        contexts, starts = np.unique(kinds >> 8, return_index=True)
        total = np.add.reduceat(counts, starts)
        followers = np.diff(starts, append=len(kinds))
        times, known = looked_up(wanted, kinds, counts), looked_up(wanted >> 8, contexts, total)
        distinct = looked_up(wanted >> 8, contexts, followers)
        chance = np.where(known > 0, (times + distinct * chance) / np.maximum(known + distinct, 1), chance)
    return float(-np.log2(chance).mean())


def looked_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none; `keys` is sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
