"""Foreign folders through the command line: their tokenizer is kept, and a missing one is never taken for bytes."""

from pathlib import Path

import pytest
from foreign import BEGIN, END, PADDED, save_checkpoint
from test_command_line import SMALL
from transformers import AutoTokenizer

from minids.config import ModelConfig
from minids.data.tokenizer import ByteTokenizer
from minids.interop.hf import save_pretrained
from minids.model.transformer import MiniDS
from minids.training.run import load_run

pytestmark = pytest.mark.usefixtures("folder")
TEXT = "The model says 12 + 3, größer"


def save_model(vocab_size: int, name: str = "theirs") -> None:
    save_pretrained(MiniDS(ModelConfig.preset("nano", vocab_size=vocab_size)), name)


def test_an_imported_folder_keeps_its_tokenizer(minids):
    """Through sampling, training and export; also ids that pad the vocabulary can be sampled and shown."""
    save_checkpoint(Path("theirs"))
    ids = AutoTokenizer.from_pretrained("theirs").encode(TEXT)
    assert minids("import", "theirs", "x")[0] == 0
    status, output, error = minids("sample", "runs/x", "--prompt", "The model", "--max-new-tokens", "60")
    assert (status, error) == (0, "") and output.startswith("The model")
    recipe = [word for word in SMALL if word not in ("--preset", "nano")]
    status, _, error = minids("train", *recipe, "--steps", "1", "--from", "runs/x", "--name", "on")
    assert status == 0, error
    for run in ("runs/x", "runs/on"):
        model, tokenizer = load_run(Path(run))
        assert tokenizer.encode(TEXT) == ids and tokenizer.vocab_size == model.config.vocab_size == PADDED
        assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id], skip_special=False) == BEGIN + END
    assert minids("export", "runs/on", "back")[0] == 0
    assert AutoTokenizer.from_pretrained("back").encode(TEXT) == ids


@pytest.mark.parametrize("file", ["tiktoken.model", "tokenizer.model", None])
def test_a_folder_without_tokenizer_json_is_refused_with_the_reason(minids, file):
    save_model(640)
    if file is not None:
        (Path("theirs") / file).write_text("SGVsbG8= 0\n")
    status, _, error = minids("import", "theirs", "x")
    wanted = f"holds {file}, which is not read, but no tokenizer.json" if file else "holds no tokenizer.json"
    assert status == 2 and wanted in error and "--tokenizer" in error and error.count("\n") == 1
    assert not Path("runs/x").exists()


def test_another_tokenizer_can_be_named(minids):
    save_model(640)
    assert minids("import", "theirs", "a", "--tokenizer", "bytes")[0] == 0
    assert isinstance(load_run(Path("runs/a"))[1], ByteTokenizer)
    save_checkpoint(Path("other"))
    assert minids("import", "theirs", "b", "--tokenizer", "other")[0] == 0
    assert load_run(Path("runs/b"))[1].encode(TEXT) == AutoTokenizer.from_pretrained("other").encode(TEXT)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(minids):
    save_model(264)
    status, _, error = minids("import", "theirs", "x", "--tokenizer", "bytes")
    assert status == 2 and "vocab_size=264: the tokenizer has 265 tokens" in error
    assert not Path("runs/x").exists()
