"""The documents keep what they promise: links lead somewhere, the index names what exists, chapters follow one another.

`python tests/test_docs.py` rewrites the second table of docs/INDEX.md from the first.
"""

import ast
import functools
import re
from pathlib import Path
from pkgutil import resolve_name
from urllib.parse import unquote
from xml.sax.saxutils import escape

import pytest
from documents import CONTRIBUTING, README, ROOT, cells, links, names, read, rows, without_code

from minids.course.drawings import DRAWINGS
from minids.course.drawings.__main__ import PICTURES
from minids.course.drawings.v3_map import v3_map

INDEX, ERRATA, FACTS = (ROOT / "docs" / name for name in ("INDEX.md", "ERRATA.md", "FACTS.md"))
DOCUMENTS = [README, CONTRIBUTING, *(ROOT / name for name in ("SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"))]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
GENERATED = "<!-- made from the table above by `python tests/test_docs.py` -->\n"
NOTHING = "–"


def is_run(path):
    return next(cell for cell in cells(path) if cell.cell_type == "code").execution_count is not None


CHAPTERS = [path for path in sorted((ROOT / "chapters").glob("*.ipynb")) if is_run(path)]  # not those half written
OTHERS = [path for folder in ("exercises", "solutions") for path in sorted((ROOT / folder).glob("*.ipynb"))]
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


# Links -------------------------------------------------------------------------------------------------------------


def anchors(markdown):
    """What GitHub calls the headings: lower case, spaces as hyphens, other signs gone, repeated names numbered."""
    found = []
    for heading in re.findall(r"^#+ (.+?) *$", without_code(markdown), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    return {f"{name}-{found[:i].count(name)}".removesuffix("-0") for i, name in enumerate(found)}


def broken(path, markdown, coming=frozenset()):
    """The relative links of a document that lead nowhere; files that are `coming` need not be there yet."""
    found = []
    for link in links(markdown):
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve()
        if re.match(r"[a-z]+:", name) or target in coming:
            continue
        if name and not target.exists() or anchor and anchor not in anchors(read(target) if name else markdown):
            found.append(link)
    return found


def coming():
    """Chapters that the README names without a link, and their exercises."""
    stems = [row[1].replace(" ", "_") for row in rows(read(README), columns=6) if re.match(r"\d\d ", row[1])]
    return {ROOT / folder / f"{stem}.ipynb" for stem in stems for folder in ("chapters", "exercises")}


@pytest.mark.parametrize("path", DOCUMENTS + CHAPTERS + OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    assert broken(path, read(path), coming()) == []


def test_a_broken_link_is_found():
    page = (
        "# The `head`: a\n[](#the-head-a) [](#head) [](LICENSE) [](NONE.md) [](docs/FACTS.md#no) `[](NO)` [](https://x)"
    )
    assert broken(ROOT / "x.md", page) == ["#head", "NONE.md", "docs/FACTS.md#no"]
    assert broken(ROOT / "x.md", page, {ROOT / "NONE.md"}) == ["#head", "docs/FACTS.md#no"]
    assert anchors("# A\n## A\n# a\n# [B c](d) & e\n```\n# no\n```\n") == {"a", "a-1", "a-2", "b-c--e"}
    assert all(links(read(path)) for path in [README, *CHAPTERS])


# Chapters ----------------------------------------------------------------------------------------------------------


def minutes(path):
    """What the first cell of code says that a notebook takes, and its stored output says too."""
    first = next(cell for cell in cells(path) if cell.cell_type == "code")
    stated = re.search(r"^start\(minutes=([\d.]+)", first.source, re.MULTILINE)[1]
    assert f"Needs about {stated} minute" in first.outputs[0].text
    return stated


def to_read(path):
    """What the first cell of code says that a chapter takes to read, in minutes."""
    first = next(cell for cell in cells(path) if cell.cell_type == "code")
    stated = re.search(r"^start\(.*reading=(\d+)", first.source, re.MULTILINE)
    return stated[1] if stated else NOTHING


def test_the_readme_lists_fourteen_chapters_and_links_those_that_are_written():
    table = [row[1:] for row in rows(read(README), columns=5) if row[0].startswith("<img")]
    assert [re.search(r"\d\d", title)[0] for title, *_ in table] == [f"{number:02}" for number in range(14)]
    written = [[f"[{p.stem.replace('_', ' ', 1)}](chapters/{p.name})", minutes(p), to_read(p)] for p in CHAPTERS]
    assert [[title, run, reading] for title, _, run, reading in table if run != "coming"] == written


@each_chapter
def test_a_chapter_states_its_minutes_and_leads_to_its_exercises_and_to_the_next(path):
    assert 0 < float(minutes(path)) <= 10
    following = [chapter.name for chapter in CHAPTERS if int(chapter.name[:2]) == int(path.name[:2]) + 1]
    assert {f"../exercises/{path.name}", *following} <= set(links(cells(path)[-1].source))


@each_chapter
def test_a_figure_stands_beside_prose(path):
    for before, cell, after in zip(cells(path), cells(path)[1:], cells(path)[2:], strict=False):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert "markdown" in (before.cell_type, after.cell_type), cell.source


# The index ---------------------------------------------------------------------------------------------------------

SOURCES = r"V3\.2|V3|V2|R1v1|R1n|R1|DeepSeekMath|DSMath|DSM|ISCA|LF|ZB|FACTS\.md"
KINDS = {"eq": "eq", "Table": "table", "Tables": "table", "section": "section", "sections": "section", "§": "section",
         "appendix": "appendix", "App": "appendix", "Alg": "algorithm"}  # fmt: skip
NUMBER = r"(?:[A-Z]|\d+)(?:\.\d+)*"
NUMBERS = rf"{NUMBER}(?:-{NUMBER})?"
CITATION = re.compile(
    rf"(?:\b({SOURCES}),? )?(?:\b|(?=§))({'|'.join(KINDS)})\.? ?({NUMBERS}(?:(?:, | and | to ){NUMBERS}\b)*)"
)


def citations(text):
    """What a text cites, number by number: ("V3", "eq", "13"), ...; where no source is named, it is the one before."""
    found, source = set(), None
    for named, kind, numbers in CITATION.findall(" ".join(text.replace("–", "-").split())):
        source = {"DSMath": "DeepSeekMath"}.get(named, named) or source
        for part in re.split(r", | and | to ", numbers):
            first, _, last = part.partition("-")
            every = range(int(first), int(last) + 1) if first.isdigit() and last.isdigit() else {first, last or first}
            found |= {(source, KINDS[kind], str(number)) for number in every}
    return {citation for citation in found if citation[0] not in (None, "FACTS.md")}


def test_citations_are_read_as_they_are_written():
    assert citations("(V3 eq. 12-14, 16; V2 section 2.2; FACTS.md sections 3 and 4)") == {
        *(("V3", "eq", number) for number in ("12", "13", "14", "16")), ("V2", "section", "2.2"),
    }  # fmt: skip
    assert citations("V3 sections 3.3.2, 3.5.2 and (appendix B.2). ISCA Table 2,\n4; V2 §2.1.2, LF Alg. 1") == {
        ("V3", "section", "3.3.2"), ("V3", "section", "3.5.2"), ("V3", "appendix", "B.2"), ("ISCA", "table", "2"),
        ("ISCA", "table", "4"), ("V2", "section", "2.1.2"), ("LF", "algorithm", "1"),
    }  # fmt: skip
    assert citations("R1 eq. 1, as DSMath eq 3–4") == {("R1", "eq", "1"), *(("DeepSeekMath", "eq", n) for n in "34")}


@functools.cache
def docstrings():
    """Each public docstring of minids by its name: `model.moe`, `model.moe.Router`, `model.moe.Router.scores`."""
    found = {}

    def visit(node, name):
        found[name] = ast.get_docstring(node) or ""
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
                visit(child, f"{name}.{child.name}")

    for path in (ROOT / "minids").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "minids").with_suffix("").parts)
        visit(ast.parse(path.read_text(encoding="utf-8")), name)
    return found


def is_a_test(name):
    """Is there a test `path::name` or `path::name[13-case]`, or a notebook, which is run as one?"""
    path, _, test = name.partition("::")
    test, _, case = test.partition("[")
    if not (ROOT / path).is_file():
        return False
    source = (ROOT / path).read_text(encoding="utf-8")
    return f"\ndef {test}(" in source and case[:-1].partition("-")[2] in source if test else path.endswith(".ipynb")


@functools.cache
def section_of_facts(number):
    """A section of FACTS.md with its subsections, or "" where there is none."""
    level = "#" * (2 + number.count("."))
    pattern = rf"^{level} {re.escape(number)}\.? .*?(?=^#{{2,{len(level)}}} |\Z)"
    found = re.search(pattern, read(FACTS), re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


@functools.cache
def everything_in(chapter):
    """A chapter and its exercises, code and prose."""
    paths = [path for folder in ("chapters", "exercises") if (path := ROOT / folder / chapter).exists()]
    return "\n".join(cell.source for path in paths for cell in cells(path))


ROWS = rows(read(INDEX).partition(GENERATED)[0], columns=6)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}, {row[1]}" for row in ROWS])
def test_a_row_of_the_index_names_what_exists(row):
    source, idea, sections, chapter, code, tests = row
    assert source and idea and names(code) and names(tests)
    scripts = [name for name in names(code) if "/" in name]
    functions = [name for name in names(code) if name not in scripts]
    for name in functions:
        resolve_name(f"minids.{name}")
    assert all((ROOT / name).is_file() for name in scripts)
    assert all(map(is_a_test, names(tests)))
    assert all(map(section_of_facts, sections.split(", ")))
    for target in links(chapter):
        own = everything_in(Path(target).name)
        assert any(re.search(rf"\b{name.split('.')[-1]}\b", own) for name in functions) or scripts, target


def test_what_does_not_exist_is_noticed():
    here = "tests/test_docs.py"
    there = "tests/model/test_pitfalls_cache.py::test_check_passes_and_catches_the_planted_mistake"
    assert is_a_test(f"{here}::test_what_does_not_exist_is_noticed") and is_a_test(f"{there}[08-square mask]")
    assert not is_a_test(f"{there}[08-round mask]") and not is_a_test(f"{here}::test_none") and not is_a_test(here)
    assert not is_a_test("tests/none.py::test_a") and not is_a_test("chapters/none.ipynb")
    assert section_of_facts("2.2") and not section_of_facts("2.9")


def test_what_a_docstring_cites_has_a_row_in_the_index():
    indexed = {}
    for source, *_, code, _ in ROWS:
        for name in names(code):
            indexed.setdefault(name, set()).update(citations(source))
    missing = {name: citations(text) - indexed.get(name, set()) for name, text in docstrings().items()}
    drawn = "course.drawings."  # a drawing illustrates what another module computes
    assert not {name: cited for name, cited in missing.items() if cited and not name.startswith(drawn)}


def test_what_the_index_cites_stands_in_the_docstring_or_in_the_facts():
    for source, _, sections, _, code, _ in ROWS:
        texts = ["V3 section 0. " + section_of_facts(section) for section in sections.split(", ")]
        facts = {cited[1:] for text in texts for cited in citations(text)}  # there a source may stand in the heading
        docs = {cited for name in names(code) for cited in citations(docstrings().get(name, ""))}
        unknown = {cited for cited in citations(source) if cited not in docs and cited[1:] not in facts}
        assert not unknown, f"{source}, {code}"


def by_code():
    """The second table: from code to papers and chapters."""
    found = {}
    for source, idea, _, chapter, code, _ in ROWS:
        for name in names(code):
            for column, entry in zip(found.setdefault(name, ({}, {}, {})), (idea, source, chapter), strict=True):
                column[entry] = None
    lines = ["| code | what | source | chapter |", "|---|---|---|---|"]
    for name, (ideas, sources, chapters) in sorted(found.items()):
        chapters = {chapter: None for chapter in chapters if chapter != NOTHING} or {NOTHING: None}
        lines.append(f"| `{name}` | {'; '.join(ideas)} | {'; '.join(sources)} | {', '.join(chapters)} |")
    return "\n".join(lines) + "\n"


def test_the_index_by_code_is_made_from_the_index_by_paper():
    assert read(INDEX).partition(GENERATED)[2] == by_code(), "run: python tests/test_docs.py"


# Errata, map and site ------------------------------------------------------------------------------------------------


def test_every_erratum_says_what_minids_does_and_which_test_holds_it():
    errata = rows(read(ERRATA), columns=4)
    assert len(errata) >= 30
    for where, disagreement, does, tests in errata:
        assert where and disagreement and does
        assert tests == NOTHING or names(tests) and all(map(is_a_test, names(tests))), where
    assert sum(tests == NOTHING for *_, tests in errata) <= 3


def test_the_map_of_the_package_names_every_subpackage_and_files_that_exist():
    subpackage, mapped = "", set()
    for place, files, _ in rows(read(ROOT / "docs/PACKAGE.md"), columns=3):
        subpackage = names(place)[0] if place else subpackage
        mapped |= {subpackage + file for file in names(files)}
    assert not {name for name in mapped if not (ROOT / "minids" / name).exists()}
    subpackages = {f"{path.parent.name}/" for path in (ROOT / "minids").glob("*/__init__.py")}
    assert subpackages == {name[: name.index("/") + 1] for name in mapped if "/" in name}


def test_the_site_has_every_document():
    contents = (ROOT / "docs/site/_toc.yml").read_text(encoding="utf-8")
    assert {ROOT / f"{page}.md" for page in re.findall(r"(?:root|file): (\S+)", contents)} == set(DOCUMENTS)
    assert re.findall(r"glob: (\S+)", contents) == ["chapters/*", "exercises/*"]


README_PICTURES = {"docs/map.svg": v3_map} | {f"docs/pictures/{n}.svg": DRAWINGS[name] for n, name in PICTURES.items()}


@pytest.mark.parametrize("file, draw", README_PICTURES.items(), ids=README_PICTURES)
def test_a_picture_of_the_readme_is_the_drawing_of_its_chapter(file, draw):
    """Made by `python -m minids.course.drawings`."""
    drawn = (ROOT / file).read_text(encoding="utf-8")
    assert file in read(README)
    for box in draw().boxes.values():
        words = [text for text in (box.label, box.shape) if "$" not in text]  # formulas are drawn sign by sign
        assert all(escape(word) in drawn for text in words for word in text.split())


def test_the_readme_reads_well_before_it_has_an_address():
    assert not re.search("OWNER|ADDRESS|localhost", read(README))


GLOSSARY = [
    row for row in rows((ROOT / "docs/GLOSSARY.md").read_text(encoding="utf-8"), columns=4) if "chapters/" in row[2]
]


@pytest.mark.parametrize("term, chinese, chapter, sentence", GLOSSARY, ids=[row[0] for row in GLOSSARY])
def test_a_term_of_the_glossary_is_used_in_its_chapter(term, chinese, chapter, sentence):
    (target,) = links(chapter)
    text = everything_in(Path(target).name).lower()
    assert any(word.strip().lower() in text for word in term.split(",")), term
    assert chinese and sentence.endswith(".") and sentence[0].isupper()


if __name__ == "__main__":
    INDEX.write_text(read(INDEX).partition(GENERATED)[0] + GENERATED + by_code(), encoding="utf-8")
