"""Glossary of the site: a directive made of docs/GLOSSARY.md, and links from the chapters' prose to its entries.

The repository keeps a table, which GitHub shows, and notebooks without links to it. Both become MyST's own `glossary`
directive and `term` roles in the copy that the site is built from; Sphinx then warns of a role without an entry.
"""

import re
from dataclasses import dataclass

EVERYDAY = {
    "advantage", "block", "clip", "combine", "confidence", "decode", "decoding", "detached", "dispatch", "draft",
    "entry", "exposed", "gain", "layout", "promotion", "rank", "sink", "site", "survival",
}  # fmt: skip
"""Terms that are also everyday words: linked in the chapter that introduces them only, where they mean the term."""

NOT_PROSE = re.compile(
    r"""
      ^\ *(?P<fence>```+|~~~+|:::+).*?^\ *(?P=fence)   # code and directives, to the closing fence
    | ^\#+\ .*?$                                       # headings, of which the table of contents is made
    | ^\ *\|.*?$                                       # rows of tables
    | ^<[a-zA-Z/!].*?(?=\n\ *\n|\Z)                    # blocks of HTML, which end at an empty line
    | (?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)       # code
    | \$\$.*?\$\$ | (?<!\\)\$[^$]+\$                   # formulas
    | !?\[(?:[^][]|\[[^][]*\])*\]\([^)]*\)             # links and figures, their texts included
    | <[^<>\n]+> | https?://\S+                        # tags and bare addresses
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Entry:
    """A row of docs/GLOSSARY.md: `chapter` is a link in Markdown, `sentence` what the names mean."""

    names: tuple[str, ...]
    chinese: str
    chapter: str
    sentence: str


def entry_of(row: str) -> Entry | None:
    """Read one line of the document: an entry, or None if it is the heading of a table or not in one."""
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    if not row.startswith("|") or len(cells) != 4 or not cells[2].startswith("["):
        return None
    names, chinese, chapter, sentence = cells
    return Entry(tuple(name.strip() for name in names.split(",")), chinese, chapter, sentence)


def entries(document: str) -> list[Entry]:
    """Return the entries of docs/GLOSSARY.md in their order."""
    return [entry for row in document.splitlines() if (entry := entry_of(row))]


def directives(document: str) -> str:
    """Return the document with each table as a `glossary` directive, in which every name is an anchor."""

    def directive(table: re.Match[str]) -> str:
        written = [
            "\n".join(entry.names)
            + f'\n  <span class="chinese" lang="zh">{entry.chinese}</span> {entry.sentence} (Chapter {entry.chapter})\n'
            for entry in entries(table[0])
        ]
        return "\n".join([":::{glossary}", *written]) + ":::\n" if written else table[0]

    return re.sub(r"(?:^\|.*\n?)+", directive, document, flags=re.MULTILINE)


def pattern(name: str) -> str:
    """Return a regular expression of a name: as a whole word or in the plural; lower-case names also capitalised."""
    stem, plural = (name[:-1], "(?:y|ies)") if re.search("[^aeiou]y$", name) else (name, "(?:s|es)?")
    first = f"(?i:{re.escape(stem[0])})" if name == name.lower() else re.escape(stem[0])
    rest = re.escape(stem[1:]).replace(r"\ ", r"[\s-]+")
    return rf"(?<![\w-])({first}{rest}{plural})(?![\w-])"


class Linker:
    """Links the first use of each name in the prose of one chapter, given as its file's name."""

    def __init__(self, glossary: list[Entry], chapter: str) -> None:
        names = [name for entry in glossary for name in entry.names if name not in EVERYDAY or chapter in entry.chapter]
        self.names = sorted(names, key=len, reverse=True)  # the longest first: "shared expert" is no "expert"
        self.uses = re.compile("|".join(map(pattern, self.names)) or "(?!)")  # without names: nothing
        self.linked: set[str] = set()

    def __call__(self, markdown: str) -> str:
        """Return a Markdown cell with links in its prose; code, formulas, headings, tables and links stay as they are.

        Cells are to be given in their order.
        """
        parts, end = [], 0
        for block in NOT_PROSE.finditer(markdown):
            parts += [self.uses.sub(self._link, markdown[end : block.start()]), block[0]]
            end = block.end()
        return "".join(parts) + self.uses.sub(self._link, markdown[end:])

    def _link(self, use: re.Match[str]) -> str:
        name = self.names[use.lastindex - 1]
        if name in self.linked:
            return use[0]
        self.linked.add(name)
        return f"{{term}}`{' '.join(use[0].split())} <{name}>`"
