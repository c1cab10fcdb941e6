"""The sizes that a schedule accepts, stated independently of the package."""

from minids.parallel.dualpipe import dualpipe, dualpipev
from minids.parallel.one_f_one_b import interleaved_one_f_one_b
from minids.parallel.zero_bubble import zbv


def takes(make, ranks, micro_batches):
    """What the methods themselves demand, written down a second time."""
    if make is dualpipe:
        return ranks % 2 == 0 and micro_batches % 2 == 0 and micro_batches >= 2 * ranks
    if make is dualpipev:
        return micro_batches >= 2 * ranks
    if make is zbv:
        return micro_batches >= 2 * ranks - 1
    if make is interleaved_one_f_one_b:
        return micro_batches % max(1, micro_batches // ranks) == 0
    return True
