"""The site: links to the glossary in what is handed to Jupyter Book, and the pages that it makes by the one command."""

import functools
import json
import re
import shutil
import subprocess
import sys

import pytest
from bs4 import BeautifulSoup

import course
from minids.course.notebooks import ROOT

sys.path.insert(0, str(ROOT / "docs/site"))
import glossary  # noqa: E402

DOCUMENT = (ROOT / "docs/GLOSSARY.md").read_text(encoding="utf-8")
ENTRIES = glossary.entries(DOCUMENT)
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
ROLE = re.compile(r"\{term\}`([^<`]+) <([^>]+)>`")

# Links to the glossary ------------------------------------------------------------------------------------------------


def row(names, chapter="03_moe.ipynb"):
    return f"| {names} | 词 | [03](../chapters/{chapter}) | What it is. |\n"


def linked(markdown, *names, chapter="03_moe.ipynb"):
    return glossary.Linker(glossary.entries("".join(map(row, names))), chapter)(markdown)


def test_the_longest_term_is_linked_and_only_once():
    assert linked("Shared experts, an expert, a shared expert, experts.", "expert", "shared expert") == (
        "{term}`Shared experts <shared expert>`, an {term}`expert <expert>`, a shared expert, experts."
    )
    assert linked("HBM bandwidth", "HBM", "HBM bandwidth") == "{term}`HBM bandwidth <HBM bandwidth>`"


@pytest.mark.parametrize("word", ["expertise", "sub-expert", "expert-wise", "ROPE", "rope", "muon"])
def test_a_term_inside_a_word_or_in_another_case_is_not_linked(word):
    assert linked(f"An {word}.", "expert", "RoPE", "Muon") == f"An {word}."


NOT_PROSE = [
    "# An expert\n", "```\nexpert\n```", "`expert`", "``a ` expert``", "$expert$", "$$\nexpert\n$$",
    "[an expert](x.md)", "![an expert [1]](x.svg)", '<img alt="expert">', "<details><summary>An expert?</summary>",
    "| expert | b |", "https://expert.org/expert", "<https://expert.org>",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_PROSE)
def test_what_is_not_prose_is_left_alone(text):
    page = f"{text}\n\nAn expert.\n"
    assert linked(page, "expert") == f"{text}\n\nAn {{term}}`expert <expert>`.\n"


def test_an_everyday_word_is_linked_in_its_own_chapter_only():
    assert {name for entry in ENTRIES for name in entry.names} > glossary.EVERYDAY
    assert linked("A gain.", "gain") == "A {term}`gain <gain>`."
    assert linked("A gain.", "gain", chapter="01_baseline.ipynb") == "A gain."


def test_plurals_and_a_line_break_are_the_same_term():
    assert linked("Index\nqueries", "index query") == "{term}`Index queries <index query>`"
    assert linked("data-parallel", "data parallel") == "{term}`data-parallel <data parallel>`"


def test_the_glossary_of_the_site_has_every_term_once_with_its_chinese_one():
    page = glossary.directives(DOCUMENT)
    names = [name for entry in ENTRIES for name in entry.names]
    assert len(set(map(str.lower, names))) == len(names) > 130
    assert "|---" not in page and all(f"\n{name}\n" in page for name in names)
    assert all(f">{entry.chinese}</span> {entry.sentence}" in page for entry in ENTRIES)
    assert [line for line in page.splitlines() if line[:1] == "#"] == re.findall("^#.*$", DOCUMENT, re.MULTILINE)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_links_add_nothing_else_to_a_chapter_and_each_term_once(path):
    link, found = glossary.Linker(ENTRIES, path.name), []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            before, after = "".join(cell["source"]), link("".join(cell["source"]))
            found += [name for _, name in ROLE.findall(after)]
            assert ROLE.sub(r"\1", after).split() == before.split()
    assert len(found) == len(set(found)) > 5
    assert set(found) <= {name for entry in ENTRIES for name in entry.names}


# The pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The site as `python3 course.py site` makes it of a copy of this tree; any warning is an error."""
    if not (course.SITE_ENVIRONMENT / "requirements.sha256").exists():
        pytest.skip("the site's environment is not there: python3 course.py site")
    folder = tmp_path_factory.mktemp("site") / "minids"
    unneeded = shutil.ignore_patterns(".*", "runs", "site", "tests", "solutions", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=unneeded)
    shutil.copytree(ROOT / "docs/site", folder / "docs/site", dirs_exist_ok=True)  # "site" above means the built one
    (folder / course.SITE_ENVIRONMENT.name).symlink_to(course.SITE_ENVIRONMENT)
    command = [sys.executable, "course.py", "site", "-W", "--keep-going"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, "\n".join(re.findall(r".*(?:WARNING|ERROR).*", done.stdout + done.stderr))
    return folder / "site/_build/html"


@functools.cache
def page(path):
    """What a page says, without its navigation."""
    html = path.read_text(encoding="utf-8")
    return BeautifulSoup(html[html.find("<article") : html.find("</article>")], "html.parser")


def stored(path, what):
    """How many drawings or folded answers a notebook holds."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    if what == "drawing":
        return sum("image/svg+xml" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    return sum("".join(cell["source"]).count("<details>") for cell in cells if cell["cell_type"] == "markdown")


def test_every_page_is_there_and_every_link_within_the_site_leads_to_something(pages):
    built = {path.relative_to(pages).as_posix() for path in pages.rglob("*.html")}
    assert {f"{folder}/{path.stem}.html" for folder in ("chapters", "exercises") for path in CHAPTERS} <= built
    soups = {pages / name: page(pages / name) for name in built}
    anchors = {path: {tag["id"] for tag in soup.select("[id]")} for path, soup in soups.items()}
    broken = []
    for path, soup in soups.items():
        for link in soup.select("a.reference.internal[href]"):
            name, _, anchor = link["href"].partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists() or anchor and target in anchors and anchor not in anchors[target]:
                broken.append((path.name, link["href"]))
    assert broken == []


def test_chapters_have_their_answers_drawings_and_links_to_the_glossary(pages):
    terms = {tag["id"] for tag in page(pages / "docs/GLOSSARY.html").select("dl.glossary dt[id]")}
    assert len(terms) == sum(len(entry.names) for entry in ENTRIES)
    for path in CHAPTERS:
        article = page(pages / f"chapters/{path.stem}.html")
        links = [span.parent["href"] for span in article.select("a > span.std-term")]
        assert len(links) > 5 and {link.partition("#")[2] for link in links} <= terms
        assert not article.select("h1 .std-term, h2 .std-term, h3 .std-term, pre .std-term, .problematic")
        assert len(article.select("details:not(.hide) > summary")) == stored(path, "answer") > 0
        drawings = [image for image in article.select('img[src$=".svg"]') if image["alt"].startswith("Drawing: ")]
        assert len(drawings) == stored(path, "drawing") > 0
        assert all((pages / "chapters" / image["src"]).resolve().stat().st_size > 0 for image in drawings)
        assert not [image["src"] for image in article.select("img") if image["alt"].startswith("..")]
