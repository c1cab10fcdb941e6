"""Damaged runs: one line that names the file and what to do next, and the run is left as it is."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from test_mistakes import TRAIN

from minids.cli.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the run runs/good, of 4 steps, with two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("good")
        patch.chdir(place)
        text = "\n".join(f"{i} is followed by {i + 1}, and {i + 1} by {i + 2}." for i in range(2000))
        Path("text.jsonl").write_text(json.dumps({"text": text}))
        patch.setattr("sys.argv", ["minids", *TRAIN, "--name", "good"])
        assert main() == 0
    return place


@pytest.fixture
def damaged(trained, folder):
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    return folder / "runs/good"


def fields(change):
    """Damage of run.json: a function of a run's folder that replaces these fields, or removes those that are None."""

    def damage(run):
        path = run / "run.json"
        whole = json.loads(path.read_text()) | change
        path.write_text(json.dumps({name: value for name, value in whole.items() if change.get(name, 0) is not None}))

    return damage


def checkpoint(name, change):
    """Damage of a file of the newest checkpoint: a function of its content, None to remove it."""

    def damage(run):
        path = run / "checkpoints/step-00000004" / name
        path.write_bytes(change(path.read_bytes())) if change else path.unlink()

    return damage


def write(name, content):
    return lambda run: (run / name).write_bytes(content)


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DESCRIPTION = "run.json is damaged: not the description of a run"
OLDER = "delete runs/good/checkpoints/step-00000004 to go on from step-00000002"
DESCRIPTIONS = {
    "half": (write("run.json", b"{"), DESCRIPTION),
    "a list": (write("run.json", b"[]"), DESCRIPTION),
    "binary": (write("run.json", b"\xff\xfe\xff"), DESCRIPTION),
    "config is a number": (fields({"config": 3}), DESCRIPTION),
    "no recipe": (fields({"recipe": None}), DESCRIPTION),
    "unknown recipe field": (fields({"recipe": {"zteps": 3}}), DESCRIPTION),
    "steps is a word": (fields({"recipe": {"steps": "2"}}), "run.json"),  # in tests, annotations are checked first
    "max_bytes is a word": (fields({"max_bytes": "x"}), "run.json"),
    "data holds a number": (fields({"data": [3]}), "run.json"),
    "no steps": (fields({"recipe": {"steps": 0}}), "run.json: steps=0: must be a whole number, at least 1"),
    "no bytes": (fields({"max_bytes": 0}), "run.json: max_bytes=0: must be a whole number, at least 1"),
    "no data": (fields({"data": []}), "run.json: data=(): must name at least one source of text"),
    "data is a word": (fields({"data": "text.jsonl"}), "run.json: data='text.jsonl': must be a list"),
    "data is gone": (fields({"data": ["gone.txt"]}), "gone.txt does not exist"),
}
CHECKPOINTS = {
    "cut": checkpoint("model.safetensors", lambda content: content[:-100]),
    "bit of a weight": checkpoint("model.safetensors", flip),
    "bit of a moment": checkpoint("optimizer.safetensors", flip),
    "pickle": checkpoint("model.safetensors", lambda _: pickle.dumps({})),
    "bit of the state": checkpoint("state.json", flip),
    "state is a list": checkpoint("state.json", lambda _: b"[]"),
    "no state": checkpoint("state.json", None),
    "no optimizer": checkpoint("optimizer.safetensors", None),
}
METRICS = {
    "half a line in the middle": b'{"step": 1, "lo\n{"step": 2}\n',
    "binary": b"\xff\xfe\n",
    "no step": b'{"loss": 1}\n',
    "a list": b"[1]\n",
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_damaged_description_is_refused(damaged, refused, kind):
    damage, message = DESCRIPTIONS[kind]
    damage(damaged)
    refused("train --resume runs/good --device cpu", message)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_damaged_checkpoint_names_the_older_one(damaged, refused, minids, kind):
    CHECKPOINTS[kind](damaged)
    for command in ("train --resume runs/good --device cpu", "sample runs/good --prompt a", "export runs/good out"):
        refused(command, OLDER)
    shutil.rmtree(damaged / "checkpoints/step-00000004")
    assert minids("sample", "runs/good", "--prompt", "a", "--max-new-tokens", "2")[0] == 0


def test_only_checkpoint_that_is_damaged_names_no_other(damaged, refused):
    shutil.rmtree(damaged / "checkpoints/step-00000002")
    (damaged / "checkpoints/step-00000004/model.safetensors").write_bytes(b"")
    refused("sample runs/good --prompt a", "no earlier checkpoint is whole: start the run again")


def test_files_that_are_no_checkpoints_are_ignored(damaged, minids):
    (damaged / "checkpoints/step-99999999").write_text("")
    (damaged / "checkpoints/step-old").mkdir()
    status, _, error = minids("train", "--resume", "runs/good", "--steps", "6", "--device", "cpu")
    assert status == 0, error
    left = sorted(path.name for path in (damaged / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000006", "step-99999999", "step-old"]


@pytest.mark.parametrize("kind", METRICS)
def test_damaged_metrics_name_file_and_line(damaged, refused, kind):
    (damaged / "metrics.jsonl").write_bytes(METRICS[kind])
    refused("train --resume runs/good --device cpu", "runs/good/metrics.jsonl is damaged: line 1 is no JSON object")


@pytest.mark.parametrize("content", [None, b"", b'\n{"step": 1, "lo'])
def test_finished_run_without_metrics_is_reported(damaged, minids, content):
    path = damaged / "metrics.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    status, out, error = minids("train", "--resume", "runs/good", "--device", "cpu")
    assert status == 0, error
    assert "no loss.png: runs/good/metrics.jsonl is missing or empty" in out and "A sample:" in out


@pytest.mark.parametrize("content", ["[]", "{", '{"seed": "x"}', '{"recipe": {"steps": 0}}', '{"recipe": []}'])
@pytest.mark.parametrize("kind", ["rl", "r1"])
def test_damaged_description_of_reinforcement_learning_is_refused(folder, refused, kind, content):
    Path("runs/x").mkdir(parents=True)
    Path(f"runs/x/{kind}.json").write_text(content)
    refused(f"{kind} --resume runs/x --device cpu", "runs/x/")


def test_export_refuses_a_folder_that_is_no_export(damaged, refused):
    Path("file.txt").write_text("a")
    for destination in ("runs/good", ".", "file.txt", "file.txt/x"):
        refused(f"export runs/good {destination}", "")


def test_export_says_that_it_replaces_an_earlier_one(damaged, minids):
    assert "earlier" not in minids("export", "runs/good", "out")[1]
    assert "in place of an earlier export" in minids("export", "runs/good", "out")[1]
    assert Path("out/tokenizer.json").exists()


def test_sampling_options_beyond_their_range_are_refused(damaged, refused):
    for options, message in {
        "--temperature 1e-300": "temperature=1e-300: must be 0 (greedy) or at least",
        "--temperature nan": "temperature=nan",
        "--top-p 0": "top_p=0.0",
        "--max-new-tokens 0": "max_new_tokens=0: must be at least 1",
        "--max-new-tokens 100000": "the context holds",
        "--prompt \udc80": "",
    }.items():
        refused(["sample", "runs/good", "--prompt", "a", *options.split(" ")], message)
