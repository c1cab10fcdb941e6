"""Programs that try to break out fail and leave nothing behind.

Each attack also succeeds in the same worker without isolation; one too dangerous for that is marked `loose=False`.
"""

import errno
import os
import random
import signal
import socket
import subprocess
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from judging import HASTY, PATIENT, descendants, gone_within, judged_in, on_linux

from minids.sandbox.judge import IsolationUnavailable, Limits, SandboxProcess

# Break-outs: attack() returns True once it has done what it should not be able to do.


@dataclass(frozen=True)
class Attack:
    body: str
    limits: Limits = PATIENT
    loose: bool = True  # may run without isolation


LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
HANG = dict(limits=HASTY, loose=False)
ATTACKS = {
    "reads a file": Attack("return open(OUTSIDE).read() == 'precious'"),
    "reads through a link": Attack(
        "import os, tempfile\nd = tempfile.mkdtemp(dir=FOLDER if os.path.isdir(FOLDER) else None)\n"
        "os.symlink(OUTSIDE, d + '/x')\nreturn open(d + '/x').read() == 'precious'"
    ),
    "lists a folder": Attack("import os\nreturn 'precious' in os.listdir(FOLDER)"),
    "reads passwords": Attack("return bool(open('/etc/passwd').read())"),
    "reads the tests' source": Attack("return 'precious' in open(THIS).read()"),
    "writes a file": Attack("open(FOLDER + '/new', 'w').write('x')\nreturn True"),
    "empties a file": Attack("import os\nos.truncate(OUTSIDE, 8)\nreturn True"),
    "removes a file": Attack("import os\nos.rename(OUTSIDE, OUTSIDE)\nos.link(OUTSIDE, OUTSIDE + '2')\nreturn True"),
    "changes a file's mode": Attack("import os\nos.chmod(OUTSIDE, 0o600)\nreturn True"),
    "changes a file's time": Attack("import os\nos.utime(OUTSIDE)\nreturn True"),
    "opens Python's library for writing": Attack("import os\nopen(os.__file__, 'a')\nreturn True"),
    "writes to shared memory": Attack("open('/dev/shm/' + NAME, 'w').write('x')\nreturn True"),
    "System V shared memory": Attack(
        LIBC + "segment = libc.shmget(0, 4096, 0o1600)\nreturn segment >= 0 and libc.shmctl(segment, 0, None) == 0"
    ),
    "connects": Attack("import socket\nsocket.create_connection(('127.0.0.1', PORT))\nreturn True"),
    "connects to an abstract socket": Attack(
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + NAME)\nreturn True"
    ),
    "sends a datagram": Attack(
        "import socket\nreturn socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)) == 1"
    ),
    "listens": Attack("import socket\nsocket.create_server(('127.0.0.1', 0))\nreturn True"),
    "signals a process": Attack("import os\nos.kill(VICTIM, 0)\nreturn True"),
    "signals all": Attack("import os\nos.kill(-1, 0)\nreturn True"),
    "signals its group": Attack("import os\nos.killpg(0, 0)\nreturn True"),
    "kills all": Attack("import os\nos.kill(-1, 9)\nreturn True", loose=False),
    "kills the judge": Attack("import os\nos.kill(JUDGE, 9)\nos.kill(os.getppid(), 9)\nreturn True", loose=False),
    "signals through a descriptor": Attack(
        "import fcntl, os\nfcntl.fcntl(os.dup(1), fcntl.F_SETOWN, VICTIM)\nreturn True"
    ),
    "traces a process": Attack(LIBC + "return libc.ptrace(0x4206, VICTIM, None, None) == 0"),
    "reads a process's memory": Attack("return bool(open(f'/proc/{VICTIM}/mem', 'rb'))"),
    "reads a process's environment": Attack("return b'=' in open(f'/proc/{VICTIM}/environ', 'rb').read()"),
    "lists processes": Attack("import os\nreturn str(VICTIM) in os.listdir('/proc')"),
    "changes a process's limits": Attack(
        "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_CORE, (0, 0))\nreturn True"
    ),
    "changes a process's priority": Attack("import os\nos.setpriority(os.PRIO_PROCESS, VICTIM, 19)\nreturn True"),
    "lifts its limits": Attack(
        "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (99, 99))\n"
        "return resource.getrlimit(resource.RLIMIT_NPROC) == (99, 99)"
    ),
    "makes namespaces": Attack(LIBC + "return libc.unshare(0x10000000) == 0"),
    "becomes another user": Attack("import os\nos.setresuid(os.getuid(), os.getuid(), os.getuid())\nreturn True"),
    "starts a session": Attack("import os\nif os.fork() == 0:\n    os.setsid()\n    os._exit(0)\nreturn True"),
    "forks": Attack("import os\nfor _ in range(20):\n    if os.fork() == 0: os._exit(0)\nreturn True"),
    "fork bomb": Attack("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", **HANG),
    "leaves a sleeping child": Attack(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n    os._exit(0)\nreturn True"
    ),
    "starts a thread": Attack("import threading\nthreading.Thread(target=int).start()\nreturn True"),
    "starts a program": Attack("import subprocess\nreturn subprocess.run(['/bin/true']).returncode == 0"),
    "becomes a program": Attack("import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 60'])", **HANG),
    "takes memory": Attack("return len(bytearray(2**29)) > 0"),
    "maps memory": Attack("import mmap\nreturn len(mmap.mmap(-1, 2**29)) > 0"),
    "memory bomb": Attack("x = [0]\nwhile True: x += x", loose=False),
    "writes a large file": Attack(
        "import tempfile\nwith tempfile.TemporaryFile(buffering=0) as f: return f.write(bytes(2**21)) == 2**21"
    ),
    "fills the disk": Attack(
        "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n    for i in range(40):\n"
        "        with open(f'{d}/{i}', 'wb') as file: file.write(bytes(2**20))\nreturn True"
    ),
    "opens many files": Attack("files = [open('/dev/null') for _ in range(500)]\nreturn True"),
    "loops": Attack("while True: pass", **HANG),
    "loops past signals": Attack(
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.Signals)\nwhile True: pass",
        **HANG,
    ),
    "computes one long step": Attack("return 9 ** 9 ** 9 > 0", **HANG),
    "sleeps": Attack("import time\ntime.sleep(60)\nreturn True", **HANG),
    "prints without end": Attack("while True: print('passed' * 1000)", **HANG),
    "a long answer": Attack("return 'x' * 10**6", loose=False),
    "recurses": Attack("import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nreturn f()", **HANG),
    "crashes": Attack("import ctypes\nreturn ctypes.string_at(1)", loose=False),
    "stops itself": Attack("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass", **HANG),
    "closes everything": Attack("import os\nos.closerange(0, 64)\nreturn True", loose=False),
}
OFTEN_FORBIDDEN = {  # to everybody, in containers or by Yama
    "opens Python's library for writing", "makes namespaces", "traces a process", "reads a process's memory",
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    """Things worth attacking: a file in a folder, a process, a port, an abstract socket."""
    (tmp_path / "precious").write_text("precious")
    name = f"minids-{os.getpid()}-{random.SystemRandom().getrandbits(64):x}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        subprocess.Popen(["sleep", "300"], env={"SECRET": "1"}) as victim,
    ):
        abstract.bind("\0" + name)
        abstract.listen()
        values = {
            "OUTSIDE": str(tmp_path / "precious"), "FOLDER": str(tmp_path), "NAME": name, "THIS": __file__,
            "PORT": server.getsockname()[1], "VICTIM": victim.pid, "JUDGE": os.getpid(),
        }  # fmt: skip
        try:
            yield "".join(f"{key} = {value!r}\n" for key, value in values.items())
        finally:
            Path("/dev/shm", name).unlink(missing_ok=True)
            victim.kill()


def as_program(attack: Attack, world: str) -> str:
    return f"{world}def attack():\n{textwrap.indent(attack.body, '    ')}"


@on_linux
@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.loose])
def test_break_outs_succeed_without_isolation(name, world):
    before = descendants()
    verdict = judged_in((), as_program(ATTACKS[name], world), "assert attack() is True")
    if not verdict.passed and name in OFTEN_FORBIDDEN:
        pytest.skip(f"this machine forbids it to everybody: {verdict.reason}")
    assert verdict.passed, verdict
    if name == "leaves a sleeping child":
        (child,) = descendants() - before
        os.kill(child, signal.SIGKILL)
    assert gone_within(5, lambda: descendants() - before)


@on_linux
@pytest.mark.parametrize("name", ATTACKS)
def test_break_outs(name, isolation, world, tmp_path):
    before, processes = sorted(tmp_path.iterdir()), descendants()
    stat = (tmp_path / "precious").stat()
    start = time.monotonic()
    verdict = judged_in(isolation, as_program(ATTACKS[name], world), "assert attack() is True", ATTACKS[name].limits)
    assert not verdict.passed
    assert time.monotonic() - start < PATIENT.seconds  # its end included
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "precious").stat() == stat
    assert gone_within(5, lambda: descendants() - processes), "a process was left behind"


ALONE = {  # the attacks that each layer stops on its own
    "bubblewrap": [
        "reads a file", "writes a file", "writes to shared memory", "connects", "connects to an abstract socket",
        "signals a process", "traces a process", "reads a process's environment", "lists processes",
        "changes a process's limits", "changes a process's priority", "starts a program", "fills the disk",
    ],
    "seccomp": [
        "changes a file's mode", "System V shared memory", "connects", "sends a datagram", "listens", "forks",
        "signals a process", "signals its group", "signals through a descriptor", "traces a process",
        "changes a process's limits", "lifts its limits", "makes namespaces", "starts a thread", "starts a program",
    ],
    "landlock": [
        "reads a file", "lists a folder", "writes a file", "empties a file", "removes a file", "starts a program",
        "reads a process's environment", "lists processes", "writes to shared memory",
    ],
    "rlimits": ["takes memory", "maps memory", "writes a large file", "opens many files", "lifts its limits"],
}  # fmt: skip


@on_linux
@pytest.mark.parametrize(("layer", "name"), [(layer, name) for layer, names in ALONE.items() for name in names])
def test_each_layer_alone(layer, name, world):
    try:
        SandboxProcess((layer,), PATIENT).close()
    except IsolationUnavailable as reason:
        pytest.skip(str(reason))
    assert not judged_in((layer,), as_program(ATTACKS[name], world), "assert attack() is True").passed


@on_linux
def test_nothing_is_inherited(isolation, monkeypatch, tmp_path):
    monkeypatch.setenv("MINIDS_TOKEN", "precious")
    program = """
        import os
        def is_open(fd):
            try: return bool(os.fstat(fd))
            except OSError: return False
        def environment(): return dict(os.environ)
        def descriptors(): return [fd for fd in range(64) if is_open(fd)]
        """
    with open(tmp_path / "precious", "w") as file:
        os.set_inheritable(file.fileno(), True)
        tests = "assert environment() == {}\nassert descriptors() == [0, 1, 2, 3]"  # 3 is the way to the judge
        verdict = judged_in(isolation, program, tests)
    assert verdict.passed, verdict


@on_linux
def test_a_forbidden_system_call_fails_with_eperm(isolation):
    program = LIBC + f"def f():\n    libc.fork()\n    return ctypes.get_errno() == {errno.EPERM}"
    assert judged_in(isolation, program, "assert f() is True").passed
