"""The text chart of a schedule, and `minids schedule`."""

import json
from typing import get_args

import pytest
import tyro
from PIL import Image

from minids.cli.schedule import schedule_command
from minids.parallel.dualpipe import dualpipe
from minids.parallel.gantt import gantt
from minids.parallel.one_f_one_b import gpipe, one_f_one_b
from minids.parallel.schedules import SCHEDULES, ScheduleName


def test_gantt_by_hand():
    assert gantt(one_f_one_b(2, 2).simulate()).split("\n") == [
        "rank 0  F0F1....B0--..B1--",
        "rank 1  ..F0B0--F1B1--....",
    ]
    assert gantt(dualpipe(2, 4).simulate()).split("\n") == [
        "rank 0  F0f0F1b0--f1B0--b1--I1W1",
        "rank 1  f0F0f1B0--F1b0--B1--i1w1",
    ]


def test_gantt_leaves_out_numbers_rather_than_cut_them():
    timeline = gpipe(2, 12).simulate()
    assert gantt(timeline).startswith("rank 0  " + "".join(f"F{m}".ljust(3, "-") for m in range(12)))
    narrow = gantt(timeline, width=39 * 2).split("\n")
    assert narrow[0].startswith("rank 0  F0F1F2F3F4F5F6F7F8F9F-F-......B0--")
    assert [len(line) for line in narrow] == [8 + 39 * 2] * 2


def command(capsys, *arguments):
    tyro.cli(schedule_command, args=list(arguments))
    return capsys.readouterr().out


def test_the_command_prints_actions_and_simulation_as_json(capsys):
    said = json.loads(command(capsys, "dualpipe", "--ranks", "4", "--micro-batches", "8", "--json"))
    schedule = dualpipe(4, 8)
    timeline = schedule.simulate()
    assert list(said) == ["actions", "simulation"]
    assert said["actions"][0][0] == {"kind": "F", "direction": 0, "micro_batch": 0, "stage": 0}
    assert said["actions"][3][0] == {"kind": "F", "direction": 1, "micro_batch": 0, "stage": 0}
    pair = next(action for action in said["actions"][0] if action["kind"] == "FB")
    forward, backward = next(action for action in schedule.actions[0] if action.kind == "FB")
    assert pair == {
        "kind": "FB",
        "forward": {"direction": forward.direction, "micro_batch": forward.micro_batch, "stage": forward.stage},
        "backward": {"direction": backward.direction, "micro_batch": backward.micro_batch, "stage": backward.stage},
    }
    assert said["simulation"] == {
        "makespan": 26,
        "bubble": [2] * 4,
        "peak_activations": [5] * 4,
        "parameters": [0.5] * 4,
        "start": [[span.start for span in rank] for rank in timeline.spans],
        "end": [[span.end for span in rank] for rank in timeline.spans],
    }


def test_the_command_accepts_every_schedule():
    assert get_args(ScheduleName) == tuple(SCHEDULES)


def test_the_command_prints_a_gantt_and_a_table(capsys):
    said = command(capsys, "dualpipe", "--ranks", "8", "--micro-batches", "20").splitlines()
    assert said[:8] == gantt(dualpipe(8, 20).simulate()).split("\n")
    assert [line.split() for line in said[-3:]] == [
        ["dualpipe", "2x", "9", "6", "6", "66"],
        ["one_f_one_b", "1x", "8", "21", "21", "81"],
        ["zb1p", "1x", "8", "7", "7", "67"],
    ]


def test_the_command_compares_all_and_says_who_does_not_take_the_size(capsys):
    said = command(capsys, "gpipe", "--ranks", "3", "--micro-batches", "5", "--all")
    assert all(name in said for name in SCHEDULES)
    assert "dualpipe does not allow this size: ranks=3: must be even" in said
    rows = json.loads(command(capsys, "gpipe", "--all", "--json"))["comparison"]
    assert [row["schedule"] for row in rows] == list(SCHEDULES)


def test_the_command_writes_a_picture_and_prints_as_without(capsys, tmp_path):
    for form in ([], ["--json"]):
        path = tmp_path / "picture"  # PNG whatever its name
        size = ["zb1p", "--ranks", "2", "--micro-batches", "3", *form]
        assert command(capsys, *size, "--png", str(path)) == command(capsys, *size)
        picture = Image.open(path)
        assert picture.format == "PNG" and picture.size[0] > 1000
        path.unlink()
    with pytest.raises(OSError, match="No such file"):
        command(capsys, *size, "--png", str(tmp_path / "nowhere" / "picture.png"))
