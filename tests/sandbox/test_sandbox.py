"""Honest programs get the correct verdict; the forms of tests; when the sandbox refuses to start."""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from judging import PATIENT, descendants, gone_within, judged_in, on_linux

from minids.sandbox import isolation as layers
from minids.sandbox import judge as module
from minids.sandbox.judge import (
    LINUX,
    IsolationUnavailable,
    Limits,
    Sandbox,
    SandboxProcess,
    parse,
    run,
)

# Honest programs.


def honest(seed: int) -> tuple[str, str, bool]:
    """A program, tests whose expected values were computed here, and whether the program is right."""
    draw = random.Random(seed)
    a, b, right = draw.randint(2, 9), draw.randint(2, 9), draw.random() < 0.5
    families = [
        ("x", f"{a} * x + {b}", f"{a} * x - {b}", [(draw.randint(-99, 99),) for _ in range(4)]),
        ("x, y", f"x % {a} == y % {a}", f"x % {a} != y % {a}", [(draw.randint(0, 99), draw.randint(0, 99))]),
        ("x", f"[v for v in x if v % {a}]", "sorted(x) + [0]", [([draw.randint(0, 99) for _ in range(5)],)]),
        ("x", "{v: x.count(v) for v in x}", "{v: 0 for v in x}", [(draw.choices("abcé☺", k=6),)]),
        ("x", "(x, set(x[::2]), None)", "[x, set(x[::2]), None]", [("".join(draw.choices("abc", k=7)),)]),
        ("x", f"x / {a}", f"x // {a}", [(a * draw.randint(1, 9) + 1,)]),
        ("x", f"x ** {10 * a}", f"x ** {10 * a} + 1", [(draw.randint(2, 99),)]),
    ]
    parameters, body, wrong, inputs = families[seed % len(families)]
    reference = eval(f"lambda {parameters}: {body}")
    tests = "\n".join(f"assert f({', '.join(map(repr, values))}) == {reference(*values)!r}" for values in inputs)
    return f"def f({parameters}):\n    return {body if right else wrong}\n", tests, right


@on_linux
def test_honest_programs_get_the_right_verdict(isolation, monkeypatch):
    programs = [honest(seed) for seed in range(200)]
    assert 60 < sum(right for *_, right in programs) < 140
    monkeypatch.setattr(module, "find_isolation", lambda: isolation)
    sandbox = Sandbox(workers=2, limits=PATIENT)
    verdicts = sandbox.run_many([(program, tests) for program, tests, _ in programs])
    assert [verdict.passed for verdict in verdicts] == [right for *_, right in programs]


@on_linux
def test_the_standard_library_is_there(isolation):
    program = """
        import bisect, collections, datetime, decimal, fractions, functools, heapq, itertools, json, math, random, re
        import statistics, string, time
        def f(n):
            datetime.datetime.now(); time.sleep(0.001); random.SystemRandom().random()
            return collections.Counter(re.findall("a", "a" * n)), math.comb(n, 2), json.loads("[1]")
        """
    assert judged_in(isolation, program, "assert f(4) == ({'a': 4}, 6, [1])").passed


@on_linux
def test_the_private_folder_is_empty_each_time():
    try:
        SandboxProcess(LINUX[0], PATIENT).close()
    except IsolationUnavailable as reason:
        pytest.skip(str(reason))
    program = "import os\ndef f():\n    before = os.listdir('/tmp')\n    os.mkdir('/tmp/x')\n    return before"
    for _ in range(2):
        assert judged_in(LINUX[0], program, "assert f() == []").passed


@on_linux
@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def f(x): return x", "assert f(3) == 4", "assert f(3) == 4: f(3) gave 3"),
        ("def f(x): return 1 / x", "assert f(0) == 4", "ZeroDivisionError: division by zero"),
        ("def f(x) return x", "assert f(0) == 4", "SyntaxError: "),
        ("", "assert f(0) == 4", "NameError: name 'f' is not defined"),
        ("def f(x): return object()", "assert f(0) == 4", "TypeError: object is not plain data"),
        ("def f(x): return 'x' * 40000", "assert f(0) == 4", "an answer of more than 65536 bytes"),
        ("import os\nos._exit(0)", "assert f(0) == 4", "the process ended without an answer"),
        ("def f(x): return {0: f}[x]", "assert f(1) == 4", "KeyError: 1"),
        ("a = []\na.append(a)\ndef f(x): return a", "assert f(1) == 4", "RecursionError: "),
    ],
)
def test_reasons(program, tests, reason, some_isolation):
    verdict = judged_in(some_isolation, program, tests)
    assert not verdict.passed and reason in verdict.reason


@on_linux
def test_time_is_shared_by_all_tests(isolation):
    program = "import time\ndef f(): time.sleep(0.2)"
    assert judged_in(isolation, program, "assert f() is None\n" * 2, Limits(seconds=15.0)).passed
    verdict = judged_in(isolation, program, "assert f() is None\n" * 50, Limits(seconds=1.0))
    assert verdict.reason == "out of time" and 0.9 < verdict.seconds < 10


@on_linux
def test_programs_die_with_the_judge(isolation):
    """A killed judge leaves no endless loop behind."""
    before = descendants()
    reader, writer = os.pipe()
    judge = os.fork()
    if judge == 0:
        try:
            with contextlib.closing(SandboxProcess(isolation, PATIENT)) as cell:
                os.write(writer, b"up")
                cell.ask("while True: pass", time.monotonic() + 60)
        finally:
            os._exit(0)
    assert os.read(reader, 2) == b"up"
    os.close(reader), os.close(writer)
    time.sleep(0.2)
    assert descendants() - before - {judge}
    os.kill(judge, signal.SIGKILL)
    assert gone_within(5, lambda: descendants() - before)


@on_linux
def test_judging_costs_few_starts_of_python(isolation):
    """What bounds the throughput: some four where two cores are free. The bound leaves room for a busy machine."""

    def seconds(work) -> float:
        start = time.perf_counter()
        assert all(both.map(lambda _: work(), range(10)))
        return time.perf_counter() - start

    def start_python() -> bool:
        return subprocess.run([layers.PYTHON, "-I", "-S", "-c", "pass"], env={}).returncode == 0

    def judge() -> bool:
        return judged_in(isolation, "def f(n): return n", "assert f(3) == 3").passed

    with ThreadPoolExecutor(2) as both:
        bare, judged = zip(*((seconds(start_python), seconds(judge)) for _ in range(4)), strict=True)
    assert min(judged) < 12 * min(bare)


# The forms of tests, and refusals.


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        ("assert f(1) == 2", 2, 3),
        ("assert f(1) == True", 1, 0),
        ("assert f(1) is True", True, 1),
        ("assert f(1) is not None", 0, None),
        ("assert f(1) != [1]", [2], [1]),
        ("assert not f(1)", 0, 1),
        ("assert f(1)", "x", ""),
        ("assert 0 <= f(1) < 1", 0.5, 1),
        ("assert abs(f(1) - 0.5) <= 1e-6", 0.5 + 1e-7, 0.51),
        ("assert abs(f(1) - 0.5) <= 1e-6", 0.5, "0.5"),
        ("assert round(f(1), 2) == 3.14", 3.1415, 3.15),
        ("assert len(f(1)) == 2", [1, 2], 2),
        ("assert sorted(f(1)) == [1, 2]", {2, 1}, [1, "a"]),
        ("assert f(1) == set()", set(), {1}),
        ("assert f(1) == {'a': (1, -2.5)}", {"a": (1, -2.5)}, {"a": [1, -2.5]}),
        ("assert f(1) - 1.0 < 3", 3, 10**400),
    ],
)
def test_what_a_line_demands(line, right, wrong):
    (test,) = parse(line)
    assert test.call == "f(1)"
    assert test.holds(right) and not test.holds(wrong)


@pytest.mark.parametrize(
    "tests",
    [
        "", "# nothing", "f(1)", "assert", "assert f(1) == 2, 'why'", "assert 1 == 1", "assert f(1) == f(1)",
        "assert f(1) == g(2)", "assert f(g(1)) == 2", "assert f(x) == 2", "assert f(*[1]) == 2",
        "assert m.f(1) == 2", "assert f(1).x == 2", "assert f(1)[0] == 2", "assert f(1) == x", "assert f(1) == b'a'",
        "assert f(1) == 1j", "assert f(1) == ...", "assert f(1) or True", "assert list(f(1)) == [1]",
        "assert str(1) == '1'", "assert (lambda: 1)() == 1", "assert [f(1) for _ in [1]]", "assert f(1) * 9 == 9",
        "assert f(1) ** 9 == 9", "import os", "x = 1", "assert f(1) == f'{1}'", "assert (y := f(1)) == 1",
        "assert f(\0)",
        "assert sorted(f(1), key=f) == []", "assert max(f(1)) == 1", "assert f(*[1]) == set(f(2))",
    ],
)  # fmt: skip
def test_other_forms_are_refused(tests):
    with pytest.raises(ValueError, match="^tests"):
        parse(tests)


@pytest.mark.parametrize(
    "limit",
    [{"seconds": 0.0}, {"seconds": math.nan}, {"seconds": math.inf}, {"memory": 0}, {"file": -1}, {"answer": 0}],
)
def test_limits_are_checked(limit):
    with pytest.raises(ValueError, match=f"^{next(iter(limit))}="):
        Limits(**limit)


@pytest.fixture
def fresh_search():
    module.find_isolation.cache_clear()
    layers.bubblewrap_path.cache_clear()
    yield
    module.find_isolation.cache_clear()
    layers.bubblewrap_path.cache_clear()


def test_windows_is_refused(monkeypatch, fresh_search):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(IsolationUnavailable, match="no sandbox on win32"):
        run("", "assert f() == 1")


@on_linux
def test_landlock_takes_the_place_of_a_missing_bubblewrap(monkeypatch, fresh_search):
    monkeypatch.setenv("PATH", "/nowhere")
    assert Sandbox().isolation == ("landlock", "seccomp", "rlimits")


@on_linux
def test_no_layers_at_all_is_refused_with_every_reason(monkeypatch, fresh_search):
    def forbidden(*_):
        raise IsolationUnavailable("seccomp: libseccomp.so.2 is missing")

    monkeypatch.setattr(layers, "seccomp_filter", forbidden)
    with pytest.raises(IsolationUnavailable, match="libseccomp.so.2 is missing; seccomp: libseccomp.so.2 is missing"):
        run("", "assert f() == 1")


@on_linux
@pytest.mark.parametrize("printed, usable", [("0.7.0", False), ("0.8.0", True), ("0.12.1", True), ("1.0", True)])
def test_an_old_bubblewrap_is_not_used(monkeypatch, fresh_search, tmp_path, printed, usable):
    (program := tmp_path / "bwrap").write_text(f"#!/bin/sh\necho bubblewrap {printed}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    if usable:
        assert layers.bubblewrap_path() == str(program)
    else:
        with pytest.raises(IsolationUnavailable, match="bubblewrap 0.7.0 is too old: 0.8 or newer is needed"):
            layers.bubblewrap_path()


@on_linux
def test_a_launcher_that_fails_is_quoted(monkeypatch, fresh_search, tmp_path):
    (launcher := tmp_path / "bwrap").write_text("#!/bin/sh\necho uid map refused >&2\nexit 1\n")
    launcher.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(IsolationUnavailable, match="bubblewrap: uid map refused"):
        SandboxProcess(LINUX[0], PATIENT)
