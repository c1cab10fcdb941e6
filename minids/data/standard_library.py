"""Text of the Python installation: language reference and docstrings (prose), and library sources (code).

Modules are read as text, never imported. The text differs slightly between Python versions.
"""

import ast
import functools
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

# Test suites, generated tables, and the topics of the language reference, which are prose.
_EXCLUDED = {"test", "tests", "idle_test", "encodings", "entities.py", "stringprep.py", "msilib", "pydoc_data"}


def topics() -> Iterator[tuple[str, str]]:
    """Yield (group, text) of each topic of the language reference in `pydoc_data.topics`; each is its own group.

    Long topics repeat short ones verbatim. A topic is skipped if most of its paragraphs occur in longer ones, because
    the validation split would leak. Raises ValueError if this Python has no `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics as text_of
    except ImportError:
        raise ValueError("this Python lacks pydoc_data: install its complete standard library") from None

    seen: set[str] = set()
    for name in sorted(text_of, key=lambda name: (-len(text_of[name]), name)):
        paragraphs = {paragraph.strip() for paragraph in text_of[name].split("\n\n")}
        if len(paragraphs & seen) <= len(paragraphs) / 2:
            yield f"topic {name}", text_of[name]
        seen |= paragraphs


def modules(kind: Literal["docstrings", "code"]) -> Iterator[tuple[str, str]]:
    """Yield (group, text) of each module: its docstrings, or its source without them.

    A group is a top-level module or package. Modules without text of this kind are skipped.
    """
    for path in _modules():
        docstrings, code = _read_module(path)
        if text := docstrings if kind == "docstrings" else code:
            yield path.parts[0].removesuffix(".py"), text + "\n"


def split_docstrings(source: str) -> tuple[str, str]:
    """Split Python source into (the dedented docstrings of module, classes and functions; the source without them).

    Everything else is unchanged, comments too. A docstring that is the whole body, or shares a line with other code,
    becomes `pass`. Raises SyntaxError if `source` is not Python.
    """
    prose: list[str] = []
    lines = [line.encode() for line in source.split("\n")]  # ast counts columns in bytes, and breaks lines at \n only
    for node in sorted(_documented(ast.parse(source)), key=lambda node: node.body[0].lineno, reverse=True):
        prose.insert(0, ast.get_docstring(node) or "")
        docstring = node.body[0]
        assert docstring.end_lineno is not None  # `ast.parse` sets it
        first, last = docstring.lineno - 1, docstring.end_lineno - 1
        before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
        if before.strip() or after.strip() or (len(node.body) == 1 and not isinstance(node, ast.Module)):
            lines[first : last + 1] = [before + b"pass" + after]
        else:
            blank_below = last + 1 < len(lines) and not lines[last + 1].strip()
            del lines[first : last + 1 + blank_below]
    return "\n\n".join(filter(None, prose)), b"\n".join(lines).decode()


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every node with a docstring. Visits statements only, which is five times faster than `ast.walk`."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            nodes += getattr(node, block, ())
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                yield node


def _modules() -> list[Path]:
    """List the library's modules relative to its root, sorted by name. Raises ValueError if there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    modules = sorted(filter(_is_wanted, paths), key=Path.as_posix)
    if not modules:
        raise ValueError(f"this Python has no standard library sources in {root}")
    return modules


def _is_wanted(path: Path) -> bool:
    """Whether a file belongs to the library: excludes site-packages and other names that cannot be imported."""
    importable = all(part.removesuffix(".py").isidentifier() for part in path.parts)
    return importable and _EXCLUDED.isdisjoint(path.parts) and not path.name.startswith("_sysconfigdata")


@functools.cache  # "pydocs" and "stdlib" share the parsed library, which takes seconds
def _read_module(path: Path) -> tuple[str, str]:
    with tokenize.open(Path(sysconfig.get_path("stdlib")) / path) as file:  # detects the encoding
        prose, code = split_docstrings(file.read())
    return prose, code.strip("\n")
