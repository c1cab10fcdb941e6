"""Rewards by rule: is the answer right, does it have the form, is the thought in one language, does the program work.

Notable choices: an answer is read from tokens, not from text, so nobody can forge a tag by spelling it; a part is a
plain function of a problem and a response; no part looks at the thought's content, which would be a thing to please.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minids.data.tokenizer import Tokenizer
from minids.reasoning.sandbox import Verdict
from minids.reasoning.tasks import Problem

TEMPLATE = ["<think>", "</think>", "<answer>", "</answer>", "<eos>"]


@dataclass(frozen=True)
class Response:
    """What a model wrote after a prompt: its tokens, and what can be read from them.

    `thought` and `answer` are None where they are not there to be read: a thought that is never closed; an answer that
    is not the only one, that stands inside the thought or after an unclosed one, or that the output did not end with.
    """

    tokens: tuple[int, ...]
    text: str
    thought: str | None
    answer: str | None
    well_formed: bool
    ended: bool


def read_response(tokens: Sequence[int], tokenizer: Tokenizer) -> Response:
    """Read a response, prompt not included."""
    names = {tokenizer.token_id(name): name for name in TEMPLATE}
    tags, texts, piece = [], [], []
    for token in tokens:
        if token in names:
            tags.append(names[token])
            texts.append(_decode(piece, tokenizer))
            piece = []
        else:
            piece.append(token)
    texts.append(_decode(piece, tokenizer))  # texts[i] is what stands before tag i, the last what follows all tags
    ended = tags[-1:] == ["<eos>"] and tags.count("<eos>") == 1 and not piece
    between = (texts[0], *texts[2:3], *texts[4:])
    well_formed = tags == TEMPLATE and not any(text.strip() for text in between)
    thought = texts[1] if tags[:2] == TEMPLATE[:2] else None
    answered = tags in (TEMPLATE, TEMPLATE[2:]) and not texts[-2].strip()
    answer = texts[-3] if answered and ended else None
    return Response(
        tuple(tokens), _decode(tokens, tokenizer, skip_special=False), thought, answer, well_formed and ended, ended
    )


def _decode(tokens: Sequence[int], tokenizer: Tokenizer, **options: bool) -> str:
    """Text of the tokens; U+FFFD for tokens without text, which a model with a padded vocabulary may draw."""
    runs = itertools.groupby(tokens, lambda token: token < tokenizer.vocab_size)
    return "".join(tokenizer.decode(list(run), **options) if known else "\ufffd" for known, run in runs)


def exact_answer(problem: Problem, response: Response) -> float:
    """1 where the answer is the problem's, character by character: a look-alike digit is another answer."""
    return float(response.answer is not None and response.answer.strip() == problem.answer)


def has_form(response: Response) -> float:
    """1 for <think>...</think><answer>...</answer><eos> and nothing else."""
    return float(response.well_formed)


def language_consistency(response: Response) -> float:
    """Share of the thought's words that are English (FACTS.md section 8.2); 1 without words.

    A word is two or more Latin letters, or up to two Han characters. 0 where there is no thought to read.
    """
    if response.thought is None:
        return 0.0
    english = len(re.findall("[A-Za-z]{2,}", response.thought))
    chinese = len(re.findall("[\u4e00-\u9fff]{1,2}", response.thought))
    return english / (english + chinese) if english + chinese else 1.0


Judge = Callable[[list[tuple[str, str]]], list[Verdict]]
"""Runs (program, tests) pairs: `Sandbox.run_many`."""


def unit_tests(problems: Sequence[Problem], responses: Sequence[Response], judge: Judge) -> list[float]:
    """1 where the answer is a program that passes the problem's tests. What was judged once is not run again."""
    jobs = [(response.answer or "", problem.tests) for problem, response in zip(problems, responses, strict=True)]
    distinct = list(dict.fromkeys(job for job in jobs if job[0].strip()))
    verdicts = dict(zip(distinct, judge(distinct), strict=True)) if distinct else {}
    return [float(job in verdicts and verdicts[job].passed) for job in jobs]


@dataclass(frozen=True)
class Score:
    """The parts of a reward, each from 0 to 1, and what is maximised: their weighted sum."""

    parts: Mapping[str, float]
    total: float


Reward = Callable[[Sequence[Problem], Sequence[Response]], list[Score]]
"""What the trainer asks: the scores of a batch of responses to as many problems."""


@dataclass(frozen=True)
class RuleReward:
    """accuracy + 0.1 form, and if wanted the language: the rewards of R1-Zero (FACTS.md section 8.2).

    With a judge, accuracy is that of programs, by unit tests; without one, that of answers, by comparison.
    Parts without a weight are only reported. Raises ValueError for a weight of a part that does not exist.
    """

    weights: Mapping[str, float]
    judge: Judge | None = None

    def __post_init__(self):
        unknown = sorted(set(self.weights) - {"accuracy", "format", "language"})
        if unknown:
            raise ValueError(f"weights: there is no part {unknown[0]!r}, only accuracy, format and language")

    def __call__(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Score]:
        if self.judge is None:
            accuracy = list(map(exact_answer, problems, responses))
        else:
            accuracy = unit_tests(problems, responses, self.judge)
        scores = []
        for right, response in zip(accuracy, responses, strict=True):
            parts = {"accuracy": right, "format": has_form(response), "language": language_consistency(response)}
            scores.append(Score(parts, sum(self.weights.get(name, 0.0) * value for name, value in parts.items())))
        return scores


R1_ZERO_WEIGHTS: Mapping[str, float] = {"accuracy": 1.0, "format": 0.1}
