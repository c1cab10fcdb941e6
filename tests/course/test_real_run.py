"""The real run of chapter 13: the commands for any number of GPUs, and no process that is left behind."""

import textwrap

import psutil
import pytest

from minids.cli.options import parse
from minids.cli.train import Options
from minids.course import real_run
from minids.course.real_run import KILL_AFTER, STEPS, Launch, draw_run, launches, watch
from minids.parallel.layout import Layout


@pytest.mark.parametrize(
    "gpus, expected",
    [
        (0, [Launch(4, "cpu")]),
        (1, [Launch(4, "cpu"), Launch(1, "cuda")]),
        (2, [Launch(2, "cuda")]),
        (3, [Launch(3, "cuda")]),
        (8, [Launch(8, "cuda")]),
    ],
)
def test_launches_use_every_gpu_and_show_several_processes(gpus, expected):
    """NCCL has at most one process per GPU, and there are always several processes."""
    found = launches(gpus)
    assert found == expected
    assert found[0].processes > 1
    assert all(each.processes == max(gpus, 1) for each in found if each.backend == "NCCL")


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
def test_every_command_is_one_that_the_command_line_accepts(gpus):
    for each in launches(gpus):
        words = each.command
        start = words.index("train") + 1
        options = parse(Options, "train", words[start:], default=Options())
        assert options.recipe.steps == STEPS and options.device == each.device
        layout = Layout.parse(options.parallel, each.processes)
        layout.check(options.model, options.recipe, each.processes)
        assert f"--nproc-per-node={each.processes}" in words


# A stand-in for torchrun: it starts ranks that write metrics, and starts them again when one is killed.
AGENT = """
    import os, subprocess, sys, time
    rank_code = '''
    import json, os, pathlib, time
    run = pathlib.Path("runs/run"); run.mkdir(parents=True, exist_ok=True)
    if os.environ["RANK"] == "0":
        first = int(os.environ["FIRST"])
        lines = [json.dumps(dict(step=s)) for s in range(1, first)]
        for step in range(first, LAST + 1):
            lines.append(json.dumps(dict(step=step)))
            (run / "metrics.jsonl").write_text("".join(line + chr(10) for line in lines))
            time.sleep(0.1)
    else:
        time.sleep(60)
    '''.replace("LAST", sys.argv[1])
    first = 1
    while True:
        environments = [os.environ | dict(RANK=str(r), FIRST=str(first)) for r in range(2)]
        ranks = [subprocess.Popen([sys.executable, "-c", rank_code], env=each) for each in environments]
        while all(r.poll() is None for r in ranks):
            time.sleep(0.02)
        failed = any(r.poll() for r in ranks)
        for r in ranks:
            r.kill()
            r.wait()
        if not failed:
            break
        first = 6
"""


@pytest.fixture
def agent(tmp_path):
    """The command of the stand-in, which trains up to a step."""
    path = tmp_path / "agent.py"
    path.write_text(textwrap.dedent(AGENT))
    return lambda last: [str(path), str(last)]


def left(folder):
    """Processes that run in the folder of a watched run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_rank_is_seen_with_its_restart(agent, tmp_path):
    seen = watch(agent(KILL_AFTER + 4), tmp_path)
    assert seen.code == 0 and seen.killed is not None
    assert seen.resumed_from < seen.killed[2] and seen.steps[-1][1] <= KILL_AFTER + 4
    assert sorted(life.rank for life in seen.processes.values()) == [0, 0, 1, 1]
    assert left(tmp_path) == []
    figure = draw_run(seen, Launch(2, "cpu"))
    assert f"kill of rank {seen.killed[1]}" in figure.axes[0].get_title()


def test_a_run_that_was_over_before_it_could_be_killed_is_repeated(agent, tmp_path, monkeypatch):
    """As where this process gets no turn for long: the steps are first seen when they are all taken."""
    real = real_run._steps_in
    monkeypatch.setattr(real_run, "STEPS", 10)
    monkeypatch.setattr(real_run, "_watch_once", counted := Counted(real_run._watch_once))
    monkeypatch.setattr(real_run, "_steps_in", lambda path: 10 if counted.calls == 1 else real(path))
    seen = watch(agent(10), tmp_path)
    assert counted.calls == 2 and seen.killed is not None and seen.code == 0


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_an_interrupt_leaves_no_process(agent, tmp_path, monkeypatch):
    """As Jupyter's "interrupt the kernel" raises it, in the middle of the run."""

    def interrupted(path):
        if path.exists():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(real_run, "_steps_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch(agent(1000), tmp_path, kill=False)
    assert left(tmp_path) == []


def test_a_run_that_ignores_being_terminated_is_killed(tmp_path, monkeypatch):
    path = tmp_path / "deaf.py"
    path.write_text(
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path('runs/run').mkdir(parents=True);"
        "pathlib.Path('runs/run/metrics.jsonl').write_text(''); time.sleep(90)"
    )

    def interrupted(path):
        if path.exists():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(real_run, "_steps_in", interrupted)
    monkeypatch.setattr(real_run, "PATIENCE", 0.2)
    with pytest.raises(KeyboardInterrupt):
        watch([str(path)], tmp_path, kill=False)
    assert left(tmp_path) == []
