"""Each measured number in the README is the one in the file of results that its row names."""

import json
import re

import pytest
from documents import README, ROOT, links, read, rows

from minids.config import ModelConfig
from minids.cost import num_parameters

RESULTS = ROOT / "benchmarks/results"


def result(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def two_minute_model():
    found = result("pretraining_recipe.json")
    return f"{found['model']:.2f} bits per byte (gzip: {found['gzip']:.2f})"


def r1_zero():
    runs = [run for name, run in result("r1_zero.json")["runs"].items() if name.startswith("recipe")]
    assert len(runs) == 8
    before, after = ([run["evaluations"][i]["held_out/pass@1"] for run in runs] for i in (0, -1))
    return f"{min(before):.2f} to {max(before):.2f} before, {min(after):.2f} to {max(after):.2f} after"


def compiled_step():
    (single,) = [found for found in result("decoding.json")["found"] if found["batch"] == 1]
    name = "transformers grouped_mm / compiled"  # the faster of transformers' two
    return f"{single['ratios'][name]['median']:.1f} times as fast"


def training_step():
    medians = {row["what"]: row["median"] for row in result("bench.json")["rows"]}
    return f"{medians['training step, transformers grouped_mm / minids']:.2f} times as fast"


def parameters():
    return f"{num_parameters(ModelConfig.preset('v3')):,}"


MEASURED = {
    "the two-minute model": two_minute_model,
    "R1-Zero in miniature": r1_zero,
    "the compiled decoding step": compiled_step,
    "a training step": training_step,
    "parameters of V3": parameters,
}
TABLE = [row for row in rows(read(README), columns=3) if any(row[0].startswith(name) for name in MEASURED)]


def test_every_row_of_results_is_checked():
    section = read(README).partition("what you will see")[2].partition("\n\n")[0]
    assert len(TABLE) == len(MEASURED) == len(rows("| x | y | z |" + section, columns=3))


@pytest.mark.parametrize("what, number, source", TABLE, ids=[row[0] for row in TABLE])
def test_a_number_of_the_readme_is_the_stored_one(what, number, source):
    (measured,) = [measure() for name, measure in MEASURED.items() if what.startswith(name)]
    assert number.startswith(measured)
    assert all((ROOT / target).is_file() for target in links(source)) and (links(source) or "chapter" in source)


def test_the_sentence_on_what_was_missed_has_the_stored_numbers():
    medians = {row["what"]: f"({row['median']:.2f})" for row in result("bench.json")["rows"]}
    sentence = read(README).partition("With compiled layers")[2].partition("\n\n")[0]
    compiled = medians["training step, transformers grouped_mm / compiled"].strip("()")
    assert f"a training step is {compiled} times as fast" in sentence
    assert f"hardly faster {medians['decoding at batch 1, transformers grouped_mm / minids']}" in sentence
    assert f"slower here {medians['decoding at batch 1, plain / speculative']}" in sentence.replace("\n", " ")


def test_a_changed_number_is_noticed():
    assert not "1.82 bits per byte (gzip: 2.43)".startswith(two_minute_model().replace("1.8", "1.9"))
    assert re.fullmatch(r"\d\.\d+ to \d\.\d+ before, \d\.\d+ to \d\.\d+ after", r1_zero())
