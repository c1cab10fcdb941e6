"""Isolation layers that a process applies to itself, before it runs code that nobody has read.

Only modules that load quickly are imported: this file runs at the start of every isolated process.
"""

import ctypes
import os
import resource
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL, FILTER = 9, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = (
    2,
    4,
    8,
    16,
    32,
    128,
    256,
    1 << 14,
)
ALL = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | TRUNCATE


def confine(
    rlimits: dict[str, int], readable: list[str], listable: list[str], writable: list[str], seccomp: bytes
) -> int:
    """Apply the layers to this process; return the file descriptor of its channel, which was standard input.

    `rlimits` maps names such as RLIMIT_AS to values. With `readable` (files, folders with all that they contain) only
    these can be read, the names in `listable` folders can be read too, and `writable` folders can be written: Landlock;
    without, there is no Landlock. `seccomp` is a compiled filter (empty: none). Standard output and error have to be
    /dev/null or are closed. Raises `OSError` if a layer fails.
    """
    channel = os.dup(0)
    os.dup2(1, 0)  # 1 is /dev/null
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, SIGKILL)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if readable:
        landlock([(path, READ_FILE | READ_DIR) for path in readable]
                 + [(path, READ_DIR) for path in listable] + [(path, ALL) for path in writable])  # fmt: skip
    for name, value in rlimits.items():
        _, most = resource.getrlimit(getattr(resource, name))  # of the user, which cannot be raised
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(getattr(resource, name), (value, value))
    os.dup2(1, 2)
    os.closerange(channel + 1, 256)
    if seccomp:
        code = ctypes.create_string_buffer(seccomp)
        program = struct.pack("HP", len(seccomp) // 8, ctypes.addressof(code))
        prctl(PR_SET_SECCOMP, FILTER, ctypes.create_string_buffer(program))
    return channel


def landlock(allowed: list[tuple[str, int]]) -> None:
    """Forbid all access to files but what is `allowed`; also TCP, abstract sockets and signals where the kernel can."""
    version = syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 3:
        raise OSError("this kernel's Landlock (before Linux 6.2) cannot forbid the truncation of files")
    files = (1 << {3: 15, 4: 15}.get(version, 16)) - 1
    handled = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = syscall(LANDLOCK_CREATE, ctypes.create_string_buffer(handled, 24), 24, 0)
    for path, rights in allowed:
        if os.path.exists(path):
            rights &= -1 if os.path.isdir(path) else WRITE_FILE | READ_FILE | TRUNCATE
            rule = struct.pack("=Qi", rights, os.open(path, os.O_PATH | os.O_CLOEXEC))
            syscall(LANDLOCK_ADD, ruleset, 1, ctypes.create_string_buffer(rule, 12), 0)
            os.close(struct.unpack("=Qi", rule)[1])
    syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def syscall(number: int, *arguments: object) -> int:
    return checked(libc.syscall(ctypes.c_long(number), *map(wide, arguments)))


def prctl(option: int, *arguments: object) -> None:
    checked(libc.prctl(option, *map(wide, [*arguments, 0, 0, 0][:4])))


def wide(value: object) -> object:
    """Convert an int to a C long: a variadic C function reads whole registers, of which an int sets only half."""
    return ctypes.c_long(value) if isinstance(value, int) else value


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


libc = ctypes.CDLL(None, use_errno=True)
