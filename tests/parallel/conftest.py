from contextlib import ExitStack

import pytest

from minids.parallel.launch import one_of_many


@pytest.fixture
def seat():
    """Take the place of one rank among many, with no other process there."""
    with ExitStack() as taken:

        def sit(rank, ranks):
            taken.close()
            taken.enter_context(one_of_many(rank, ranks))

        yield sit
