"""Every test runs with shapes checked: jaxtyping reads the annotations of minids, beartype enforces them."""

import logging
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

ROOMS = ("model", "fp8", "data", "training", "inference", "interop", "reasoning")
# not config, which checks its fields in its own words
install_import_hook([f"minids.{room}" for room in ROOMS], "shapes.check")


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and one thread, whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("minids") and isinstance(logger, logging.Logger):
            logger.disabled = False  # a library that configures logging may disable those that exist


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal():
    """A shell that starts the tests with `&`, and nohup, have all processes ignore signals that some tests send."""
    usual = {signal.SIGINT: signal.default_int_handler}
    if hasattr(signal, "SIGHUP"):
        usual[signal.SIGHUP] = signal.SIG_DFL
    ignored = [number for number in usual if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


TESTS = Path(__file__).parent
SLOW = (
    "browser/",
    "course/test_expert_moves.py",
    "course/test_grade.py",
    "course/test_labelled_figures.py",
    "course/test_real_run.py",
    "course/test_turns.py",
    "e2e/",
    "inference/test_compiled.py",
    "inference/test_decoding_benchmarks.py",
    "inference/test_speculative.py",
    "parallel/test_after_v3.py",
    "parallel/test_estimate.py",
    "parallel/test_expert_parallel",
    "parallel/test_layout.py",
    "parallel/test_pipeline",
    "parallel/test_trainer.py",
    "reasoning/test_r1",
    "sandbox/",
    "test_documented_commands.py",
    "test_gpu_benchmark.py",
    "test_own_checkpoint.py",
    "test_types.py",
    "training/test_after_v3_benchmarks.py",
    "training/test_indexer_training.py",
)
"""Tests that start processes or train for longer: `pytest -m "not slow"` leaves them out."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).as_posix().startswith(SLOW):
            item.add_marker("slow")
