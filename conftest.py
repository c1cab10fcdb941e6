"""Set-up of the notebooks' tests, from wherever pytest is started: `pytest --nbval chapters/01_baseline.ipynb`.

It imports nothing of minids: the unit tests have to put their shape checks in place first (tests/conftest.py).
"""

import os
import re
import sys
from pathlib import Path

import nbval.kernel
import pytest

ROOT = Path(__file__).parent
EXPECTED_SKIPS = re.compile(
    "GPU|could not import 'triton'|pytest -m browser_all|forbids it to everybody|bubblewrap: |python3 course.py site"
)
EVERY_SKIP_COUNTS = "CI" in os.environ and sys.platform == "linux"  # elsewhere a learner may lack a Chromium, a sandbox


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "nbval_sanitize_with", "") is None:  # nbval would look for the file where it is started
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # the kernels inherit all three
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONSTARTUP"] = str(ROOT / "tests" / "kernel_startup.py")


def start_new_kernel(*arguments, once=nbval.kernel.start_new_kernel, **options):
    """Start a notebook's kernel, twice if need be.

    A kernel's ports are chosen before it binds them; where two workers choose the same one, a kernel never answers.
    """
    try:
        return once(*arguments, **options)
    except RuntimeError:
        return once(*arguments, **options)


nbval.kernel.start_new_kernel = start_new_kernel


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    return fail_if_skipped_unexpectedly((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return fail_if_skipped_unexpectedly((yield))


def fail_if_skipped_unexpectedly(report: pytest.CollectReport | pytest.TestReport):
    """In continuous integration a test that is skipped for another reason than a missing GPU proves nothing: fail."""
    if EVERY_SKIP_COUNTS and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        if not EXPECTED_SKIPS.search(reason):
            report.outcome, report.longrepr = "failed", f"unexpected skip: {reason}"
    return report
