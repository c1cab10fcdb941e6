import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def seat():
    """Take the place of one rank among many, with no other process there."""

    def sit(rank, ranks):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield sit
    if dist.is_initialized():
        dist.destroy_process_group()
