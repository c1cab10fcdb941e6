"""A checkpoint's own tokenizer reads and writes as transformers does, and every broken one is one clear line."""

import json
import shutil

import pytest
import tokenizers
import torch
from foreign import BEGIN, END, PADDED, VOCAB, save_checkpoint
from transformers import AutoTokenizer

from minids.interop.hf import load_pretrained, save_pretrained
from minids.interop.tokenizer import CheckpointTokenizer
from minids.reasoning.rewards import read_response

TEXTS = ["The model 12 + 3", "", "Größe 专家 🐳\n\tx", f"a{END}b{BEGIN}", "<think>1</think>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def changed(folder, tmp_path):
    """A function that makes a copy in which some fields of a file are others."""

    def change(name, **fields):
        copy = shutil.copytree(folder, tmp_path / "copy")
        content = json.loads((copy / name).read_text()) | fields
        (copy / name).write_text(json.dumps(content))
        return copy

    return change


@pytest.mark.parametrize("text", TEXTS)
def test_it_is_the_tokenizer_that_transformers_loads(folder, text):
    ours, theirs = CheckpointTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for special in (False, True):
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=not special)
        assert ours.encode(text, allow_special=special) == ids
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert [array.tolist() for array in ours.encode_batch([text, "x"])] == [ours.encode(text), ours.encode("x")]
    assert ours.token_bytes()[ours.encode(text)].sum() == len(text.encode())


def test_its_names_and_its_padding(folder):
    tokenizer = CheckpointTokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, PADDED)
    assert tokenizer.token_id("<eos>") == 1 and tokenizer.token_id("<think>") == -1
    with pytest.raises(ValueError, match="unknown special token '<user>x'"):
        tokenizer.token_id("<user>x")
    assert tokenizer.decode([VOCAB, *tokenizer.encode("a")]) == "\ufffda"
    with pytest.raises(ValueError, match="must be in"):
        tokenizer.decode([PADDED])


def test_a_response_ends_with_its_own_end(folder):
    tokenizer = CheckpointTokenizer(folder)
    response = read_response([*tokenizer.encode("so <answer>1</answer>"), tokenizer.eos_id], tokenizer)
    assert response.ended and response.text == f"so <answer>1</answer>{END}" and response.answer is None


def test_tags_that_the_checkpoint_knows_are_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    core = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    core.add_tokens(["<think>", "</think>"])  # no special tokens, as in R1
    core.add_special_tokens(["<answer>", "</answer>"])
    core.save(str(copy / "tokenizer.json"))
    tokenizer = CheckpointTokenizer(copy)
    text = f"<think>ab</think><answer>7</answer>{END}"
    response = read_response(tokenizer.encode(text, allow_special=True), tokenizer)
    assert (response.thought, response.answer, response.well_formed) == ("ab", "7", True)
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == "<think>ab</think>7"


def test_the_notation_of_the_release(changed):
    """There a token of tokenizer_config.json is an object, and tokens that are not named are null."""
    end = {"__type": "AddedToken", "content": END, "lstrip": False}
    tokenizer = CheckpointTokenizer(changed("tokenizer_config.json", eos_token=end, pad_token=None))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, -1)


def test_an_export_takes_it_along_and_can_be_repeated(folder, tmp_path):
    model, tokenizer = load_pretrained(folder, dtype=torch.float32), CheckpointTokenizer(folder)
    for _ in range(2):
        save_pretrained(model, tmp_path / "out")
        tokenizer.save(tmp_path / "out")
    again = CheckpointTokenizer(tmp_path / "out")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert vars(again)["_special_ids"] == vars(tokenizer)["_special_ids"]


BROKEN = {
    "no bos": ("tokenizer_config.json", {"bos_token": None}, "must name a bos_token and an eos_token"),
    "unknown eos": ("tokenizer_config.json", {"eos_token": "<none>"}, "must name a bos_token and an eos_token"),
    "a number": ("tokenizer_config.json", {"eos_token": {"id": 1}}, "cannot be read: 'content'"),
    "no model": ("tokenizer.json", {"model": 3}, "cannot be read: "),
    "no vocabulary": ("config.json", {"vocab_size": None}, "cannot be read: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_is_refused_in_one_line(changed, name):
    file, fields, words = BROKEN[name]
    with pytest.raises(ValueError, match=words) as error:
        CheckpointTokenizer(changed(file, **fields))
    assert "\n" not in str(error.value)


def test_other_kinds_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        CheckpointTokenizer(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({BEGIN: 0, END: 1, "專": 2}, unk_token=END))
    words.save(str(copy / "tokenizer.json"))
    with pytest.raises(ValueError, match="must be byte-level, which token"):
        CheckpointTokenizer(copy)
