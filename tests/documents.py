"""Reading the documents, for the tests of what they say: tables, links and code of Markdown, cells of notebooks."""

import functools
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
COMMANDS = ROOT / "docs/COMMANDS.md"


@functools.cache
def cells(path):
    return nbformat.v4.reads(path.read_text(encoding="utf-8")).cells  # not validated: tests/course does that


def read(path):
    """The Markdown of a document, or of all Markdown cells of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")


def rows(markdown, columns):
    """The rows of the tables that have this many columns, without the headings."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {i for i, row in enumerate(table) if set("".join(row)) <= set("-: ")}
    return [row for i, row in enumerate(table) if len(row) == columns and not {i, i + 1} & rules]


def names(cell):
    """What a cell of a table names as code."""
    return re.findall(r"`([^`]+)`", cell)


def without_code(markdown):
    return re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)


def links(markdown):
    """Targets of links and images, but for those in code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(markdown)))
