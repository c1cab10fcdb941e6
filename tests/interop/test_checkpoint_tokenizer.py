"""A checkpoint's own tokenizer reads and writes as transformers does, and every broken one is one clear line."""

import json
import shutil

import pytest
import tokenizers
import torch
from foreign import BEGIN, END, PADDED, VOCAB, save_checkpoint
from transformers import AutoTokenizer

from minids.data.tokenizer import load_tokenizer
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


ROLES = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "[INST]", "<｜EOT｜>")


@pytest.fixture
def released(folder, tmp_path):
    """As DeepSeek's: roles, tags and tools are added tokens that are not special, and one byte is added as text."""
    copy = shutil.copytree(folder, tmp_path / "released")
    core = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    core.add_tokens([tokenizers.AddedToken(name, special=False, normalized=i % 2 == 0) for i, name in enumerate(ROLES)])
    core.add_tokens([tokenizers.AddedToken("ø", special=False, normalized=True)])
    core.save(str(copy / "tokenizer.json"))
    return copy


@pytest.mark.parametrize("name", [*ROLES, BEGIN, END])
def test_text_cannot_forge_any_added_token(released, name):
    tokenizer = CheckpointTokenizer(released)
    (token,) = tokenizer.encode(name, allow_special=True)
    for text in (name, f"a {name}{name} b", f"{name}\n"):
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text, "x"])[0].tolist()):
            assert token not in ids and len(ids) > 1 and tokenizer.decode(ids) == text
    theirs = AutoTokenizer.from_pretrained(released)
    assert tokenizer.decode([token]) == theirs.decode([token], skip_special_tokens=True)


def test_text_cannot_forge_a_token_whose_name_is_also_a_word(folder, tmp_path):
    """Where the merges of the vocabulary make the name, its bytes are spelt out."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["[INST]"] * 9, trainer)
    (word,) = core.encode("[INST]").ids
    core.add_tokens(["[INST]"])
    core.add_special_tokens([BEGIN, END])
    core.save(str(copy / "tokenizer.json"))
    tokenizer = CheckpointTokenizer(copy)
    assert tokenizer.encode("[INST]", allow_special=True) == [word]
    ids = tokenizer.encode("a[INST]b")
    assert word not in ids and tokenizer.decode(ids) == "a[INST]b"


def test_text_cannot_forge_an_end_that_looks_like_a_word(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    core = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    core.add_tokens([tokenizers.AddedToken("EOS", special=False, normalized=False)])
    core.save(str(copy / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "EOS"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = CheckpointTokenizer(copy)
    assert tokenizer.encode("EOS", allow_special=True) == [tokenizer.eos_id]
    ids = tokenizer.encode("xEOS")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "xEOS"


def test_an_added_character_is_text_as_in_transformers(released):
    ours, theirs = CheckpointTokenizer(released), AutoTokenizer.from_pretrained(released)
    assert ours.encode("søt") == theirs.encode("søt", add_special_tokens=False)
    assert len(ours.encode("ø")) == 1 and ours.decode(ours.encode("søt")) == "søt"


@pytest.mark.parametrize("allow_special", [False, True])
def test_half_of_a_surrogate_pair_is_refused(released, allow_special):
    tokenizer = CheckpointTokenizer(released)
    for encode in (
        lambda text: tokenizer.encode(text, allow_special=allow_special),
        lambda t: tokenizer.encode_batch([t]),
    ):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            encode("a\ud800")


@pytest.mark.parametrize("eos", [1, [1, 5]])
def test_without_its_config_the_ids_of_the_model_decide(folder, tmp_path, eos):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer_config.json").unlink()
    model = json.loads((copy / "config.json").read_text()) | {"bos_token_id": 0, "eos_token_id": eos}
    (copy / "config.json").write_text(json.dumps(model))
    tokenizer = CheckpointTokenizer(copy)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, -1)
    tokenizer.save(tmp_path / "saved")
    assert CheckpointTokenizer(tmp_path / "saved").eos_id == 1


def test_a_folder_without_the_model_keeps_size_and_template(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text("{{ größe }}", encoding="utf-8")
    CheckpointTokenizer(copy).save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert isinstance(loaded, CheckpointTokenizer) and loaded.vocab_size == PADDED and loaded.eos_id == 1
    assert (tmp_path / "run/tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert (tmp_path / "run/chat_template.jinja").read_text(encoding="utf-8") == "{{ größe }}"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").encode("Größe") == loaded.encode("Größe")


def test_files_with_a_byte_order_mark_are_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (copy / name).write_bytes(b"\xef\xbb\xbf" + (copy / name).read_bytes())
    assert load_tokenizer(copy).encode(TEXTS[2]) == CheckpointTokenizer(folder).encode(TEXTS[2])


def test_a_file_of_another_name_is_read_itself_not_the_tokenizer_beside_it(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").rename(copy / "theirs.json")
    words = [load_tokenizer(copy / "theirs.json").encode(text) for text in TEXTS]
    assert words == [CheckpointTokenizer(folder).encode(text) for text in TEXTS]
    (copy / "tokenizer.json").write_text('{"model": {}}')  # another one beside it
    assert [load_tokenizer(copy / "theirs.json").encode(text) for text in TEXTS] == words


BROKEN = {
    "no bos": ("tokenizer_config.json", {"bos_token": None}, "must name a bos_token and an eos_token"),
    "unknown eos": ("tokenizer_config.json", {"eos_token": "<none>"}, "must name a bos_token and an eos_token"),
    "a number": ("tokenizer_config.json", {"eos_token": {"id": 1}}, "cannot be read: 'content'"),
    "no model": ("tokenizer.json", {"model": 3}, "cannot be read: "),
    "a huge vocabulary": (
        "config.json",
        {"vocab_size": 10**12},
        "vocab_size=1000000000000: must be at most 10,000,000",
    ),
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
