"""Bad options, files, folders and runs: every command line ends with one line and status 2, and writes nothing."""

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest
from test_command_line import SMALL

from minids.config import ModelConfig

TRAIN = ["train", *SMALL, "--steps", "4", "--tokenizer", "bytes", "--checkpoint-every", "2"]

OPTIONS = {
    "": "no command: expected one of train, sample",
    "nope": "unknown command 'nope': expected one of train",
    "train --stepz 3": "Unrecognized options: --stepz",
    "train --optimizer sgd": "'sgd'",
    "train --preset nano --seq-len 5000 --data text.jsonl": "seq_len=5000: the context holds 4096",
    "train --preset nano --model.hidden-size 0": "hidden_size=0",
    "train --from nowhere": "there is no folder nowhere",
    "train --resume runs/none": "runs/none is not a run",
    "train --steps 0": "steps=0: must be a whole number, at least 1",
    "train --steps 1.5": "--steps: '1.5' is not a whole number; see minids train --help",
    "train --steps 99999999999999999999": "steps=99999999999999999999: must be at most",
    "train --steps": "Missing value for argument '--steps'",
    "train --learning-rate inf": "learning_rate=inf: must be a finite number above 0",
    "train --learning-rate x": "--learning-rate: 'x' is not a number",
    "train --seed 99999999999999999999": "seed=99999999999999999999",
    "train --precision fp4": "'fp4'",
    "train --preset TINY": "unknown preset 'TINY'",
    "train --preset ''": "unknown preset ''",
    "train --preset v3": "weights 2,723.13 GB, gradients 2,723.13 GB, optimizer 5,446.27 GB",
    "train --max-bytes x": "--max-bytes: 'x' is not a whole number; see",
    "train --max-bytes -5": "max_bytes=-5: must be a whole number",
    "train --parallel ep=2": "ep=2",
    "train --parallel ep=\u0661": "ep='\u0661': must be a whole number",
    "train --parallel garbage": "parallel='garbage': allows pp, dp, ep, schedule",
    "train --data": "data=(): must name at least one source of text",
    "train --data hf:": "corpus 'hf:' names no dataset: expected hf:DATASET",
    "train extra": "extra",
    "sample --prompt a": "there is no run under runs/: train one first",
    "sample --seed -1": "seed=-1",
    "sample runs/none --prompt a": "there is no folder runs/none",
    "export runs/none out": "there is no folder runs/none",
    "import . theirs": "config.json",
    "rl --group-size 1": "group_size=1: must be at least 2",
    "rl --base-steps 0": "base_steps=0: must be a whole number, at least 1",
    "rl --learning-rate 0": "learning_rate=0",
    "rl --base nowhere": "there is no folder nowhere",
    "rl --format-weight nan": "format_weight=nan: must be a finite number",
    "rl --max-new-tokens 100000": "max_new_tokens=100000: must be at most",
    "rl --max-cache-bytes 1": "max_cache_bytes=1: must be at least",
    "rl --variant ppo": "'ppo'",
    "r1 --stages nope": "there is no 'nope'",
    "r1 --stages": "stages: name at least one of base, zero",
    "r1 --seed -1": "seed=-1",
    "cost v9": "'v9': neither a preset",
    "schedule dualpipe --ranks 3": "must be even",
    "schedule dualpipe --ranks 8 --micro-batches 3": "micro_batches=3: must be even",
    "schedule --png no/chart.png": "no/chart.png",
    "schedule dualpipe --ranks 8 --micro-batches 100000": "micro_batches=100000: must be at most 4,096 with 8 ranks",
    "schedule gpipe --ranks 100000 --micro-batches 1": "ranks=100000: must be at most 1,024",
    "bench speed": "'speed'",
    "bench train --repeats 1": "repeats=1",
    "bench train --repeats 0": "repeats=0",
    "grade nowhere": "nowhere",
    "grade students --csv points --junit points": "--csv and --junit are the same file",
    "grade students --csv no/points.csv": "there is no folder no",
    "train --resume runs/none --steps 5": "runs/none is not a run",
    "train --resume runs/none --seed 1": "--seed: not allowed with --resume",
}

NAMES = ["a/b", "../escape", "/tmp/x", "..", ".", "a\\b", "a\nb", "x" * 300, "\udc80"]

EMPTY = [
    "train --data ''",
    "train --data=",
    "train --tokenizer ''",
    "train --name ''",
    "train --resume ''",
    "sample '' --prompt a",
    "export runs/x ''",
    "import '' x",
    "import folder ''",
    "rl --base ''",
    "rl --name ''",
    "r1 --name ''",
    "cost ''",
    "grade ''",
    "grade students --csv ''",
    "schedule --png ''",
]

PARQUET = {"nocolumn": {"body": ["a"]}, "numbers": {"text": [1, 2]}, "norows": {"text": pyarrow.array([], "string")}}
TEXT = {
    "empty.txt": (b"", "empty.txt holds no text"),
    "spaces.txt": (b" \n\t\n" * 100, "holds no text"),
    "short.txt": (b"hello world\n", "too short"),
    "binary.txt": (bytes(range(256)), "is not UTF-8"),
    "zero.parquet": (b"", "zero.parquet"),
    "damaged.parquet": (b"PAR1" + bytes(100) + b"PAR1", "damaged.parquet"),
    "nocolumn.parquet": (None, "nocolumn.parquet"),
    "numbers.parquet": (None, "numbers.parquet"),
    "norows.parquet": (None, "norows.parquet"),
    "key.jsonl": (b'{"txt": "a"}\n', "key.jsonl"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl"),
    "half.jsonl": (b'{"text": "a b c"}\n{"text": "d', "half.jsonl"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl"),
    "null.jsonl": (b"null\n", "records whose text is null, skipped: 1"),
    "surrogate.jsonl": (b'{"text": "\\ud800 abc"}\n', "surrogate.jsonl"),
}

TOKENIZERS = {
    "bpe:": "bpe:",
    "bpe:10": "10: must be at least 265",
    "bpe:\u00b2": "must be a whole number",
    "bpe:99999999999999999999": "must be a whole number below",
    "nowhere.json": "nowhere.json",
    "{}": "tokenizer.json",
    "[1]": "tokenizer.json",
    '{"type": "symbols", "symbols": []}': "must hold at least one symbol",
    '{"type": "symbols", "symbols": ["a"]}': "is not a symbol of this tokenizer",
}

CONFIG = ModelConfig.preset("nano").to_hf()
CONFIGS = {
    "another architecture": ({"model_type": "llama"}, "llama"),
    "a billion layers": (CONFIG | {"num_hidden_layers": 10**9}, ""),
    "NaN": (CONFIG | {"hidden_size": float("nan")}, "hidden_size=nan"),
    "a word for a number": (CONFIG | {"hidden_size": "big"}, "hidden_size='big'"),
    "a field is missing": ({"model_type": "deepseek_v3"}, "config.json lacks 'hidden_size'"),
    "a list": ([1], "config"),
}


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    """A mistake that is not noticed fails the test at once, before a model is allocated."""

    def start(*arguments, **options):
        raise AssertionError("the training has begun")

    monkeypatch.setattr("minids.cli.train._make_trainer", start)
    monkeypatch.setattr("minids.training.loop.Loop.run", start)


@pytest.mark.parametrize("command", OPTIONS)
def test_bad_option_is_refused(folder, refused, command):
    Path("students/ann").mkdir(parents=True)
    refused(command, OPTIONS[command])


@pytest.mark.parametrize("command", EMPTY)
def test_empty_argument_is_not_taken_for_the_current_folder(refused, command):
    refused(command, "'': must not be empty")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_name_that_is_not_one_folder_is_refused(refused, name):
    for command in (TRAIN, ["rl"], ["r1"]):
        refused([*command, "--name", name], "must name one folder")
    refused(["import", "theirs", name], "must name one folder")


@pytest.mark.parametrize("name", TEXT)
def test_bad_text_is_refused(refused, name):
    content, message = TEXT[name]
    if content is None:
        pyarrow.parquet.write_table(pyarrow.table(PARQUET[Path(name).stem]), name)
    else:
        Path(name).write_bytes(content)
    refused([*TRAIN, "--data", name], message)


SOURCES = {
    "folder": "holds no text",
    "pictures": "x.png",
    "nowhere": "does not exist",
    "link": "does not exist",
    "pipe": "pipe is neither a file nor a folder",
    "/dev/null": "is neither a file nor a folder",
    "a\0b": "does not exist",
    "text.jsonl/x": "does not exist",
}


@pytest.mark.parametrize("name", SOURCES, ids=ascii)
def test_source_that_is_no_text_file_is_refused(refused, name):
    Path("folder").mkdir()
    Path("pictures").mkdir()
    Path("pictures/x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    Path("link").symlink_to("link")
    os.mkfifo("pipe")
    refused([*TRAIN, "--data", name], SOURCES[name])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_bad_tokenizer_is_refused(refused, tokenizer):
    name = tokenizer
    if tokenizer[0] in "{[":
        name = "tokenizer.json"
        Path(name).write_text(tokenizer)
    refused([*TRAIN, "--tokenizer", name], TOKENIZERS[tokenizer])


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_config_is_neither_imported_nor_counted(refused, kind):
    config, message = CONFIGS[kind]
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text(json.dumps(config))
    refused("import theirs x --tokenizer bytes", message)
    if kind not in ("another architecture", "a billion layers"):  # dense models are counted, and there is no limit
        refused("cost theirs", message)
