"""Sources: what is read, what is refused, and which documents are held out."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from collections import defaultdict

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minids.data import standard_library
from minids.data.corpus import Document, read_documents, split_documents


@pytest.fixture(scope="module")
def small_library(tmp_path_factory):
    """A standard library of a few files, so that no test waits for the real one."""
    root = tmp_path_factory.mktemp("stdlib")
    for path, text in {
        "alpha.py": '"""Alpha is the first module."""\n\n# a comment\nx = 1\n',
        "beta/__init__.py": '"""Beta is a package."""\n',
        "beta/code.py": "def f():\n    '''Return two.'''\n\n    return 2\n",
        "beta/test/test_code.py": "assert False\n",
        "encodings/table.py": "TABLE = 1\n",
        "site-packages/other.py": "x = 'not ours'\n",
        "test/test_alpha.py": "x = 'a test'\n",
        "pydoc_data/topics.py": "topics = {}\n",
        "empty.py": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    return root


@pytest.fixture
def library(small_library, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(small_library))
    standard_library._read_module.cache_clear()
    yield
    standard_library._read_module.cache_clear()


def test_stdlib_is_code_without_prose(library):
    assert list(read_documents("stdlib")) == [
        Document("# a comment\nx = 1\n", "code", "alpha"),
        Document("def f():\n    return 2\n", "code", "beta"),
        Document("# -*- coding: latin-1 -*-\nx = 'é'\n", "code", "latin"),
    ]


def test_pydocs_are_the_topics_and_the_docstrings(library):
    documents = list(read_documents("pydocs"))
    assert documents[-3:] == [
        Document("Alpha is the first module.\n", "prose", "alpha"),
        Document("Beta is a package.\n", "prose", "beta"),
        Document("Return two.\n", "prose", "beta"),
    ]
    topics = documents[:-3]
    assert len(topics) > 30 and all(document.group.startswith("topic ") for document in topics)
    assert all(document.domain == "prose" for document in documents)


def test_topics_do_not_repeat_each_other():
    """In pydoc_data "compound" holds "for", "while" and "with" word for word."""
    topics = [text for _, text in standard_library.topics()]
    groups_of = defaultdict(set)
    for i, text in enumerate(topics):
        for paragraph in text.split("\n\n"):
            if len(paragraph.strip()) > 60:
                groups_of[paragraph.strip()].add(i)
    repeated = sum(len(groups) > 1 for groups in groups_of.values())
    assert repeated < 0.02 * len(groups_of)


def test_real_library_parses_and_has_no_docstrings_left():
    for document in read_documents("stdlib", max_bytes=300_000):
        if document.text.endswith("\n"):  # the last document is cut
            assert not list(standard_library._documented(ast.parse(document.text)))


def test_both_domains_of_a_module_share_its_group():
    code = {document.group for document in read_documents("stdlib", max_bytes=300_000)}
    prose = {document.group for document in read_documents("pydocs", max_bytes=600_000)}
    assert len(code & prose) > 5


def test_a_python_without_its_texts_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no standard library sources in"):
        list(read_documents("stdlib"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="lacks pydoc_data"):
        list(read_documents("pydocs"))


@pytest.mark.parametrize(
    ("source", "prose", "code"),
    [
        ('"""Doc."""\n\nx = 1', "Doc.", "x = 1"),
        ('def f():\n    """Doc."""', "Doc.", "def f():\n    pass"),
        ('def f(): "Doc."', "Doc.", "def f(): pass"),
        ('def f(): "Doc."; return 1', "Doc.", "def f(): pass; return 1"),
        ('class é: "Doc."  # why', "Doc.", "class é: pass  # why"),
        ('def f():\n    """One.\n\n    Two.\n    """\n    # y\n    g()', "One.\n\nTwo.", "def f():\n    # y\n    g()"),
        ('class A:\n    "Out."\n\n    def f():\n        "In."', "Out.\n\nIn.", "class A:\n    def f():\n        pass"),
        ('if x:\n    def f():\n        "Deep."\n        g("kept")', "Deep.", 'if x:\n    def f():\n        g("kept")'),
        ('def f():\n    "é" "joined"\n    x = "é"', "éjoined", 'def f():\n    x = "é"'),
        ('x = 1\n\x0c\ndef f():\n    "Doc."\n    return x', "Doc.", "x = 1\n\x0c\ndef f():\n    return x"),
        ("x = 1\n'no docstring'", "", "x = 1\n'no docstring'"),
        ("", "", ""),
    ],
)  # fmt: skip
def test_docstrings_come_out_and_the_rest_stays(source, prose, code):
    assert standard_library.split_docstrings(source) == (prose, code)
    ast.parse(code)


def _write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)


def test_a_folder_of_every_kind_of_file(tmp_path):
    (tmp_path / "b.md").write_text("# Title\r\n", newline="")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "deep").mkdir()
    _write_jsonl(tmp_path / "deep" / "c.jsonl", [{"text": "one", "domain": "prose"}, {"text": "two", "id": 7}])
    _write_parquet(tmp_path / "deep" / "d.parquet", id=[1, 2], text=["three", "four"], domain=["code", None])
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "empty.txt").touch()
    assert list(read_documents(str(tmp_path))) == [
        Document("x = 1\n", "text", "a.py"),
        Document("# Title\r\n", "text", "b.md"),
        Document("one", "prose", "deep/c.jsonl:1"),
        Document("two", "text", "deep/c.jsonl:2"),
        Document("three", "code", "deep/d.parquet:1"),
        Document("four", "text", "deep/d.parquet:2"),
    ]
    assert [document.text for document in read_documents(str(tmp_path / "a.py"))] == ["x = 1\n"]


def test_hugging_face_dataset(tmp_path):
    _write_parquet(tmp_path / "train.parquet", text=["one", "two", "three"], domain=["prose", "code", "code"])
    documents = list(read_documents(f"hf:{tmp_path}"))
    assert [(document.text, document.domain) for document in documents] == [
        ("one", "prose"),
        ("two", "code"),
        ("three", "code"),
    ]
    assert len({document.group for document in documents}) == 3


def test_hugging_face_config_and_errors(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append(args) or [{"text": "x"}])
    list(read_documents("hf:HuggingFaceFW/fineweb-edu:sample-10BT"))
    list(read_documents("hf:roneneldan/TinyStories"))
    assert calls == [("HuggingFaceFW/fineweb-edu", "sample-10BT"), ("roneneldan/TinyStories", None)]
    monkeypatch.undo()

    with pytest.raises(ValueError, match="cannot read dataset .*nowhere") as error:
        list(read_documents(f"hf:{tmp_path}/nowhere"))
    assert "\n" not in str(error.value)
    _write_parquet(tmp_path / "train.parquet", story=["no text column"])
    with pytest.raises(ValueError, match='row 1 has no "text"'):
        list(read_documents(f"hf:{tmp_path}"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the datasets library: pip install datasets"):
        list(read_documents("hf:roneneldan/TinyStories"))


def test_hub_out_of_reach_is_one_error_without_lines_of_retries(monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    from huggingface_hub.utils import logging as hub

    def load_dataset(*args, **kwargs):
        hub.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = hub.get_verbosity()
    with pytest.raises(ValueError, match="cannot read dataset a/b: ConnectionError; check its name and the network"):
        list(read_documents("hf:a/b"))
    assert caplog.messages == [] and hub.get_verbosity() == before


def test_max_bytes_cuts_between_characters(tmp_path):
    _write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "ééé"}, {"text": "never read"}])
    source = str(tmp_path / "a.jsonl")
    assert [document.text for document in read_documents(source, max_bytes=6)] == ["abc", "é"]
    for max_bytes in (3, 4):
        assert [document.text for document in read_documents(source, max_bytes=max_bytes)] == ["abc"]
    assert len(list(read_documents(source, max_bytes=1000))) == 3
    with pytest.raises(ValueError, match="max_bytes=0: must be at least 1"):
        list(read_documents(source, max_bytes=0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"fine\nb\xe9d", "is not UTF-8: byte 0xe9 at offset 6"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8: byte 0xff at offset 10"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 10**5, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
        ("a.JSONL", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.json", b'[{"text": "a"}, {"tex', "is not JSON"),
        ("a.json", b'[{"text": "a"}, {"story": "b"}]', 'item 2 has no "text" that is a string'),
        ("a.json", b'{"text": "a"}\n{"story": "b"}\n', 'line 2 has no "text" that is a string'),
        ("a.json", b'[null, {"text": 3}]', 'item 2 has no "text" that is a string'),
        ("a.txt", "größe".encode("utf-16"), "is not UTF-8: byte 0xff at offset 0"),
        ("a.jsonl", b'{"text": "a"}\n{"story": "b"}\n', 'line 2 has no "text" that is a string'),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', 'line 2 has no "text" that is a string'),
        ("a.jsonl", b'{"text": null}\n', "holds no text"),
        ("a.jsonl", b'{"text": 3}\n', 'line 1 has no "text" that is a string'),
        ("a.jsonl", b'{"text": "a", "domain": 3}\n', 'line 1 has a "domain" that is not a string: 3'),
        ("a.jsonl", rb'{"text": "\ud800"}' + b"\n", "line 1 has no UTF-8 form"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.parquet", b"PAR1 not really", "is damaged after row 0"),
    ],
)
def test_bad_files_are_named_with_the_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=message) as error:
            list(read_documents(str(source)))
        assert str(source) in str(error.value) and "\n" not in str(error.value)


def test_bad_parquet_rows_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    _write_parquet(path, text=["a", "b"], domain=[None, 3])
    with pytest.raises(ValueError, match='row 2 has a "domain" that is not a string: 3'):
        list(read_documents(str(path)))
    _write_parquet(path, story=["a"])
    with pytest.raises(ValueError, match='row 1 has no "text"'):
        list(read_documents(str(path)))


def test_missing_path():
    with pytest.raises(ValueError, match="corpus nowhere.txt does not exist: expected pydocs, stdlib, hf:DATASET, "):
        list(read_documents("nowhere.txt"))


def _documents(groups):
    return [Document(f"text {i}", "text", group) for i, group in enumerate(groups)]


@given(
    groups=st.lists(st.text("abcdef", min_size=1, max_size=2), min_size=2),
    held_out=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_split_is_a_partition_that_never_cuts_a_group(groups, held_out, seed):
    documents = _documents(groups)
    training, validation = split_documents(documents, held_out=held_out, seed=seed)
    assert training and validation
    assert sorted(training + validation, key=documents.index) == documents
    assert training == [document for document in documents if document in training]  # order kept
    if len(set(groups)) > 1:
        assert {d.group for d in training}.isdisjoint(d.group for d in validation)


def test_split_size_and_seed():
    documents = _documents(str(i) for i in range(2000))
    training, validation = split_documents(documents)
    assert 70 < len(validation) < 130
    assert split_documents(documents) == (training, validation)
    assert split_documents(documents, seed=1)[1] != validation


def test_a_group_is_on_the_same_side_in_every_corpus():
    documents = _documents(str(i) for i in range(200))
    held_out = {document.group for document in split_documents(documents)[1]}
    half = documents[::2]
    assert {d.group for d in split_documents(half)[1]} == held_out & {d.group for d in half}


def test_split_is_stable_across_processes():
    program = (
        "from minids.data.corpus import Document, split_documents\n"
        "documents = [Document(str(i), 'text', str(i)) for i in range(100)]\n"
        "print([document.group for document in split_documents(documents)[1]])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    # a literal, so that a change of the hash, which would leak old validation texts into training, is seen
    assert outputs == {"['61', '68', '72', '92']\n"}


def test_a_lone_document_is_split_at_a_line_break():
    text = "".join(f"line {i}\n" for i in range(100))
    (training,), (validation,) = split_documents([Document(text, "prose", "book")])
    assert training.text + validation.text == text
    assert training.text.endswith("\n") and 0.9 * len(text) < len(training.text) < 0.96 * len(text)
    assert training.domain == validation.domain == "prose"


@pytest.mark.parametrize("text", ["ab", "x" * 100, "\n" + "x" * 100, "\n\n"])
def test_a_lone_document_without_a_good_line_break_is_split_anyway(text):
    (training,), (validation,) = split_documents([Document(text, "text", "book")], held_out=0.1)
    assert training.text + validation.text == text and training.text and validation.text
    assert len(training.text) >= 0.5 * len(text)


def test_nothing_to_split():
    with pytest.raises(ValueError, match="corpus holds no text"):
        split_documents([])
    with pytest.raises(ValueError, match="corpus is too short to be split: 1 characters"):
        split_documents([Document("x", "text", "book")])
    for held_out in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"held_out={held_out}: must be between 0 and 1"):
            split_documents(_documents("ab"), held_out=held_out)
