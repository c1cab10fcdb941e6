"""One kind of run: every command leaves a folder that every other one reads, and nothing where it could not begin."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_command_line import SMALL

from minids.training.checkpoint import OLD_NAMES, latest_checkpoint, load_model, write_state
from minids.training.run import load_run, locked, newest_run, read_metrics, read_run

pytestmark = pytest.mark.usefixtures("folder")


def losses(run):
    return [metrics["loss"] for metrics in read_metrics(Path(run))]


def test_an_imported_model_is_a_run_that_can_be_trained_on(minids):
    assert minids("train", *SMALL, "--steps", "10")[0] == 0
    assert minids("export", "runs/nano", "exported")[0] == 0
    assert minids("import", "exported", "theirs")[0] == 0
    assert read_run(Path("runs/theirs"))["kind"] == "import" and newest_run() == Path("runs/theirs")
    status, _, error = minids("train", "--resume", "runs/theirs")
    assert status == 2 and "use --from runs/theirs" in error

    recipe = [word for word in SMALL if word not in ("--preset", "nano")]
    assert minids("train", *recipe, "--steps", "2", "--from", "runs/theirs", "--name", "on", "--tokenizer=x")[0] == 2
    status, _, error = minids("train", *recipe, "--steps", "2", "--from", "runs/theirs", "--name", "on")
    assert status == 0, error
    assert losses("runs/on")[0] < losses("runs/nano")[0] - 0.5  # it begins where the other had come to
    assert load_run(Path("runs/on"))[0].config == load_run(Path("runs/theirs"))[0].config


def test_a_finished_run_trains_on_with_more_steps(minids):
    assert minids("train", *SMALL, "--steps", "5")[0] == 0
    before = losses("runs/nano")
    status, _, error = minids("train", "--resume", "runs/nano", "--steps", "8", "--device", "cpu")
    assert status == 0, error
    assert losses("runs/nano")[:5] == before and len(losses("runs/nano")) == 8
    assert read_run(Path("runs/nano"))["recipe"]["steps"] == 8
    for options, complaint in (
        (["--steps", "3"], "--steps 3 with --resume: must be at least the 8 steps of the run"),
        (["--learning-rate", "0.1"], "--learning-rate: not allowed with --resume"),
        (["--model.n-routed-experts", "64"], "--model.n-routed-experts: not allowed with --resume"),
    ):
        status, _, error = minids("train", "--resume", "runs/nano", *options)
        assert status == 2 and complaint in error and error.count("\n") == 1


def test_single_sizes_of_the_model_can_be_set(minids):
    status, _, error = minids("train", *SMALL, "--steps", "1", "--model.n-routed-experts", "16")
    assert status == 0, error
    assert load_run(Path("runs/nano"))[0].config.n_routed_experts == 16


def test_a_run_of_version_0_1_is_read(minids):
    """Without a kind in run.json, and with the old names of MLA's query matrices in its checkpoint."""
    assert minids("train", *SMALL, "--steps", "5")[0] == 0
    run, wanted = Path("runs/nano"), load_model(Path("runs/nano")).state_dict()
    fields = read_run(run)
    (run / "run.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in ("kind", "start_from")}))
    checkpoint = latest_checkpoint(run / "checkpoints")
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        for old, new in OLD_NAMES.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        save_file(tensors, path)
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    (checkpoint / "state.json").unlink()
    write_state(checkpoint, state)
    assert any("q_proj.0" in name for name in load_file(checkpoint / "model.safetensors"))
    got = load_model(run).state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert minids("train", "--resume", "runs/nano", "--steps", "6")[0] == 0
    (run / "run.json").unlink()
    (run / "rl.json").write_text(json.dumps({"task": "trace"}))
    assert read_run(run) == {"kind": "rl", "task": "trace"} and newest_run() == run


def test_one_process_at_a_time_works_in_a_run(tmp_path):
    with locked(tmp_path):
        with pytest.raises(ValueError, match="is in use by another process: wait for it, or stop it first"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


def test_newest_run_is_found_beside_links_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/run.json").write_text("{}")
    Path("runs/one/backup").symlink_to("/nowhere")
    Path("runs/two").symlink_to("/nowhere")
    assert newest_run() == Path("runs/one")
