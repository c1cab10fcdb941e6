"""What people hand in is found under the names that systems give it, and nothing else is opened."""

import io
import os
import zipfile

import pytest

from minids.course.exercises import NAMES
from minids.course.submissions import chapter_of, find_students

FILE = "00_claims.ipynb"


@pytest.mark.parametrize(
    "name",
    [
        FILE, "Copy of 00_claims.ipynb", "00_claims - Copy.ipynb", "00_claims copy.ipynb", "00_claims (1).ipynb",
        "00_claims(2).ipynb", "00_claims-Copy1.ipynb", "anna_00_claims.ipynb", "00_CLAIMS.IPYNB",
        "00_claims-anna.ipynb", "12345_00_claims.ipynb",
        "Müller_Anna_2024_assignsubmission_00_claims.ipynb", "00 claims.ipynb",
        "Kopie von 00_claims.ipynb", "00_claims_final_2.ipynb", "00-claims.ipynb",
    ],
)  # fmt: skip
def test_a_copy_is_recognised_by_its_number_and_name(name):
    assert chapter_of(name, NAMES) == 0


@pytest.mark.parametrize(
    "name", ["homework.ipynb", "00_claims.txt", "claims.ipynb", "100_claims.ipynb", "00_claimsx.ipynb"]
)
def test_other_names_are_not(name):
    assert chapter_of(name, NAMES) is None


def test_every_chapter_is_recognised_by_its_own_name_only():
    assert [chapter_of(f"{name}.ipynb", NAMES) for name in NAMES.values()] == list(NAMES)


def zipped(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def found(place):
    return {
        student.name: {c: [f.read() for f in files] for c, files in student.notebooks.items()}
        for student in find_students(place, NAMES)
    }  # noqa: E501


def test_folders_zip_files_and_loose_notebooks_are_students(tmp_path):
    (tmp_path / "anna" / "week 1").mkdir(parents=True)
    (tmp_path / "anna" / "week 1" / FILE).write_bytes(b"a")
    (tmp_path / "ben.zip").write_bytes(zipped((f"x/{FILE}", b"b")))
    (tmp_path / "carl_00_claims.ipynb").write_bytes(b"c")
    (tmp_path / "dora").mkdir()
    (tmp_path / "dora" / "homework.zip").write_bytes(zipped((FILE, b"d")))
    (tmp_path / "emil").mkdir()
    (tmp_path / "marks.txt").write_text("")
    for hidden in ("__MACOSX", ".git", ".ipynb_checkpoints"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / FILE).write_bytes(b"x")
        (tmp_path / "anna" / hidden).mkdir()
        (tmp_path / "anna" / hidden / FILE).write_bytes(b"x")
    (tmp_path / "anna" / f"._{FILE}").write_bytes(b"\0\5\26\7")
    assert found(tmp_path) == {
        "anna": {0: [b"a"]},
        "ben": {0: [b"b"]},
        "carl": {0: [b"c"]},
        "dora": {0: [b"d"]},
        "emil": {},
    }


def test_the_zip_file_of_a_class_holds_a_folder_or_a_zip_file_for_each(tmp_path):
    (tmp_path / "class.zip").write_bytes(
        zipped(
            (f"anna/{FILE}", b"a"), ("ben.zip", zipped((FILE, b"b"))), ("carl/work.zip", zipped((FILE, b"c"))),
            (f"__MACOSX/anna/._{FILE}", b"x"), (f"dora/../../{FILE}", b"x"), (f"/{FILE}", b"x"),
            ("emil/notes.txt", b"x"),
        )
    )  # fmt: skip
    assert found(tmp_path / "class.zip") == {"anna": {0: [b"a"]}, "ben": {0: [b"b"]}, "carl": {0: [b"c"]}, "emil": {}}


def test_in_a_copy_of_the_course_the_exercises_count(tmp_path):
    for place in ("chapters", "exercises", "solutions"):
        (tmp_path / "anna" / place).mkdir(parents=True)
        (tmp_path / "anna" / place / FILE).write_bytes(place.encode())
    assert found(tmp_path) == {"anna": {0: [b"exercises"]}}


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of other systems")
def test_links_pipes_and_devices_are_named_and_not_opened(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / FILE).write_bytes(b"x")
    for name in ("link", "pipe", "zero", "folder"):
        (tmp_path / "class" / name).mkdir(parents=True)
    (tmp_path / "class" / "link" / FILE).symlink_to(tmp_path / "secret" / FILE)
    (tmp_path / "class" / "zero" / FILE).symlink_to("/dev/zero")
    (tmp_path / "class" / "folder" / "work").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "class" / "pipe" / FILE)
    problems = {s.name: [f.problem for f in s.notebooks.get(0, [])] for s in find_students(tmp_path / "class", NAMES)}
    assert problems == {"link": ["a link"], "pipe": ["not a regular file"], "zero": ["a link"], "folder": []}


def test_a_file_that_became_a_link_after_it_was_found_is_not_read(tmp_path):
    (tmp_path / "class" / "anna").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"x")
    (notebook := tmp_path / "class" / "anna" / FILE).write_bytes(b"a")
    (student,) = find_students(tmp_path / "class", NAMES)
    notebook.unlink()
    notebook.symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        student.notebooks[0][0].read()


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "anna").mkdir()
    with (tmp_path / "anna" / FILE).open("wb") as file:
        file.truncate(2**30)
    (student,) = find_students(tmp_path, NAMES)
    assert student.notebooks[0][0].problem == "1024 MiB: at most 256 are read; clear the outputs"


@pytest.mark.parametrize("make", ["nothing", "empty", "names", "file"])
def test_where_nothing_is_recognised_the_error_says_what_was_found(tmp_path, make):
    place = tmp_path / "class"
    if make == "file":
        place.write_text("")
    elif make != "nothing":
        place.mkdir()
    if make == "names":
        (place / "anna").mkdir()
        (place / "anna" / "homework.ipynb").write_text("")
    words = {"empty": "found nothing", "names": "found 'homework.ipynb', 'anna'"}.get(
        make, "is not a folder or a zip file"
    )
    with pytest.raises(ValueError, match=words):
        find_students(place, NAMES)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "anna" / "work").mkdir(parents=True)
    (tmp_path / "ben").mkdir()
    (tmp_path / "ben" / FILE).write_text("x")
    scan = os.scandir

    def forbidden(place):
        if str(place).endswith("work"):
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr(os, "scandir", forbidden)
    anna, _ = find_students(tmp_path, NAMES)
    assert anna.others == ["work (a folder that cannot be read: Permission denied)"]
