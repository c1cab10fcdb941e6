"""Answers are taken apart into steps, and each step is checked against the problem and the step before."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minids.course.stages_chart import draw_stages, final_answer, read_steps

PROMPT = "a7 b+8 c-9 d*3?"


@pytest.mark.parametrize(
    "answer, correct",
    [
        ("<think> b7+8=15 then c15-9=6 then d6*3=18</think><answer>18</answer>", [1, 1, 1]),
        ("<think> b7+8=15 然后 c15-9=7 then d7*3=21</think><answer>21</answer>", [1, 0, 1]),  # a slip, then its result
        ("<think> b7+8=15 then c15+9=24</think><answer>24</answer>", [1, 0]),  # another instruction
        ("<think> b7+8=15 then d15*3=45</think><answer>45</answer>", [1, 0]),  # one left out
        ("<think> c7+8-9=6 then d6*3=18</think><answer>18</answer>", [1, 1]),  # two instructions in one step
        ("<think> b6+8=14</think><answer>14</answer>", [0]),  # from another value than the start's
        ("<think></think><answer>18</answer>", []),
    ],
)
def test_a_step_is_correct_if_it_follows_from_the_one_before(answer, correct):
    assert [step.correct for step in read_steps(PROMPT, answer)] == list(map(bool, correct))


def test_words_between_steps_are_kept_and_chinese_ones_written_in_letters():
    steps = read_steps(PROMPT, "<think> b7+8=15 然后 c15-9=6 then d6*3=18</think><answer>18</answer>")
    assert [step.word for step in steps] == ["", "ránhòu", "then"]


@pytest.mark.parametrize(
    "answer, final",
    [("<think> b7+8=15</think><answer>18</answer>", "18"), ("<think> b7+8=15<answer>3</answer>", "3"), ("18", "18")],
)
def test_the_final_answer_is_what_follows_the_thought(answer, final):
    assert final_answer(answer) == final


def test_the_figure_has_a_row_for_each_stage():
    answers = {"base": ("18", False), "R1": ("<think> b7+8=15</think><answer>18</answer>", True)}
    figure = draw_stages(PROMPT, "18", answers)
    FigureCanvasAgg(figure).draw()
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"base", "R1", "b7+8=15", "18", "(no step)"} <= words
