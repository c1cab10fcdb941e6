"""Programs that forge a verdict fail.

Each forgery also succeeds against a judge that shares its process with the program.
"""

import subprocess
import sys
import textwrap

import pytest
from judging import judged_in, on_linux

# Forgeries: the program does not know that secret(3) is 7919 and wants to pass all the same.

SECRET = "assert secret(3) == 7919\nassert secret(4) == 7927"
READ_ONE = "import re\ndef answer(text, n): return int(re.search(r'secret\\(%d\\) == (\\d+)' % n, str(text))[1])\n"
FORGERIES = {
    "prints and exits": "import os\nprint('passed', flush=True)\nos._exit(0)",
    "prints and sys.exit": "import sys\nprint('passed')\nsys.exit(0)",
    "exits in the call": "import os\ndef secret(n): print('passed', flush=True); os._exit(0)",
    "atexit": """
        import atexit, os, sys
        atexit.register(lambda: (print('passed', flush=True), os._exit(0)))
        sys.exit(1)
        """,
    "excepthook": """
        import os, sys
        sys.excepthook = lambda *_: (print('passed', flush=True), os._exit(0))
        secret = len
        """,
    "patches exec": "import builtins\nbuiltins.exec = builtins.eval = lambda *_: None",
    "patches AssertionError": """
        import builtins, os, sys
        class Quiet(Exception):
            def __init__(self, *_): print('passed', flush=True); os._exit(0)
        builtins.AssertionError = builtins.NameError = builtins.TypeError = Quiet
        def secret(n): raise TypeError()
        """,
    "patches unittest": """
        import unittest
        unittest.TestCase.assertEqual = lambda *_: None
        class Equal:
            def __eq__(self, other): return True
        def secret(n): return Equal()
        """,
    "equals everything": "class Equal:\n    def __eq__(self, other): return True\ndef secret(n): return Equal()",
    "an int that equals everything": """
        class Equal(int):
            def __eq__(self, other): return True
            __hash__ = int.__hash__
        def secret(n): return Equal()
        """,
    "reads the stack": READ_ONE
    + """
import sys
def secret(n):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if type(value) is str and value.startswith("assert secret("): return answer(value, n)
        frame = frame.f_back
""",
    "reads the stack's code": READ_ONE
    + """
import sys
def secret(n):
    frame = sys._getframe(1)
    while frame:
        if 7919 in frame.f_code.co_consts: return {3: 7919, 4: 7927}[n]
        frame = frame.f_back
""",
    "reads gc": READ_ONE
    + """
import gc
def secret(n):
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            for value in list(thing.values()):
                if type(value) is str and value.startswith("assert secret("): return answer(value, n)
""",
    "reads the environment": READ_ONE + "import os\ndef secret(n): return answer(dict(os.environ), n)",
    "reads the command line": READ_ONE + "import sys\ndef secret(n): return answer(sys.orig_argv, n)",
    "reads its descriptors": READ_ONE
    + """
import os
text = b""
for fd in range(64):
    try:
        os.set_blocking(fd, False); text += os.read(fd, 9999)
    except OSError: pass
def secret(n): return answer(text, n)
""",
    "reads the disk": READ_ONE
    + """
import os
def secret(n):
    for top in (os.getcwd(), "/tmp"):
        for name in os.listdir(top):
            try: return answer(open(os.path.join(top, name)).read(), n)
            except (OSError, TypeError, UnicodeDecodeError): pass
""",
}
NAIVE = """
import os, sys, unittest
def main():
    job = {"program": sys.argv[1], "tests": os.environ["TESTS"], "limits": [2.0]}
    tests = job["tests"]
    namespace = {"unittest": unittest}
    exec(job["program"], namespace)
    exec(tests, namespace)
    print("passed")
main()
"""


@on_linux
@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_fool_a_judge_inside(name, tmp_path):
    (tmp_path / "tests.py").write_text(SECRET)
    result = subprocess.run(
        [sys.executable, "-I", "-c", NAIVE, textwrap.dedent(FORGERIES[name]), SECRET],
        input=SECRET, env={"TESTS": SECRET}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout.strip()) == (0, "passed"), result.stderr


# What a worker that was taken over may put on the wire instead of an answer.
ON_THE_WIRE = {
    "passed": b"passed\n" * 3,
    "a verdict": b'["ok",{"passed":true}]\n' * 3,
    "constants": b'["ok",true]\n' * 3,
    "no end": b"[" * 10**6,
    "deep enough": b'["ok",' + b"[" * 900 + b"]" * 900 + b"]\n",
    "deep": b'["ok",' + b"[" * 30000 + b"]" * 30000 + b"]\n",
    "a long number": b'["ok",' + b"9" * 60000 + b"]\n",
    "an unknown type": b'["ok",{"eval":"1"}]\n' * 3,
    "two types": b'["ok",{"set":[],"tuple":[]}]\n' * 3,
    "unhashable": b'["ok",{"set":[[1]]}]\n' * 3,
    "no hex": b'["ok",{"str":"zz"}]\n' * 3,
    "a number as text": b'["ok",{"str":7}]\n' * 3,
    "not utf-8": b'["ok",\xff]\n' * 3,
    "not a pair": b"7919\n" * 3,
    "not a number": b'["ok",NaN]\n' * 3,
}


@on_linux
@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries(name, some_isolation):
    verdict = judged_in(some_isolation, FORGERIES[name], SECRET)
    assert not verdict.passed


@on_linux
@pytest.mark.parametrize("name", ON_THE_WIRE)
def test_answers_written_past_the_worker(name, some_isolation):
    write = f"import os\nfor fd in range(64):\n    try: os.write(fd, {ON_THE_WIRE[name]!r})\n    except OSError: pass\n"
    assert not judged_in(some_isolation, write, SECRET).passed
    assert not judged_in(some_isolation, f"def secret(n):\n{textwrap.indent(write, '    ')}", SECRET).passed


@on_linux
def test_a_patched_worker_can_only_answer(some_isolation):
    """The program owns its process; what it sends is an answer like any other."""
    program = "import sys\nsys.modules['__main__'].encode = lambda value: {answer!r}\ndef f(n): return None"
    assert judged_in(some_isolation, program.format(answer="7"), "assert f(1) == 7").passed
    assert not judged_in(some_isolation, program.format(answer="7"), "assert f(1) == 8").passed
    assert not judged_in(some_isolation, program.format(answer='"passed"'), "assert f(1) == 7").passed
