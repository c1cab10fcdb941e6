"""`minids rl` trains a base model and resumes a run."""

import dataclasses
import json

import pytest
from small_reasoner import RECIPE

from minids.cli.rl import rl_command
from minids.reasoning import r1_zero


def test_the_command_trains_a_base_teaches_it_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original = r1_zero.pretraining_text
    monkeypatch.setattr(r1_zero, "pretraining_text", lambda *args: original(*args, rows=40))
    recipe = dataclasses.replace(RECIPE, steps=3)
    rl_command(recipe=recipe, base_steps=4, variant="dr_grpo", name="one")
    assert "held_out/pass@1: " in capsys.readouterr().out
    folder = tmp_path / "runs" / "one"
    assert json.loads((folder / "run.json").read_text())["recipe"]["averaging"] == "constant"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    rl_command(recipe=recipe, base=folder, name="two")  # its model is a base like any other
    with pytest.raises(ValueError, match="exists: choose another --name"):
        rl_command(name="two")
    with pytest.raises(ValueError, match="has no run.json"):
        rl_command(resume=tmp_path)
    rl_command(resume=folder)
