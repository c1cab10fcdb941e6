"""Isolation layers for code that nobody has read, as command lines: which layers exist, and what each of them permits.

- bubblewrap, where the system has it: namespaces that contain Python and the system's libraries (read-only), a private
  /tmp in memory and /dev/null, and nothing else: no other process, no network, no other file;
- Landlock, where there is no bubblewrap: files outside the same list cannot be opened (their names can be looked up);
- seccomp, with both: an allowlist of system calls without processes, sockets or signals to others;
- rlimits, with both: CPU time, memory, processes, open files and file size.

`confine.py` applies the last three from inside.
"""

import functools
import marshal
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minids.sandbox.errors import IsolationUnavailable
from minids.sandbox.seccomp import seccomp_filter

Layers = tuple[str, ...]
LINUX: tuple[Layers, ...] = (("bubblewrap", "seccomp", "rlimits"), ("landlock", "seccomp", "rlimits"))
MACOS: tuple[Layers, ...] = (("sandbox-exec", "rlimits"),)

OLDEST_BUBBLEWRAP = (0, 8)  # of the options below, --size came last, with 0.7; 0.8 is in Debian 12
LOADER = "import marshal, sys\nfor code in marshal.loads(bytes.fromhex(sys.argv[1])): exec(code)\n"
START = "serve(confine(**eval(sys.argv[2])), *eval(sys.argv[3]))"
PREFIX = os.path.realpath(sys.base_prefix)
PYTHON = os.path.realpath(sys.executable)
LIBRARIES = f"{PREFIX}/lib"
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", LIBRARIES)


@dataclass(frozen=True)
class Access:
    """What an isolated process may use.

    `readable` names files and folders (with all that they contain), but nothing of `hidden`. `scratch` is the size of
    the private /tmp in bytes under bubblewrap; `folder` takes its place under Landlock, None for none. `rlimits` maps
    names such as RLIMIT_AS to values; `threads` permits threads.
    """

    readable: Sequence[str]
    rlimits: Mapping[str, int]
    scratch: int
    hidden: Sequence[str] = ()
    folder: str | None = None
    threads: bool = False


def command(
    layers: Layers, access: Access, python: Sequence[str], programs: Sequence[str], *arguments: object
) -> list[str]:
    """Return the command line that starts a process inside the layers.

    The process runs the `programs` (names of files in this package) in one namespace, which then has `confine` and
    `serve`, and calls `serve(channel, *arguments)`. Raises `IsolationUnavailable` where a layer is not installed.
    """
    readable, listable = [], []
    if "landlock" in layers:
        readable = [path for place in access.readable for path in without(place, access.hidden)]
        listable = [place for place in access.readable if not set(without(place, access.hidden)) >= {place}]
    setup = {
        "rlimits": dict(access.rlimits) if "rlimits" in layers else {},
        "readable": readable,
        "listable": listable,
        "writable": ["/dev/null", *([access.folder] if access.folder is not None else [])],
        "seccomp": seccomp_filter(access.threads) if "seccomp" in layers else b"",
    }
    process = [*python, "-c", LOADER + START, compiled(*programs), repr(setup), repr(arguments)]
    if "bubblewrap" in layers:
        return [*_bubblewrap(access), *process]
    if "sandbox-exec" in layers:
        return ["sandbox-exec", "-p", SEATBELT, *process]
    return process


@functools.cache
def compiled(*programs: str) -> str:
    """Return files of this package, compiled, as text: a process that cannot see them can run them, and sooner."""
    package = Path(__file__).parents[1]
    codes = [compile((package / name).read_text(encoding="utf-8"), Path(name).name, "exec") for name in programs]
    return marshal.dumps(tuple(codes)).hex()


def without(place: str, hidden: Iterable[str]) -> Iterator[str]:
    """Yield paths that contain together all of `place` but what is in `hidden`."""
    if place in hidden:
        return
    if not any(path.startswith(place.rstrip("/") + "/") for path in hidden):
        yield place
    else:
        for child in sorted(os.listdir(place)):
            yield from without(os.path.join(place, child), hidden)


@functools.cache
def bubblewrap_path() -> str:
    """Return the path of the system's bubblewrap. Raises `IsolationUnavailable` where it is missing or too old."""
    path = shutil.which("bwrap")
    if path is None:
        raise IsolationUnavailable("bubblewrap: not installed (apt install bubblewrap)")
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", said)
    if version is not None and (int(version[1]), int(version[2])) < OLDEST_BUBBLEWRAP:
        raise IsolationUnavailable(f"bubblewrap: {said.strip()} is too old: 0.8 or newer is needed")
    return path


def _bubblewrap(access: Access) -> list[str]:
    """Return a command prefix. No destination of a mount is below a folder whose content somebody else controls."""
    options = "--unshare-all --die-with-parent --new-session --cap-drop ALL --uid 65534 --gid 65534 --hostname sandbox"
    hidden = [place for place in access.hidden if _inside(place, access.readable) and os.path.isdir(place)]
    late = [place for place in access.readable if _inside(place, hidden)]
    early = [place for place in access.readable if place not in late]
    mounts = [["--dev-bind" if place.startswith("/dev/") else "--ro-bind-try", place, place] for place in early]
    mounts += [["--tmpfs", place] for place in hidden]
    mounts += [["--ro-bind-try", place, place] for place in late]
    mounts += [["--remount-ro", place] for place in [*hidden, "/"]]
    private = f"--size {access.scratch} --tmpfs /tmp --chdir /tmp --dev-bind /dev/null /dev/null"
    return [bubblewrap_path(), *options.split(), *private.split(), *(word for mount in mounts for word in mount), "--"]


def _inside(place: str, folders: Iterable[str]) -> bool:
    return any(place.startswith(folder.rstrip("/") + "/") for folder in folders)


SEATBELT = f"""(version 1)(deny default)(import "bsd.sb")(allow process-exec (literal "{PYTHON}"))
(allow file-read* (subpath "/usr/lib") (subpath "{PREFIX}/lib") (subpath "{PREFIX}/Python") (literal "{PYTHON}"))"""
