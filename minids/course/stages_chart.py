"""Answers to one problem of the trace task, one row per stage of training: every written step, and the final answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minids.course import plots
from minids.reasoning.tasks.chain import apply

PINYIN = {"然后": "ránhòu", "所以": "suǒyǐ", "等等": "děngděng"}  # not every font has the characters
_STEP = re.compile(r"([a-h])(\d+)((?:[-+*]\d)+)=(\d+)")
_PART = re.compile(r"([-+*])(\d)")
CORRECT, INCORRECT = ("#e8f1fa", plots.COLORS[0], "-"), ("#fde3c8", plots.COLORS[1], "--")


@dataclass(frozen=True)
class Step:
    """A written step, the word before it, and whether it computes what the problem asks for from the value before."""

    word: str
    text: str
    correct: bool


def read_steps(prompt: str, answer: str) -> list[Step]:
    """Return the steps that an answer writes, each checked against the problem and the step before it."""
    instructions = {label: found for label, found in re.findall(r" ([b-h])([-+*]\d)", prompt)}
    value, done, end, steps = int(re.match(r"a(\d+)", prompt)[1]), 0, 0, list[Step]()  # type: ignore[index]
    for found in _STEP.finditer(answer):
        asked = "".join(list(instructions.values())[done : "bcdefgh".find(found[1]) + 1])
        result = value
        for sign, operand in _PART.findall(found[3]):
            result = apply(result, (sign, int(operand)))
        correct = found[3] == asked and int(found[2]) == value and int(found[4]) == result
        word = re.sub(r"<[^>]*>", "", answer[end : found.start()]).strip()
        steps.append(Step(PINYIN.get(word, word), found[0], correct))
        value, done, end = int(found[4]), "bcdefgh".find(found[1]) + 1, found.end()
    return steps


def final_answer(answer: str) -> str:
    """Return the text after the thought, without tags: after </think>, else after <answer>, else all of it."""
    rest = answer.partition("</think>")[2] or answer.partition("<answer>")[2] or answer
    return re.sub(r"<[^>]*>", " ", rest).strip() or "-"


def draw_stages(prompt: str, expected: str, answers: Mapping[str, tuple[str, bool]]) -> Figure:
    """Draw a row per stage: `answers` maps its name to an answer and whether the rules call it correct."""
    figure, axes = plots.canvas(
        "", "", f"After every stage: {prompt} (correct: {expected})", size=(10.5, 0.7 + 0.56 * len(answers))
    )
    axes.set(xlim=(0, 10.5), ylim=(-len(answers) + 0.4, 0.9))
    axes.axis("off")
    axes.text(1.6, 0.6, "thought, step by step", color="#5c6873", size=9, va="center")
    axes.text(9.15, 0.6, "answer", color="#5c6873", size=9, va="center")
    for row, (stage, (answer, correct)) in enumerate(answers.items()):
        axes.text(0, -row, stage, size=9, va="center")
        steps = read_steps(prompt, answer)
        if not steps:
            axes.text(1.6, -row, "(no step)", size=8, va="center", color="#5c6873", style="italic")
        for column, step in enumerate(steps[:7]):
            _box(axes, 1.6 + 1.08 * column, -row, 1.0, f"{step.text}", step.word, step.correct)
        final = final_answer(answer)
        _box(axes, 9.15, -row, 1.25, final if len(final) < 12 else final[:11] + "…", "", correct)
    return figure


def _box(axes, left: float, y: float, width: float, text: str, word: str, correct: bool) -> None:
    face, edge, line = CORRECT if correct else INCORRECT
    shape = FancyBboxPatch(
        (left, y - 0.2), width, 0.4, boxstyle="round,pad=0,rounding_size=0.05", facecolor=face, edgecolor=edge,
        linestyle=line, linewidth=1.0 if correct else 1.8,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(left + width / 2, y, text, size=7.6, ha="center", va="center", family="monospace")
    if word:
        axes.text(left + 0.02, y + 0.32, word, size=7.2, va="center", color="#5c6873", style="italic")
