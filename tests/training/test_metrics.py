"""TensorBoard beside the metrics file: the same numbers, each step once; one clear line where it is missing."""

import json
import sys

import pytest
from training.helpers import RECIPE, counting_data, nano

from minids.cli import train as train_command
from minids.training import loop
from minids.training.pretrain import train


def test_tensorboard_shows_what_the_metrics_file_holds(tmp_path):
    """Also of a run that was killed after its eighth step and goes on from the sixth."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def kill(metrics):
        if metrics["step"] == 8:
            raise KeyboardInterrupt

    options = dict(directory=tmp_path, progress=False, tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        train(nano(), counting_data(), RECIPE, on_step=kill, **options)
    train(nano(), counting_data(), RECIPE, **options)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {name for line in lines for name in line} - {"step"}
    assert set(shown.Tags()["scalars"]) == names and "validation_bits_per_byte" in names
    for name in names:
        expected = {line["step"]: pytest.approx(line[name], rel=1e-6) for line in lines if name in line}
        events = shown.Scalars(name)
        assert {event.step: event.value for event in events} == expected and len(events) == len(expected)


def test_no_checkpoint_is_newer_on_disk_than_its_metrics(tmp_path, monkeypatch):
    """metrics.jsonl is flushed to disk, with every step so far, before a checkpoint is written."""
    flushed, once = [], loop.flush_to_disk

    def flush(path):
        flushed.append(len(path.read_text().splitlines()))
        assert not (tmp_path / f"checkpoints/step-{flushed[-1]:08d}").exists()
        once(path)

    monkeypatch.setattr(loop, "flush_to_disk", flush)
    train(nano(), counting_data(), RECIPE, directory=tmp_path, progress=False)
    written = [int(path.name[-8:]) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert flushed[-2:] == written and len(flushed) >= 2


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="^tensorboard=True: needs `pip install tensorboard`"):
        train_command.run("train", ["--preset", "nano", "--data", "no such text", "--tensorboard"])
    assert not list(tmp_path.iterdir())
