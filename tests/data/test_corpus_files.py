"""Files as other programs save them: byte order marks, blank lines, lists of records, null records, pictures."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from minids.data.corpus import read_documents


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)


LINES = [json.dumps({"text": f"hello {i}"}) for i in range(3)]
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", BOM + "\n".join(LINES).encode()),
        ("two_boms.jsonl", BOM + LINES[0].encode() + b"\n" + BOM + "\n".join(LINES[1:]).encode()),
        ("blank_line.jsonl", f"{LINES[0]}\n\n{LINES[1]}\n \t\n{LINES[2]}\n".encode()),
        ("blank_ends.jsonl", ("\n\n" + "\n".join(LINES) + "\n\n").encode()),
        ("crlf_blank.jsonl", ("\r\n".join(LINES) + "\r\n\r\n").encode()),
        ("UPPER.JSONL", "\n".join(LINES).encode()),
        ("lines.ndjson", "\n".join(LINES).encode()),
        ("lines.json", "\n".join(LINES).encode()),
        ("list.json", f"[{', '.join(LINES)}]".encode()),
        ("bom_list.Json", BOM + ("\n[\n" + ",\n".join(LINES) + "\n]\n").encode()),
        ("texts.json", json.dumps([json.loads(line)["text"] for line in LINES]).encode()),
    ],
)
def test_records_are_read_whatever_saved_them(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / name):
        documents = list(read_documents(str(source)))
        assert [document.text for document in documents] == ["hello 0", "hello 1", "hello 2"]
        assert len({document.group for document in documents}) == 3


@pytest.mark.parametrize(
    "text",
    ['{"a": [1]}', "[1, 2]", '["x", 3]', "[]", '{\n  // a comment\n  "a": 1\n}', '[{"name": "x"}]', "3", '{"text"'],
)
def test_json_that_holds_no_records_is_text(text, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    assert [document.text for document in read_documents(str(tmp_path))] == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + "hello \ufeff".encode())
    assert [document.text for document in read_documents(str(tmp_path))] == ["hello \ufeff"]


def test_null_records_are_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnull\n{"text": null}\n')
    (tmp_path / "b.json").write_text('[null, {"text": "two"}, {"text": null}]')
    write_parquet(tmp_path / "c.parquet", text=["three", None])
    assert [document.text for document in read_documents(str(tmp_path))] == ["one", "two", "three"]
    assert caplog.messages == [f"{tmp_path}: records whose text is null, skipped: 5"]
    caplog.clear()
    (tmp_path / "dataset").mkdir()
    write_parquet(tmp_path / "dataset/train.parquet", text=[None, "four", None])
    assert [document.text for document in read_documents(f"hf:{tmp_path}/dataset")] == ["four"]
    assert caplog.messages == [f"hf:{tmp_path}/dataset: records whose text is null, skipped: 2"]


PICTURES = {
    "a.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "b.JPG": b"\xff\xd8\xff\xe0 no zero byte",
    "deep/c.bin": b"\xff\0",
    "d.pdf": b"%PDF-1.4\n\xe2\xe3 \0",
    "e.zip": b"PK\3\4\x14\0\xff",
    "f.npy": b"\x93NUMPY\1\0",
}


def test_pictures_in_a_folder_are_skipped_and_named(tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    assert [document.text for document in read_documents(str(tmp_path))] == ["<svg/>", "hello"]
    names = "a.png, b.JPG, d.pdf, deep/c.bin, e.zip and 1 more"
    assert caplog.messages == [f"{tmp_path}: files that are not text, skipped: 6 ({names})"]
    with pytest.raises(ValueError, match="a.png is not UTF-8: byte 0x89 at offset 0"):
        list(read_documents(str(tmp_path / "a.png")))


def test_a_folder_of_pictures_alone_names_them_and_holds_no_text(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(PICTURES["a.png"])
    with pytest.raises(ValueError, match=r"holds no text; files that are not text, skipped: 1 \(a.png\)"):
        list(read_documents(str(tmp_path)))
    assert caplog.messages == []
