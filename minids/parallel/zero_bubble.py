"""Zero-bubble schedules, which split a backward into its input and weight halves: ZB1P and ZB-V."""

from minids.config import require
from minids.parallel.programs import build, check_size, in_turn, looped, v_shaped
from minids.parallel.schedule import Schedule


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P (ZB-H1 in the zero-bubble paper): 1F1B with split backwards; rank r delays its W by r micro-batches.

    The W that remain at the end fill the bubble there.
    """
    check_size(ranks, micro_batches)

    def program(rank: int) -> list[str]:
        late = min(rank, micro_batches)
        backwards = late * ["I0"] + (micro_batches - late) * ["I0 W"]
        return in_turn(micro_batches * ["F0"], backwards, ahead=ranks - 1 - rank) + late * ["W"]

    return build("zb1p", micro_batches, looped(ranks), ranks, program)


def zbv(ranks: int, micro_batches: int) -> Schedule:
    """ZB-V: two stages per rank along a V, split backwards; no bubble between actions where F = I = W."""
    check_size(ranks, micro_batches)
    least = 2 * ranks - 1
    require(micro_batches >= least, "micro_batches", micro_batches, f"must be at least 2 * ranks - 1 = {least}")

    def program(rank: int) -> list[str]:
        return (
            (2 * (ranks - rank) - 1) * ["F0"]
            + rank * ["F1 F0"]
            + (ranks - rank) * ["F1 I1 W1"]
            + (micro_batches - least + rank) * ["F0 I0 W0 F1 I1 W1"]
            + (ranks - rank - 1) * ["I0 W0 F1 I1 W1"]
            + rank * ["I0 I1"]
            + (ranks - rank) * ["I0 W0"]
            + rank * ["W1"]
            + rank * ["W0"]
        )

    return build("zbv", micro_batches, v_shaped(ranks), 2 * ranks, program)
