"""The order of every schedule equals that of torch's own."""

import pytest
from schedule_sizes import takes
from torch.distributed.pipelining import schedules as torch_schedules

from minids.parallel.dualpipe import dualpipev
from minids.parallel.one_f_one_b import gpipe, interleaved_one_f_one_b, one_f_one_b
from minids.parallel.schedule import Pair
from minids.parallel.zero_bubble import zb1p, zbv

# (ranks, micro-batches): smallest, odd, barely enough for the V of zbv, more than enough.
SIZES = [(1, 1), (1, 4), (2, 1), (2, 4), (3, 5), (4, 4), (4, 8), (4, 9), (5, 14), (8, 16), (8, 20)]


def of_torch(cls, ranks, micro_batches, stages_per_rank=1):
    """The order that a schedule of torch has computed for each rank, made without its processes."""
    order = []
    for rank in range(ranks):
        schedule = object.__new__(cls)
        schedule.pp_group_size, schedule.n_local_stages = ranks, stages_per_rank
        schedule.num_stages = schedule._num_stages = ranks * stages_per_rank
        schedule._n_microbatches = micro_batches
        schedule.microbatches_per_round = micro_batches // max(1, micro_batches // ranks)
        if issubclass(cls, torch_schedules.PipelineScheduleSingle):
            actions = schedule._get_pipeline_order()[rank]
        else:
            actions = schedule._calculate_single_rank_operations(rank)
        actions = [action for action in actions if action and action.is_compute_op]
        if cls is torch_schedules.Schedule1F1B and rank == ranks - 1:  # torch lists its forwards as 1, 2, ... here
            actions = [a._replace(microbatch_index=a.microbatch_index - (a.computation_type == "F")) for a in actions]
        order.append(actions)
    return order


def to_torch(schedule):
    def convert(action):
        if isinstance(action, Pair):
            both = (convert(action.forward), convert(action.backward))
            return torch_schedules._Action(-1, torch_schedules.OVERLAP_F_B, None, both)
        kind = torch_schedules._ComputationType(action.kind)
        return torch_schedules._Action(action.stage, kind, action.micro_batch)

    return [[convert(action) for action in actions] for actions in schedule.actions]


TORCH = {
    gpipe: (torch_schedules.ScheduleGPipe, 1),
    one_f_one_b: (torch_schedules.Schedule1F1B, 1),
    interleaved_one_f_one_b: (torch_schedules.ScheduleInterleaved1F1B, 2),
    zb1p: (torch_schedules.ScheduleInterleavedZeroBubble, 1),
    zbv: (torch_schedules.ScheduleZBVZeroBubble, 2),
    dualpipev: (torch_schedules.ScheduleDualPipeV, 2),
}


@pytest.mark.parametrize(
    "make, ranks, micro_batches",
    [(make, *size) for make in TORCH for size in SIZES
     if takes(make, *size) and (make is not one_f_one_b or size[1] >= size[0])],  # torch's 1F1B refuses fewer
)  # fmt: skip
def test_order_equals_torch(make, ranks, micro_batches):
    cls, stages_per_rank = TORCH[make]
    assert to_torch(make(ranks, micro_batches)) == of_torch(cls, ranks, micro_batches, stages_per_rank)


@pytest.mark.parametrize("stages_per_rank", [1, 3, 4])
@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 4), (4, 10), (3, 2)])
def test_interleaved_order_equals_torch_for_other_numbers_of_stages(ranks, micro_batches, stages_per_rank):
    ours = interleaved_one_f_one_b(ranks, micro_batches, stages_per_rank)
    cls = torch_schedules.ScheduleInterleaved1F1B
    assert to_torch(ours) == of_torch(cls, ranks, micro_batches, stages_per_rank)


@pytest.mark.parametrize("make", TORCH)
def test_torch_can_put_sends_and_receives_between_the_actions(make):
    """What torch's pipeline runtime does first with a schedule that it is given; it knows one route only."""
    schedule = make(4, 8)
    rank_of = {stop.stage: stop.rank for stop in schedule.routes[0]}
    orders = dict(enumerate(to_torch(schedule)))
    sent = torch_schedules._add_send_recv({r: list(o) for r, o in orders.items()}, rank_of.get, schedule.stages)
    assert {rank: [a for a in order if a.is_compute_op] for rank, order in sent.items()} == orders
