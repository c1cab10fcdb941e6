"""Freed memory stays with the process, for the next step of training.

By default the C library returns a large block to the system as soon as it is freed. A training step frees and allocates
the same hundreds of megabytes, and each time the kernel has to clear them anew: with 256 experts a step took 1.7 times
as long as with 8 of the same size, and 1.5 times without the returning (`minids bench experts`). glibc only.
"""

import ctypes
import os
import platform
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of mallopt's settings (malloc.h)


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Have malloc keep what is freed; return whether it does. A user's own settings of malloc in `environment` hold."""
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment)
    if own or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
