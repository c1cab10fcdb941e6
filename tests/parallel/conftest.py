import pytest
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def seat():
    """Take the place of one rank among many, with no other process there.

    Afterwards torch forgets how it sharded: its cache holds the mesh as seen from this seat, takes an equal one for it,
    and is inherited by the forks of later tests, whose ranks would then all write this seat's shard.
    """

    def sit(rank, ranks):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield sit
    if dist.is_initialized():
        dist.destroy_process_group()
    _clear_sharding_prop_cache()
