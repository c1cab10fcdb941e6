"""The benchmark of programs judges as the sandbox does, and never takes an interrupted run for a complete one."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import programs
from minids.sandbox.errors import IsolationUnavailable
from minids.sandbox.judge import Sandbox

NAME = "hidden, seed 3"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results' path; nothing is trained and no program is run."""
    monkeypatch.setattr(programs, "BASES", tmp_path / "bases")
    monkeypatch.setattr(programs, "RESULTS", tmp_path / "programs.json")
    monkeypatch.setattr(programs, "BehaviourJudge", lambda: None)
    monkeypatch.setattr(sys, "argv", ["programs.py"])
    return tmp_path / "programs.json"


def test_behaviour_judge_gives_the_verdicts_of_the_sandbox():
    try:
        sandbox = Sandbox()
    except IsolationUnavailable as reason:
        pytest.skip(str(reason))
    judge = programs.BehaviourJudge()
    tests = "assert f(0) == 5\nassert f(39) == 83"
    unreadable = "def f(a): return f"  # the process that runs all of them cannot send its results
    answers = ("def f(a): b=a*2; c=b+5; return c", "def f(a): return 5", "def f(a): b", unreadable)
    jobs = [*((answer, tests) for answer in answers), (answers[1], "assert f(4) == 5")]
    verdicts = [verdict.passed for verdict in sandbox.run_many(jobs)]
    assert verdicts == [True, False, False, False, True]
    assert [verdict.passed for verdict in judge(jobs)] == verdicts
    assert len(judge.results) == 4  # the second program ran once


def test_base_that_was_interrupted_gets_no_marker(results, monkeypatch, tmp_path):
    stopped = SimpleNamespace(step=400, run=lambda directory, progress: directory.mkdir(parents=True))
    monkeypatch.setattr(programs, "base_trainer", lambda *_: stopped)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 400 of 1200"):
        programs.base(programs.RUNS[NAME])
    assert not list(tmp_path.rglob("seconds"))


def test_interrupted_benchmark_keeps_complete_runs_and_repeats_only_the_rest(results, monkeypatch):
    asked = []

    def interrupted_in_the_third(name, run, judge):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"seed": run.seed}

    monkeypatch.setattr(programs, "carry_out", interrupted_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        programs.main()
    names = list(programs.RUNS)
    assert asked == names[:3] and list(json.loads(results.read_text())["runs"]) == names[:2]
    programs.main()
    assert asked[3:] == names[2:] and list(json.loads(results.read_text())["runs"]) == names
    programs.main()
    assert len(asked) == len(names) + 1


def test_runs_of_a_seed_share_the_base_model_of_their_corpus():
    runs = programs.RUNS
    assert runs["hidden, seed 4"].base_name == runs["weak, seed 4"].base_name
    others = [runs[name].base_name for name in ("weak, seed 5", "weak, few cheats, seed 4", "guessed, seed 4")]
    assert len({runs["weak, seed 4"].base_name, *others}) == 4
