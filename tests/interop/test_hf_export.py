"""Exports that are refused, and exports that fail half-way and leave the earlier folder as it was."""

from pathlib import Path

import pytest
from hf_folders import assert_same, make_model

from minids.interop.hf import load_pretrained, save_pretrained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "gqa"}, "attention='gqa'"),
        ({"scoring_func": "softmax", "topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
    ],
)
def test_models_that_v3_cannot_express_are_not_exported(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_pretrained(make_model(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def snapshot(folder: Path):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path):
    save_pretrained(make_model(), tmp_path / "deep/out", max_shard_bytes=100_000)
    second = make_model()
    save_pretrained(second, tmp_path / "deep/out")
    assert sorted(path.name for path in (tmp_path / "deep/out").iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_pretrained(tmp_path / "deep/out"), second)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in (tmp_path / "deep/out").iterdir()}) == 1


@pytest.mark.parametrize("foreign", ["notes.txt", "config.json", "model.safetensors"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, foreign):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / foreign).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"is not an earlier export .it holds '{foreign}'"):
        save_pretrained(make_model(), tmp_path / "out")
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(make_model(), tmp_path / "out" / foreign)
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_pretrained(make_model(), tmp_path / "new", max_shard_bytes=0)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("limit", [100, 100_000])
def test_a_full_disk_leaves_the_earlier_export(tmp_path, limit):
    """The system refuses to let any file grow beyond `limit`: config.json fails at once, or the second shard does."""
    resource = pytest.importorskip("resource")
    save_pretrained(make_model(), tmp_path / "out")
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for name in ("out", "new"):
            with pytest.raises(OSError, match="File too large"):
                save_pretrained(make_model(intermediate_size=512), tmp_path / name, max_shard_bytes=90_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == before


def test_a_refused_move_brings_the_earlier_export_back(tmp_path, monkeypatch):
    save_pretrained(make_model(), tmp_path / "out")
    before = snapshot(tmp_path)
    rename = Path.rename

    def refuse_the_new_folder(path, target):
        if target == tmp_path / "out" and path.suffix != ".old":
            raise PermissionError(f"{target}: in use")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_folder)
    with pytest.raises(PermissionError):
        save_pretrained(make_model(), tmp_path / "out")
    assert snapshot(tmp_path) == before
