"""The computations, sends and receives of every rank."""

import re
from collections import defaultdict

import pytest

from minids.parallel.dualpipe import dualpipe
from minids.parallel.one_f_one_b import gpipe
from minids.parallel.pipeline import program
from minids.parallel.schedules import SCHEDULES
from minids.parallel.zero_bubble import zb1p


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 8), (6, 14)])
def test_two_ranks_list_their_messages_in_the_same_order(name, ranks, micro_batches):
    programs = program(SCHEDULES[name](ranks, micro_batches))
    home = {}  # the rank that computes a stage of torch's numbering
    for rank, cells in enumerate(programs):
        home |= {int(number): rank for cell in cells for number in re.findall(r"(\d+)F\d", cell)}
    talk = defaultdict(list)
    for rank, cells in enumerate(programs):
        for cell in cells:
            if message := re.fullmatch(r"(\d+)(SEND|RECV)_([FB])(\d+)", cell):
                number, way, kind, micro_batch = message.groups()
                forward = (kind == "F") == (way == "SEND")
                other = int(number) + (1 if forward else -1)
                edge = (int(number), other) if way == "SEND" else (other, int(number))
                talk[rank, home[other]].append((edge, kind, micro_batch))
    assert all(talk[a, b] == talk[b, a] for a, b in list(talk))
    assert all(a != b and len(set(said)) == len(said) for (a, b), said in talk.items())


def test_a_program_can_be_read():
    assert program(gpipe(2, 1)) == [["0F0", "0SEND_F0", "0RECV_B0", "0B0"], ["1RECV_F0", "1F0", "1B0", "1SEND_B0"]]
    assert program(zb1p(1, 1)) == [["0F0", "0I0", "0W0"]]
    assert "(4F1;0B0)OVERLAP_F_B" in program(dualpipe(2, 4))[0]
