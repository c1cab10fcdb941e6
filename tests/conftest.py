"""Every test runs with shapes checked: jaxtyping reads the annotations of minids, beartype enforces them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

ROOMS = ("model", "data", "training", "inference", "interop", "reasoning")  # config checks its fields in its own words
install_import_hook([f"minids.{room}" for room in ROOMS], "shapes.check")


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and one thread, whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
