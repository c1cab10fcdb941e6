"""A notebook's process sees no reference and reaches nothing; the judge outside gives the points."""

import ast
import functools
import inspect
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from notebooks import SOLUTIONS, chapter_number
from students import POINTS, cells_of

from minids.course import judge
from minids.course.checks import exercises, graded
from minids.course.notebooks import ROOT
from minids.course.wire import Broken
from minids.sandbox.errors import IsolationUnavailable
from minids.sandbox.isolation import LINUX, without

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="untested on other systems")
SOLVED = cells_of(SOLUTIONS[0])


@functools.cache
def unavailable(layers) -> str:
    try:
        judge.Student(layers).close()
    except IsolationUnavailable as reason:
        return str(reason)
    return ""


@pytest.fixture(params=LINUX, ids=lambda layers: layers[0])
def layers(request):
    if reason := unavailable(request.param):
        pytest.skip(reason)
    return request.param


def as_notebook(*cells) -> bytes:
    return nbformat.writes(nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))).encode()


def said(layers, source: str, seconds: float = 60.0) -> str:
    """What a cell raises as its message."""
    with closing(judge.Student(layers)) as student:
        return student.run_all([source], seconds).partition("RuntimeError: ")[2]


def earns_all_points(path, layers):
    chapter = chapter_number(path)
    outcome = list(judge.judge(path.read_bytes(), chapter, 240.0, layers))
    assert outcome == [("passed", exercise.points, "") for exercise in graded(chapter)]


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_the_solutions_earn_all_points(path):
    earns_all_points(path, judge.find_layers())


@pytest.mark.parametrize("path", SOLUTIONS[::5], ids=lambda path: path.stem)
def test_some_solutions_earn_all_points_in_each_isolation(path, layers):
    earns_all_points(path, layers)


def test_without_layers_the_judge_is_outside_all_the_same():
    forged = as_notebook(*SOLVED, "import json\njson.dumps = lambda *a: '[]'")
    assert sum(points for _, points, _ in judge.judge(as_notebook(*SOLVED), 0, 60.0, ())) == POINTS
    assert sum(points for _, points, _ in judge.judge(forged, 0, 60.0, ())) == 0


def test_the_limit_is_processor_time(layers):
    """A call may wait longer than it may compute, as it does where others have the processors."""
    with closing(judge.Student(layers)) as student:
        assert student.run_all(["import time\ntime.sleep(3)"], 2.0) == ""
        assert "took too long" in student.run_all(["while True: pass"], 2.0)
        assert "took too long" in student.run_all(["time.sleep(600)"], 2.0)


LOOKING = """
import os
opened = []
for path in PATHS:
    try:
        open(path, "rb").read(1)
        opened.append(path)
    except OSError:
        pass
raise RuntimeError("|".join(opened))
"""


def test_of_this_project_only_what_the_exercises_import_can_be_opened(layers):
    here = [str(path) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    assert str(ROOT / "minids/course/exercises/chapter00.py") in here and str(SOLUTIONS[0]) in here
    opened = said(layers, LOOKING.replace("PATHS", repr(here))).split("|")
    assert set(opened) == set(judge.VISIBLE.values())


def test_an_installed_copy_of_the_package_is_hidden_too(layers, tmp_path, monkeypatch):
    copy = tmp_path / "site-packages" / "minids" / "course" / "exercises"
    copy.mkdir(parents=True)
    (copy / "chapter00.py").write_text("x")
    (tmp_path / "site-packages" / "other.py").write_text("x")
    monkeypatch.setattr(judge.site, "getsitepackages", lambda: [str(tmp_path / "site-packages")])
    monkeypatch.setattr(judge, "SYSTEM", (*judge.SYSTEM, str(tmp_path)))
    paths = [str(copy / "chapter00.py"), str(tmp_path / "site-packages" / "other.py")]
    assert said(layers, LOOKING.replace("PATHS", repr(paths))) == paths[1]


def test_what_can_be_opened_holds_no_reference_and_imports_nothing_else():
    for exercise in (exercise for path in SOLUTIONS for exercise in exercises(chapter_number(path))):
        right = getattr(exercise, "reference", getattr(exercise, "right", None))  # experiments and open tasks: none
        while isinstance(right, functools.partial):
            right = right.func
        if right is not None:
            assert inspect.getsourcefile(right) not in judge.VISIBLE.values(), f"{exercise.id} {exercise.name}"
    for file in judge.VISIBLE.values():
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(m in judge.VISIBLE for m in modules if m and m.startswith("minids")), f"{file} imports {modules}"


REACHING = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
done = []
def attempt(name, action):
    try:
        if action() is not False: done.append(name)
    except Exception: pass
attempt("connects", lambda: socket.create_connection(("127.0.0.1", PORT), 2))
attempt("makes a socket", lambda: socket.socket())
attempt("forks", lambda: os.fork() == 0 and os._exit(0))
attempt("starts a program", lambda: os.system("true") == 0)
attempt("signals its parent", lambda: os.kill(os.getppid(), 0))
attempt("signals all", lambda: os.kill(-1, 0))
attempt("writes outside", lambda: open(PLACE, "w"))
attempt("removes", lambda: os.unlink(PLACE))
attempt("changes a mode", lambda: os.chmod(PLACE, 0o777))
attempt("reads the password file", lambda: open("/etc/shadow").read())
attempt("reads its parent", lambda: open(f"/proc/{os.getppid()}/environ").read())
others = lambda: [n for n in os.listdir("/proc") if n.isdecimal() and int(n) > 9 and n != str(os.getpid())]
attempt("lists processes", lambda: bool(others()))
attempt("shared memory", lambda: open("/dev/shm/x", "wb").write(bytes(2**20)))
attempt("anonymous file", lambda: os.memfd_create("x"))
attempt("traces", lambda: libc.ptrace(0, 0, 0, 0) == 0)
attempt("mounts", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, 0) == 0)
attempt("namespaces", lambda: libc.unshare(0x10000000) == 0)
attempt("lifts its limits", lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (-1, -1)))
attempt("memory", lambda: len(bytearray(2**33)))
raise RuntimeError(str(done))
"""


def test_a_notebook_reaches_nothing(layers, tmp_path):
    import socket

    (place := tmp_path / "precious").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = REACHING.replace("PORT", str(server.getsockname()[1])).replace("PLACE", repr(str(place)))
        assert said(layers, source) == "[]"
    assert place.read_text() == "x" and place.stat().st_mode & 0o777 != 0o777


def test_temporary_files_are_limited(layers):
    fill = "for i in range(40):\n    open(f'x{i}', 'wb').write(bytes(2**23))"  # 320 MiB, each file within its limit
    outcome = list(judge.judge(as_notebook(fill, *SOLVED), 0, 60.0, layers))
    if "bubblewrap" in layers:
        assert sum(points for _, points, _ in outcome) == POINTS, "the private /tmp was full"
    else:
        assert {message for *_, message in outcome} == {"the notebook's process: more than 256 MiB of temporary files"}


def test_temporary_files_are_limited_also_within_a_cell(layers):
    fill = (
        "import time\nfor i in range(200):\n    open(f'x{i}', 'wb').write(bytes(2**24))\n    time.sleep(0.1)"  # 3.1 GiB
    )
    with closing(judge.Student(layers)) as student:
        if "bubblewrap" in layers:
            assert "No space left" in student.run_all([fill], 60.0)
        else:
            with pytest.raises(Broken, match="more than 256 MiB of temporary files"):
                student.run_all([fill], 60.0)


def test_no_process_and_no_file_is_left(layers, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.count("marshal.loads")
    list(judge.judge(as_notebook("open('x', 'w').write('x')", *SOLVED), 0, 60.0, layers))
    assert os.listdir(tmp_path) == []
    after = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.count("marshal.loads")
    assert after <= before


def test_a_folder_without_some_of_its_parts(tmp_path):
    for name in ("a/x", "a/y", "b/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    root = str(tmp_path)
    assert list(without(root, [f"{root}x"])) == [root]
    assert list(without(root, [f"{root}/a"])) == [f"{root}/b"]
    assert list(without(root, [f"{root}/a/x"])) == [f"{root}/a/y", f"{root}/b"]
    assert list(without(root, [root])) == []
