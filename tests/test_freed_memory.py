"""Freed memory stays with the process: a block allocated again causes no page faults."""

import platform
import subprocess
import sys

import pytest

from minids.freed_memory import keep_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")

FAULTS = """
import resource
import torch
from minids.freed_memory import keep_freed_memory

kept = keep_freed_memory({!r})
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(2**23).fill_(1) for _ in range(3)]  # 32 MiB each
    del blocks
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(environment: dict[str, str]) -> tuple[bool, int]:
    """Whether memory is kept, and how many pages the system had to provide again in ten steps."""
    words = subprocess.check_output([sys.executable, "-c", FAULTS.format(environment)], text=True).split()
    return words[0] == "True", int(words[1])


def test_memory_that_is_kept_is_not_provided_again():
    kept, again = faults({})
    _, usual = faults({"MALLOC_ARENA_MAX": "2"})
    assert kept and again < usual / 100


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_own_settings_hold(name):
    assert keep_freed_memory({name: "1"}) is False
