"""torch's threads sleep while they wait, and are no more than a container may run; the user's own settings hold."""

import os
import subprocess
import sys

import pytest

from minids import threads
from minids.course.notebooks import environment


@pytest.fixture
def four_processors(monkeypatch):
    monkeypatch.setattr(threads, "_processors", lambda: 4)


@pytest.mark.parametrize(
    "quota, added",
    [(None, None), (2.5, "2"), (0.5, "1"), (4.0, None), (8.0, None)],
)
def test_threads_are_as_many_as_the_quota_allows(four_processors, monkeypatch, quota, added):
    monkeypatch.setattr(threads, "processor_quota", lambda: quota)
    expected = {"OMP_WAIT_POLICY": "passive"} | ({"OMP_NUM_THREADS": added} if added else {})
    assert threads.openmp_settings({}) == expected


def test_what_the_user_has_set_is_kept(four_processors, monkeypatch):
    monkeypatch.setattr(threads, "processor_quota", lambda: 2.0)
    assert threads.openmp_settings({"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "3"}) == {}


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "odd\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_is_that_of_the_container(tmp_path, files, quota):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads.processor_quota(tmp_path) == quota


def test_the_variable_is_set_before_torch_loads():
    """The command line's own process: what it starts inherits the variable, torchrun's ranks among it."""
    code = (
        "import os, sys; from minids.cli import main as m; m.run = lambda _: print(os.environ['OMP_WAIT_POLICY'], "
        "'torch' in sys.modules); m.main()"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    for setting, printed in (({}, "passive False"), ({"OMP_WAIT_POLICY": "active"}, "active False")):
        run = subprocess.run([sys.executable, "-c", code], env=clean | setting, capture_output=True, text=True)
        assert run.stdout.strip() == printed, run.stderr


def test_kernels_of_notebooks_have_it_too(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert environment()["OMP_WAIT_POLICY"] == "passive"
