"""Compile allowlists of system calls, with the system's libseccomp.

libseccomp (Linux, installed with nearly every distribution) knows the numbers of the system calls of each architecture
and the format of the kernel's filters; this file is the few of its functions that minids needs.
"""

import ctypes
import errno
import functools
import os
import tempfile

from minids.sandbox.errors import IsolationUnavailable

ALLOW, ERROR = 0x7FFF0000, 0x00050000  # of seccomp.h: SCMP_ACT_ALLOW, SCMP_ACT_ERRNO
EQUAL, MASKED_EQUAL = 4, 7
CLONE_THREAD = 0x10000

COMPUTING = """
    read write lseek pread64 close dup fstat stat lstat newfstatat statx access faccessat faccessat2 readlink
    readlinkat getcwd getdents64 open openat mkdir mkdirat unlink unlinkat rmdir rename renameat renameat2 ftruncate
    brk mmap munmap mremap mprotect madvise futex rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    sched_yield clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrandom uname
    getpid getppid gettid getuid geteuid getgid getegid exit exit_group
"""
THREADS = """
    set_robust_list rseq sched_getaffinity sched_setaffinity set_tid_address setitimer getitimer pwrite64 readv writev
    chdir pipe2 poll select pselect6 eventfd2 epoll_create1 epoll_ctl epoll_wait epoll_pwait fsync fdatasync sysinfo
"""


class Comparison(ctypes.Structure):
    """scmp_arg_cmp: a condition on one argument of a system call."""

    _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


@functools.cache
def seccomp_filter(threads: bool = False) -> bytes:
    """Return a compiled filter that allows `COMPUTING`, with `threads` also `THREADS` and new threads, no processes.

    Every other system call fails with EPERM. Raises `IsolationUnavailable` where libseccomp is not installed.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError as error:
        raise IsolationUnavailable(f"seccomp: {error}") from None
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ERROR | errno.EPERM)))

    def add(action: int, name: str, *conditions: Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # newer architectures lack the oldest calls, such as open
            given = (Comparison * len(conditions))(*conditions)
            result = library.seccomp_rule_add_array(rules, ctypes.c_uint32(action), number, len(conditions), given)
            if result < 0:
                raise IsolationUnavailable(f"seccomp: {name}: {os.strerror(-result)}")

    for name in (COMPUTING + (THREADS if threads else "")).split():
        add(ALLOW, name)
    for operation in (0, 1, 2, 3, 1030):  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETOWN sends signals
        add(ALLOW, "fcntl", Comparison(1, EQUAL, operation, 0))
    if threads:
        add(ALLOW, "clone", Comparison(0, MASKED_EQUAL, CLONE_THREAD, CLONE_THREAD))
        add(ERROR | errno.ENOSYS, "clone3")  # its flags are out of a filter's sight; libc then takes clone
    with tempfile.TemporaryFile() as file:
        library.seccomp_export_bpf(rules, file.fileno())
        library.seccomp_release(rules)
        file.seek(0)
        return file.read()
