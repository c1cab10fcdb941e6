"""The process inside the sandbox: isolate itself, load one program, and evaluate calls to it.

`minids.sandbox.judge` starts this file as a process of its own (`python -I -S -c LOADER CODE SETUP`) and communicates
over its standard input, a socket: one line per request, one line per answer. A request is Python source from the judge
(the text of the program, then calls with literal arguments); an answer is JSON. Expected results are never sent, so a
program that takes over this process can only choose its answers.

Only modules that load quickly are imported: `json` alone would double the start-up time.
"""

import ctypes
import os
import resource
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL, FILTER = 9, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
READ_FILE_OR_FOLDER = 1 << 2 | 1 << 3


def main(rlimits: dict[str, int], readable: list[str], seccomp: bytes) -> None:
    """Apply the isolation layers of the setup, confirm them, then serve until the judge closes the socket.

    `rlimits` maps names such as RLIMIT_AS to values; `readable` lists the only files and folders that Landlock allows
    to read (none: no Landlock); `seccomp` is a compiled filter (empty: none). Raises `OSError` if a layer fails.
    """
    channel = os.dup(0)
    os.dup2(1, 0)  # 1 is /dev/null
    os.environ.clear()
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, SIGKILL)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if readable:
        landlock(readable)
    for name, value in rlimits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.dup2(1, 2)
    os.closerange(channel + 1, 256)
    if seccomp:
        code = ctypes.create_string_buffer(seccomp)
        program = struct.pack("HP", len(seccomp) // 8, ctypes.addressof(code))
        prctl(PR_SET_SECCOMP, FILTER, ctypes.create_string_buffer(program))
    serve(channel)


def serve(channel: int) -> None:
    """Answer `["ok", value]` or `["error", text]`: once for the isolation, once for the program, once per call."""
    os.write(channel, b'["ok",null]\n')
    namespace = {"__name__": "program"}
    run = exec
    for line in open(channel, "rb", closefd=False):
        try:
            answer = '["ok",' + encode(run(eval(line), namespace)) + "]"
        except BaseException as error:  # a program may also raise SystemExit or KeyboardInterrupt
            answer = '["error",' + encode(f"{type(error).__name__}: {error}"[:200]) + "]"
        answer = answer.encode() + b"\n"
        while answer:
            answer = answer[os.write(channel, answer) :]
        run = eval


def encode(value: object) -> str:
    """Encode plain data as JSON; a type that JSON lacks becomes an object of one field, named after the type.

    Raises `TypeError` for any other type.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text := float.__repr__(value), text)
    if isinstance(value, str):
        return '{"str":"' + value.encode("utf-8", "surrogatepass").hex() + '"}'
    if isinstance(value, dict):
        return '{"dict":' + encode([list(item) for item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encode, value)) + "]"
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return f'{{"{kind.__name__}":' + encode(list(value)) + "}"
    raise TypeError(f"{type(value).__name__} is not plain data")


def landlock(readable: list[str]) -> None:
    """Forbid all files except reading `readable`; also TCP, abstract sockets and signals where the kernel can."""
    version = syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 3:
        raise OSError("this kernel's Landlock (before Linux 6.2) cannot forbid the truncation of files")
    files = (1 << {3: 15, 4: 15}.get(version, 16)) - 1
    handled = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = syscall(LANDLOCK_CREATE, ctypes.create_string_buffer(handled, 24), 24, 0)
    for path in filter(os.path.exists, readable):
        rights = READ_FILE_OR_FOLDER if os.path.isdir(path) else 1 << 2
        rule = struct.pack("=Qi", rights, os.open(path, os.O_PATH))
        syscall(LANDLOCK_ADD, ruleset, 1, ctypes.create_string_buffer(rule, 12), 0)
    syscall(LANDLOCK_RESTRICT, ruleset, 0)


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


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    main(**eval(sys.argv[2]))
