"""Which isolations this machine has, and a check that no process is left."""

import ctypes
import sys

import pytest
from judging import PATIENT, descendants, gone_within

from minids.sandbox import judge as module
from minids.sandbox.judge import LINUX, IsolationUnavailable, SandboxProcess


@pytest.fixture(scope="module", params=LINUX, ids=lambda isolation: isolation[0])
def isolation(request):
    try:
        SandboxProcess(request.param, PATIENT).close()
    except IsolationUnavailable as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.fixture(scope="module")
def some_isolation():
    """Any available set: a forgery against a judge outside does not depend on the layers."""
    return module.find_isolation()


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    """After all of it no process is left. Orphans come to this process, so that none can hide."""
    if sys.platform != "linux":
        yield
        return
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    before = descendants()
    yield
    assert gone_within(10, lambda: descendants() - before), descendants() - before
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
