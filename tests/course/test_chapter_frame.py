"""Each chapter that was written anew has the course's frame: map, schematic, questions, references, and plain words."""

import ast
import hashlib
import re

import pytest
from notebooks import CHAPTERS, name

from minids.course.notebooks import read

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=name)

NOT_THE_FIELDS = re.compile(  # words of the first version that no paper uses
    r"re-ma[dk]e|\bdear(er)?\b|\bparcels?\b|leaving home|whole or absent|\(no unit\)|\bwakes?\b|promoted product"
    r"|what a choice counts for|thinking bought|shared out|waits? in a circle|guess(es|ed)? ahead"
    r"|who asks|sleeps?\b|\barrears\b|the dimension that is summed"
)
PLOTS = {"lines", "bars", "points", "heatmap", "canvas"}


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path):
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def outputs(cell):
    return [output.get("data", {}) for output in cell.outputs]


@each_chapter
def test_it_opens_with_the_map_and_draws_its_idea_before_the_code(path):
    cells = code_cells(path)
    drawings = [i for i, cell in enumerate(cells) if any("image/svg+xml" in data for data in outputs(cell))]
    assert re.search(r"^start\(minutes=[\d.]+.*reading=\d+", cells[0].source, re.MULTILINE)
    assert drawings and "v3_map(" in cells[drawings[0]].source and drawings[0] <= 1
    assert len(drawings) >= 2 and drawings[1] <= 4


@each_chapter
def test_its_reading_time_is_that_of_its_length(path):
    words = len(prose(path).split()) + sum(len(cell.source.split()) for cell in code_cells(path))
    stated = int(re.search(r"reading=(\d+)", code_cells(path)[0].source)[1])
    assert words / 150 < stated < words / 60, f"{words} words of prose and code"


@each_chapter
def test_it_ends_with_questions_whose_answers_are_folded(path):
    end = prose(path)[-9000:]
    assert len(re.findall(r"<details>", end)) >= 4
    assert end.count("<details>") == end.count("</details>") == end.count("<summary>")


@each_chapter
def test_its_references_have_links_that_work(path):
    (references,) = re.findall(r"^#+ .*References\n(.*?)(?=^#+ |\Z)", prose(path), re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"\]\(https://[\w.-]+\.\w+/[^)\s]*\)", references)) >= 3
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("http"):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target), target
        elif not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), f"{target} does not exist"


@each_chapter
def test_it_prints_values_and_no_conditions(path):
    for cell in code_cells(path):
        printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        assert not re.search(r"\b(True|False)\b", printed), printed


@each_chapter
def test_its_words_are_the_fields(path):
    assert not NOT_THE_FIELDS.findall(prose(path))


@each_chapter
def test_its_figures_have_titles_that_say_what_they_show(path):
    for cell in code_cells(path):
        for call in ast.walk(ast.parse(cell.source)):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in PLOTS:
                if not (isinstance(call.func.value, ast.Name) and call.func.value.id == "plots"):
                    continue
                positional = {"heatmap": 4}.get(call.func.attr, 3 if call.func.attr != "canvas" else 2)
                titles = [word.value for word in call.keywords if word.arg == "title"] + call.args[positional:][:1]
                assert titles, f"no title: {ast.unparse(call)[:80]}"
                if isinstance(titles[0], ast.Constant):
                    assert len(titles[0].value.split()) >= 4, f"a title that is no sentence: {titles[0].value!r}"


@each_chapter
def test_no_figure_is_stored_twice(path):
    pictures = [data[kind] for cell in code_cells(path) for data in outputs(cell) for kind in data if "image/" in kind]
    prints = [hashlib.sha256(str(picture).encode()).digest() for picture in pictures]
    assert len(set(prints)) == len(prints)
