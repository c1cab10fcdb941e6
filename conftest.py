"""Set-up of the notebooks' tests, from wherever pytest is started: `pytest --nbval chapters/01_baseline.ipynb`.

It imports nothing of minids: the unit tests have to put their shape checks in place first (tests/conftest.py).
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "nbval_sanitize_with", "") is None:  # nbval would look for the file where it is started
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # the kernels inherit all three
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONSTARTUP"] = str(ROOT / "tests" / "labelled_figures.py")
