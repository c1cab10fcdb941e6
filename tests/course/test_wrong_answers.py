"""Plausible wrong answers to every exercise: none passes, and each report has a sentence that points at the mistake.

`wrong_answers/chapterNN.py` lists them: `WRONG = {"2.1": [("what is wrong", answer, r"regex of the report"), ...]}`.
The mistakes that an exercise recognises by name are tested in test_exercises.py.
"""

import importlib
import re
from pathlib import Path

import pytest

from minids.course.checks import SpotTheBug, check, find, graded

CHAPTERS = sorted((Path(__file__).parent / "wrong_answers").glob("chapter[0-9][0-9].py"))
WRONG = {
    id: answers
    for path in CHAPTERS
    for id, answers in importlib.import_module(f"wrong_answers.{path.stem}").WRONG.items()
}
CASES = [(id, *case) for id, answers in WRONG.items() for case in answers]
ASKED = [exercise for path in CHAPTERS for exercise in graded(int(path.stem[-2:]))]


@pytest.mark.parametrize("id, words, answer, pattern", CASES, ids=[f"{id}: {words}" for id, words, *_ in CASES])
def test_a_wrong_answer_fails_with_a_pointer(id, words, answer, pattern):
    exercise, report = find(id), check(id, answer)
    assert report.status == "failed", report
    assert report.points < exercise.points if isinstance(exercise, SpotTheBug) else report.points == 0
    assert re.search(pattern, repr(report)), report


@pytest.mark.parametrize("exercise", ASKED, ids=lambda exercise: exercise.id)
def test_an_exercise_has_at_least_four_wrong_answers(exercise):
    assert len(WRONG.get(exercise.id, ())) >= 4
