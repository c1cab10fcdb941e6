"""Damaged runs: one line that names the file and what to do next, and the run is left as it is."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mistakes import TRAIN

from minids.cli.main import main
from minids.data.tokenizer import SymbolTokenizer
from minids.training.checkpoint import write_state


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


def test_more_steps_are_not_stored_where_the_checkpoint_is_damaged(damaged, refused):
    (damaged / "checkpoints/step-00000004/optimizer.safetensors").write_bytes(b"")
    refused("train --resume runs/good --steps 6 --device cpu", OLDER)  # run.json is as it was


def rewrite(run, file, change, change_state=lambda state: state):
    """Change the tensors of a file of the newest checkpoint, and its state, with the checksums that fit."""
    folder = run / "checkpoints/step-00000004"
    path, state = folder / f"{file}.safetensors", json.loads((folder / "state.json").read_text())["state"]
    save_file(change(load_file(path)), path)
    (folder / "state.json").unlink()
    write_state(folder, change_state(state))


def change_weight(run, name, change):
    rewrite(run, "model", lambda tensors: tensors | {name: change(tensors[name])})


def config(**fields):
    return lambda state: state | {"config": state["config"] | fields}


NAME = "layers.1.ffn_norm.weight"
FOREIGN = {
    "no weight": ("model", lambda tensors: {n: t for n, t in tensors.items() if n != NAME}),
    "another weight": ("model", lambda tensors: tensors | {"zzz": torch.zeros(1)}),
    "no weights": ("model", lambda tensors: {}),
    "another shape": ("model", lambda tensors: tensors | {NAME: torch.zeros(3)}),
    "a billion layers": ("model", dict, config(num_hidden_layers=10**9)),
    "another width": ("model", dict, config(hidden_size=32)),
    "no config": ("model", dict, lambda state: {n: v for n, v in state.items() if n != "config"}),
    "config is a number": ("model", dict, lambda state: state | {"config": 3}),
    "recipe is null": ("model", dict, lambda state: state | {"recipe": None}),
}
FOREIGN_RUN = {
    "no step": ("model", dict, lambda state: {n: v for n, v in state.items() if n != "step"}),
    "no position": ("model", dict, lambda state: {n: v for n, v in state.items() if n != "data"}),
    "no random state": ("random", lambda tensors: {}),
    "short random state": ("random", lambda tensors: {"cpu": tensors["cpu"][:3]}),
    "random state of floats": ("random", lambda tensors: {"cpu": tensors["cpu"].float()}),
}


@pytest.mark.parametrize("kind", FOREIGN | FOREIGN_RUN)
def test_checkpoint_that_is_intact_but_of_something_else_is_refused(damaged, refused, kind):
    rewrite(damaged, *(FOREIGN | FOREIGN_RUN)[kind])
    refused("train --resume runs/good --device cpu", "runs/good/checkpoints/step-00000004")
    if kind in FOREIGN:
        for command in ("sample runs/good --prompt a", "export runs/good out"):
            refused(command, "step-00000004 does not hold a run of this model: ")


def test_weights_of_other_dtypes_are_not_loaded(damaged, refused):
    change_weight(damaged, NAME, lambda tensor: tensor.half())
    refused("sample runs/good --prompt a", "weights of several dtypes, torch.float16, torch.float32")
    rewrite(damaged, "model", lambda tensors: {n: tensor.long() for n, tensor in tensors.items()})
    refused("sample runs/good --prompt a", "step-00000004 does not hold a run of this model: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_sampled_nor_exported(damaged, refused, value):
    change_weight(damaged, "layers.1.ffn_norm.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))
    for command in ("sample runs/good --prompt a", "export runs/good out"):
        refused(command, "runs/good: layers.1.ffn_norm.weight holds NaN or infinite weights")


def test_tokenizer_of_another_run_is_refused_where_it_has_more_tokens(damaged, refused):
    SymbolTokenizer([chr(i) for i in range(32, 700)]).save(damaged)
    for command in ("sample runs/good --prompt a", "export runs/good out"):
        refused(command, "runs/good: the tokenizer's vocabulary of 677 is larger than the model's 265")


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
    refused(f"{kind} --resume runs/x --device cpu", f"runs/x/{kind}.json")


def test_export_refuses_a_folder_that_is_no_export(damaged, refused):
    Path("file.txt").write_text("a")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("gone")
    for destination, message in {
        "runs/good": "is not an earlier export (it holds 'checkpoints')",
        ".": "is not an earlier export",
        "file.txt": "file.txt: is a file, must be a directory",
        "file.txt/x": "file.txt is a file, must be a directory",
        "file.txt/x/y": "file.txt is a file, must be a directory",
        "loop": "loop: is a link that leads nowhere",
        "dangling": "dangling: is a link that leads nowhere",
    }.items():
        refused(f"export runs/good {destination}", message)


def test_export_says_that_it_replaces_an_earlier_one(damaged, minids):
    assert "earlier" not in minids("export", "runs/good", "out")[1]
    assert "in place of an earlier export" in minids("export", "runs/good", "out")[1]
    assert Path("out/tokenizer.json").exists()


def test_smallest_nucleus_holds_one_token(damaged, minids):
    greedy, nucleus = (
        minids("sample", "runs/good", "--prompt", "a", "--max-new-tokens", "4", *options)
        for options in (("--temperature", "0"), ("--top-p", "1e-300"))
    )
    assert nucleus == greedy and greedy[0] == 0


def test_sampling_options_beyond_their_range_are_refused(damaged, refused):
    for options, message in {
        "--temperature 1e-300": "temperature=1e-300: must be 0 (greedy) or at least",
        "--temperature nan": "temperature=nan",
        "--top-p 0": "top_p=0.0",
        "--max-new-tokens 0": "max_new_tokens=0: must be at least 1",
        "--max-new-tokens 100000": "the context holds",
        "--prompt \udc80": "prompt='\\udc80': must be UTF-8 text",
    }.items():
        refused(["sample", "runs/good", "--prompt", "a", *options.split(" ")], message)
