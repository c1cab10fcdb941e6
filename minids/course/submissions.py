"""Find what students submitted: folders, zip files, and notebooks under the names that systems give to copies.

A submission is a file that looks like a chapter's exercise notebook: its name contains the chapter's two digits and
name, whatever was put before or after ("Copy of 02_mla.ipynb", "02_mla (1).ipynb", "anna_02_MLA.IPYNB").

Only regular files count, and a folder is never left: links, devices and pipes are listed as such and not opened.
Members of a zip file are read in memory, up to the same limit of size.
"""

import io
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

LARGEST = 2**28  # bytes of a notebook, or of a zip inside a zip
IGNORED = re.compile(r"\.|__MACOSX|Thumbs\.db|desktop\.ini", re.IGNORECASE)
DEEPEST, MOST = 12, 20_000  # folders in each other, files of one student


@dataclass(frozen=True)
class File:
    """A file inside a submission. `problem` says why it cannot be read, or is ""."""

    path: PurePosixPath
    read: Callable[[], bytes]
    problem: str = ""


@dataclass
class Student:
    """What one student submitted: `notebooks` by chapter, and the names of all `others`."""

    name: str
    notebooks: dict[int, list[File]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def add(self, file: File, chapters: dict[int, str]) -> None:
        chapter = chapter_of(file.path.name, chapters)
        if chapter is None:
            self.others.append(str(file.path))
        else:
            self.notebooks.setdefault(chapter, []).append(file)


def find_students(place: Path, chapters: dict[int, str]) -> list[Student]:
    """Return the students in a folder or a zip file of submissions, sorted by name.

    In a folder, each folder and each zip file is a student, and so is a notebook that lies there by itself ("anna" of
    anna_02_mla.ipynb). In the zip file of a class, each of its top folders and zip files is. `chapters` maps numbers to
    names of notebooks such as "02_mla". Raises `ValueError` where nothing looks like a submission.
    """
    if place.is_dir():
        entries = _folder_entries(place)
    elif zipfile.is_zipfile(place):
        entries = _zip_entries(place.read_bytes())
    else:
        raise ValueError(f"{place} is not a folder or a zip file of submissions")
    students: dict[str, Student] = {}
    for name, file in entries:
        student = students.setdefault(name, Student(name))
        if file is not None:
            student.add(file, chapters)
    for name in [name for name, student in students.items() if not student.notebooks and _is_loose(name, students)]:
        del students[name]
    for student in students.values():
        student.notebooks = {chapter: _chosen(files) for chapter, files in sorted(student.notebooks.items())}
    if not any(student.notebooks for student in students.values()):
        found = [name for student in students.values() for name in [*student.others, student.name]][:3]
        raise ValueError(
            f"{place}: expected a folder or zip file for each student with notebooks such as 02_mla.ipynb in it; "
            f"found {', '.join(map(repr, found)) or 'nothing'}"
        )
    return [students[name] for name in sorted(students)]


def chapter_of(name: str, chapters: dict[int, str]) -> int | None:
    """Return the chapter whose exercise notebook a file seems to be, None if it is none."""
    if not name.lower().endswith(".ipynb"):
        return None
    for number, own in chapters.items():
        if re.search(rf"(?<!\d){own.replace('_', '[_ -]')}(?![a-z0-9])", name.lower()):
            return number
    return None


def _is_loose(name: str, students: dict[str, Student]) -> bool:
    """Whether a name stands for a file that is no submission, such as a list of marks beside the folders."""
    return students[name].others == [name]


def _chosen(files: list[File]) -> list[File]:
    """In a copy of the whole course, those in exercises/ count."""
    return [file for file in files if file.path.parent.name == "exercises"] or files


def _folder_entries(folder: Path) -> Iterator[tuple[str, File | None]]:
    """Yield (student, file) for everything in a folder of submissions; (student, None) for an empty folder."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if IGNORED.match(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield entry.name, None
            for count, (path, file) in enumerate(_walk(entry.path, PurePosixPath(), 0)):
                if count >= MOST:
                    break
                yield entry.name, File(path, file.read, file.problem)
                if path.suffix.lower() == ".zip" and not file.problem:
                    yield from ((entry.name, each) for each in _members_or_none(file, path))
        else:
            yield from _loose(entry.name, _file(entry.path, PurePosixPath(entry.name)))


def _zip_entries(content: bytes) -> Iterator[tuple[str, File | None]]:
    """Yield (student, file) for the members of a class's zip file."""
    for file in _members(content):
        top, *rest = file.path.parts
        if rest:
            yield top, File(PurePosixPath(*rest), file.read, file.problem)
            if file.path.suffix.lower() == ".zip" and not file.problem:
                yield from ((top, each) for each in _members_or_none(file, PurePosixPath(*rest)))
        else:
            yield from _loose(top, file)


def _loose(name: str, file: File) -> Iterator[tuple[str, File]]:
    """A file that lies beside the students' folders: a zip file of one student, or a notebook named after one."""
    if name.lower().endswith(".zip") and not file.problem:
        student = name[:-4]
        yield student, File(file.path, file.read, "")
        yield from ((student, each) for each in _members_or_none(file, PurePosixPath()))
    else:
        match = re.match(r"(.+?)[_ -]+\d\d_", name)
        yield match[1] if match and name.lower().endswith(".ipynb") else name, file


def _walk(folder: str, inside: PurePosixPath, depth: int) -> Iterator[tuple[PurePosixPath, File]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        name = PurePosixPath(f"{os.path.basename(folder)} (a folder that cannot be read: {error.strerror})")
        yield name, File(name, bytes)
        return
    for entry in entries:
        if IGNORED.match(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth < DEEPEST:
                yield from _walk(entry.path, inside / entry.name, depth + 1)
        else:
            yield inside / entry.name, _file(entry.path, inside / entry.name)


def _file(path: str, inside: PurePosixPath) -> File:
    def read() -> bytes:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            return file.read(LARGEST + 1)

    try:
        status = os.lstat(path)
    except OSError as error:
        return File(inside, read, str(error.strerror))
    if not stat.S_ISREG(status.st_mode):
        return File(inside, read, "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file")
    return File(inside, read, _too_large(status.st_size))


def _members_or_none(file: File, inside: PurePosixPath) -> Iterator[File]:
    try:
        for member in _members(file.read()):
            yield File(inside / member.path, member.read, member.problem)
    except (ValueError, OSError, zipfile.BadZipFile):
        return


def _members(content: bytes) -> Iterator[File]:
    """Yield the members of a zip file that are neither hidden nor outside of it."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    for member in archive.infolist()[:MOST]:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if member.is_dir() or path.is_absolute() or ".." in path.parts or any(map(IGNORED.match, path.parts)):
            continue
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        problem = "a link" if is_link else _too_large(member.file_size)

        def read(member: zipfile.ZipInfo = member) -> bytes:
            with archive.open(member) as file:
                return file.read(LARGEST + 1)

        yield File(path, read, problem)


def _too_large(size: int) -> str:
    return f"{size >> 20} MiB: at most {LARGEST >> 20} are read; clear the outputs" if size > LARGEST else ""
