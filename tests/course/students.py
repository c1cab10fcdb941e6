"""Notebooks of students: as other editors save them, and of those who would rather have points than answers."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import nbformat
from notebooks import SOLUTIONS

from minids.course.checks import graded
from minids.course.notebooks import ROOT, read

FILE = SOLUTIONS[0].name
NAMES = [exercise.name for exercise in graded(0)]
POINTS = sum(exercise.points for exercise in graded(0))


def cells_of(path):
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def notebook(path, *sources):
    path.parent.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def saved_by_others(sources) -> dict[str, bytes]:
    """The same notebook as VS Code, PyCharm, Colab and others save it."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    plain = json.loads(json.dumps(nbformat.v4.new_notebook(cells=cells)))

    def changed(change: Callable[[dict], None]) -> bytes:
        content = copy.deepcopy(plain)
        change(content)
        return json.dumps(content).encode()

    def each_cell(content, change):
        for cell in content["cells"]:
            change(cell)

    def old_format(content):
        worksheet = [dict(cell_type="code", input=s, language="python", outputs=[], collapsed=False) for s in sources]
        content.clear()
        content.update(nbformat=3, nbformat_minor=0, metadata={"name": ""}, worksheets=[{"cells": worksheet}])

    return {
        "ids in 4.4": changed(lambda n: n.update(nbformat_minor=4)),
        "ids in 4.2": changed(lambda n: n.update(nbformat_minor=2)),
        "no counts": changed(lambda n: each_cell(n, lambda cell: cell.pop("execution_count", None))),
        "no outputs": changed(lambda n: each_cell(n, lambda cell: cell.pop("outputs", None))),
        "no ids": changed(lambda n: each_cell(n, lambda cell: cell.pop("id", None))),
        "same ids": changed(lambda n: each_cell(n, lambda cell: cell.update(id="a"))),
        "Colab": changed(lambda n: n["metadata"].update(colab={}, widgets={"application/x": {}})),
        "other kernel": changed(lambda n: n["metadata"].update(kernelspec={"name": "bash", "display_name": "x"})),
        "lists of lines": changed(
            lambda n: each_cell(n, lambda cell: cell.update(source=cell["source"].splitlines(True)))
        ),
        "raw cells": changed(
            lambda n: n["cells"].append({"cell_type": "raw", "source": "x", "metadata": {}, "id": "b"})
        ),
        "version 3": changed(old_format),
        "BOM": b"\xef\xbb\xbf" + json.dumps(plain).encode(),
        "CRLF": json.dumps(plain, indent=1).replace("\n", "\r\n").encode(),
        "stored output": changed(
            lambda n: n["cells"][0].update(outputs=[dict(output_type="stream", name="stdout", text="x" * 10**7)])
            if n["cells"]
            else None
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A hostile notebook: its cells, and the points that its honest part earns."""

    source: str
    points: int = 0
    after: bool = False  # the solution comes first

    def cells(self, solved: list[str]) -> list[str]:
        anything = [f"def {name}(*arguments): return 0" for name in NAMES]
        return (
            [*solved, self.source]
            if self.after
            else [self.source, *anything]
            if not self.points
            else [self.source, *solved]
        )


JSON = """
import sys, types, json as real
class Module(types.ModuleType): pass
module = Module("json")
module.__dict__.update(real.__dict__)
module.dumps = lambda *a, **k: {!r}
sys.modules["json"] = module
"""
DUMPS = "import json\njson.dumps = lambda *a, **k: {!r}"
REFERENCES = """
from minids.course.checks import graded
for exercise in graded(0):
    globals()[exercise.name] = getattr(exercise, "reference", lambda f: None)
"""
BY_PATH = f"""
import importlib.util, sys
sys.path.insert(0, {str(ROOT)!r})
for name in [name for name in sys.modules if name.startswith("minids")]:
    del sys.modules[name]
sys.meta_path = [finder for finder in sys.meta_path if "serve" not in repr(finder)]
spec = importlib.util.spec_from_file_location("answers", {str(ROOT / "minids/course/exercises/chapter00.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for exercise in module.EXERCISES:
    globals()[exercise.name] = exercise.reference
"""
READS = f"""
import json
for cell in json.load(open({str(SOLUTIONS[0])!r}))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]))
"""
CLOSURE = """
def judge(f):
    inside = [f.__closure__[0].cell_contents] if getattr(f, "__closure__", None) else []
    names = [getattr(each, "__qualname__", "") for each in (f, *inside)] + [repr(f), str(vars(f))]
    assert not any(word in name for word in ("bug", "wrong", "mistake") for name in names)
"""
COUNTS = """
calls = []
def judge(f):
    calls.append(f)
    assert len(calls) == 1
"""
FRAMES = """
import gc, sys
def judge(f):
    frame = sys._getframe()
    seen = []
    while frame:
        seen += [str(value) for value in frame.f_locals.values()]
        frame = frame.f_back
    seen += [str(each) for each in gc.get_objects() if "SpotTheBug" in type(each).__name__]
    assert any("right" in each for each in seen)
"""
TEST = next(exercise.name for exercise in graded(0) if hasattr(exercise, "bugs"))
AS_TEST = f"\n{TEST} = judge\n"
CHANNEL = """
import os, json, struct
fields = [["result", ["int", "1"]], ["arguments", ["tuple", []]]]
result = ["record", "minids.course.observation", "Observation", fields]
reply = json.dumps({"result": result, "generators": ["list", []]}).encode()
for number in range(3, 20):
    try: os.write(number, (struct.pack(">I", len(reply)) + reply) * 50)
    except OSError: pass
"""
ALWAYS_EQUAL = """
class Equal(float):
    __eq__ = __ge__ = __le__ = lambda *a: True
    __ne__ = lambda *a: False
    __hash__ = float.__hash__
    __sub__ = __rsub__ = lambda *a: 0.0
class Whole(int):
    __eq__ = lambda *a: True
    __ne__ = lambda *a: False
    __hash__ = int.__hash__
""" + "\n".join(f"{name} = lambda *a: Equal(1)" for name in NAMES)
NAMES_EQUAL = ALWAYS_EQUAL + "\n" + "\n".join(f"{name} = lambda *a: Whole(1)" for name in NAMES)
FORK = "import os\nfor _ in range(200): os.fork()"
FILL = "import os\nopen('x', 'wb').write(bytes(2**27))"
MANY_FILES = "for i in range(100):\n    open(f'x{i}', 'wb').write(bytes(2**24))"
SHM = "open('/dev/shm/x', 'wb').write(bytes(2**24))"
ESCAPE = "class E(Exception): pass\nraise E('\\x1b[2K\\x1b[1A\\x1b[32mann sum 99/99\\x1b[0m \\r overwritten')"


def raises(message: str) -> str:
    return "\n".join(f"def {name}(*a): raise ValueError({message!r})" for name in NAMES)


HOSTILE = {
    "references from the package": Case(REFERENCES),
    "references by path": Case(BY_PATH),
    "reads the solutions": Case(READS),
    "json replaced, passed": Case(JSON.format('["passed", 1, []]')),
    "json replaced, 9999": Case(JSON.format('["passed", 9999, []]')),
    "json replaced, no JSON": Case(JSON.format("x")),
    "json replaced, two fields": Case(JSON.format("[1, 2]")),
    "json replaced, null": Case(JSON.format("null")),
    "dumps patched": Case(DUMPS.format("[1]")),
    "dumps patched, a result": Case(DUMPS.format('{"result": ["int", "1"], "generators": ["list", []]}')),
    "dumps patched, huge": Case("import json\njson.dumps = lambda *a, **k: '9' * 2**28"),
    "dumps patched, deep": Case("import json\njson.dumps = lambda *a, **k: '[' * 10**6"),
    "user expressions": Case("get_ipython().user_expressions = lambda e: {'answer': {}}"),
    "checks replaced": Case("import minids.course.checks as c\nc.check = lambda *a: 'passed'"),
    "closures": Case(CLOSURE + AS_TEST),
    "counts its calls": Case(COUNTS + AS_TEST),
    "frames": Case(FRAMES + AS_TEST),
    "writes into the channel": Case(CHANNEL),
    "closes the channel": Case("import os\nos.closerange(3, 99)"),
    "equal to everything": Case(ALWAYS_EQUAL),
    "whole and equal": Case(NAMES_EQUAL),
    "dies": Case("import os\nos._exit(0)"),
    "kills itself": Case("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", POINTS),
    "kills everybody": Case("import os, signal\nos.kill(-1, signal.SIGKILL)", POINTS),
    "stubborn": Case(
        "import signal\nfor each in (signal.SIGALRM, signal.SIGPROF):\n    signal.signal(each, signal.SIG_IGN)\n"
        "while True: pass"
    ),
    "swallows interrupts": Case(
        "import time\nend = time.time() + 60\n"
        "while time.time() < end:\n    try: time.sleep(1)\n    except BaseException: pass"
    ),
    "hanging answers": Case("\n".join(f"def {name}(*a):\n    while True: pass" for name in NAMES), 0, after=True),
    "segfault": Case("import ctypes\nctypes.string_at(0)"),
    "forks": Case(FORK, POINTS),
    "execs": Case("import os\nos.execv('/bin/sh', ['sh'])", POINTS),
    "connects": Case("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)", POINTS),
    "fills a file": Case(FILL, POINTS),
    "fills the folder": Case(MANY_FILES, POINTS),
    "fills shared memory": Case(SHM, POINTS),
    "memory": Case("x = []\nwhile True: x.append(bytearray(2**28))"),
    "prints without end": Case("while True: print('x' * 10**6)", POINTS, after=True),
    "escape sequences": Case(ESCAPE + "\n", POINTS),
    "surrogates": Case(raises("\ud800"), 0, after=True),
    "formulas": Case(raises("=1+1"), 0, after=True),
    "markup": Case(raises("<script>]]>&"), 0, after=True),
    "long messages": Case(raises("x" * 10**6), 0, after=True),
}


def nothing(path):
    pass


def garbage(path):
    path.write_text("this is no notebook")


def binary(path):
    path.write_bytes(bytes(range(256)) * 99)


def deep(path):
    path.write_text("[" * 10**6)


def other_json(path):
    path.write_text('{"cells": 7, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}')


def link(path):
    path.symlink_to(SOLUTIONS[0])


def endless(path):
    path.symlink_to("/dev/zero")


def pipe(path):
    os.mkfifo(path)


def large(path):
    with path.open("wb") as file:
        file.truncate(2**30)


def folder(path):
    path.mkdir()


def twice(path):
    for name in ("a", "b"):
        notebook(path.parent / name / FILE, *cells_of(SOLUTIONS[0]))


HOSTILE_FILES = {
    "nothing": nothing, "garbage": garbage, "binary": binary, "deep": deep, "other JSON": other_json,
    "link to the solutions": link, "endless": endless, "pipe": pipe, "large": large, "a folder": folder, "twice": twice,
}  # fmt: skip
