"""Rule-based rewards: accuracy (by comparison or by unit tests), format, and language consistency.

Notable choices: a response is parsed from tokens, not from text, so a spelled-out tag is not a tag; a part is a plain
function of a problem and a response; no reward reads the reasoning itself, only its language, so the reasoning cannot
be reward-hacked.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from minids.data.tokenizer import Tokenizer
from minids.reasoning.tasks import Problem
from minids.sandbox.judge import Verdict

LARGEST = 3.4028234663852886e38  # of float32, in which advantages are computed
TEMPLATE = ["<think>", "</think>", "<answer>", "</answer>", "<eos>"]


@dataclass(frozen=True)
class Response:
    """A model's output after a prompt: its tokens, and the thought and answer parsed from them.

    `thought` is None if it is never closed. `answer` is None if there is none or more than one, if it is inside the
    thought or after an unclosed one, or if the output does not end with it.
    """

    tokens: tuple[int, ...]
    text: str
    thought: str | None
    answer: str | None
    well_formed: bool
    ended: bool


def read_response(tokens: Sequence[int], tokenizer: Tokenizer) -> Response:
    """Parse the tokens of a response, without the prompt."""
    names = {tokenizer.token_id(name): name for name in TEMPLATE}
    tags, texts = [], []
    piece: list[int] = []
    for token in tokens:
        if token in names:
            tags.append(names[token])
            texts.append(_decode(piece, tokenizer))
            piece = []
        else:
            piece.append(token)
    texts.append(_decode(piece, tokenizer))  # texts[i] precedes tag i, the last one follows all tags
    ended = tags[-1:] == ["<eos>"] and tags.count("<eos>") == 1 and not piece
    between = (texts[0], *texts[2:3], *texts[4:])
    well_formed = tags == TEMPLATE and not any(text.strip() for text in between)
    thought = texts[1] if tags[:2] == TEMPLATE[:2] else None
    answered = tags in (TEMPLATE, TEMPLATE[2:]) and not texts[-2].strip()
    answer = texts[-3] if answered and ended else None
    return Response(
        tuple(tokens), _decode(tokens, tokenizer, skip_special=False), thought, answer, well_formed and ended, ended
    )


def _decode(tokens: Sequence[int], tokenizer: Tokenizer, *, skip_special: bool = True) -> str:
    """Decode tokens; U+FFFD for tokens without text, which a model with a padded vocabulary may sample."""
    runs = itertools.groupby(tokens, lambda token: token < tokenizer.vocab_size)
    texts = (tokenizer.decode(list(run), skip_special=skip_special) if known else "\ufffd" for known, run in runs)
    return "".join(texts)


def exact_answer(problem: Problem, response: Response) -> float:
    """Return 1 if the answer equals the problem's character by character, else 0; a look-alike digit is incorrect."""
    return float(response.answer is not None and response.answer.strip() == problem.answer)


def has_format(response: Response) -> float:
    """Return the format reward: 1 for <think>...</think><answer>...</answer><eos> and nothing else, else 0."""
    return float(response.well_formed)


def language_consistency(response: Response) -> float:
    """Return the fraction of the thought's words that are English (FACTS.md section 8.2); 1 without words.

    A word is two or more Latin letters, or up to two Han characters. Returns 0 if there is no thought.
    """
    if response.thought is None:
        return 0.0
    english = len(re.findall("[A-Za-z]{2,}", response.thought))
    chinese = len(re.findall("[\u4e00-\u9fff]{1,2}", response.thought))
    return english / (english + chinese) if english + chinese else 1.0


Judge = Callable[[list[tuple[str, str]]], list[Verdict]]
"""Judge of (program, tests) pairs: `Sandbox.run_many`."""


def unit_tests(problems: Sequence[Problem], responses: Sequence[Response], judge: Judge) -> list[float]:
    """Return 1 for each answer that is a program passing the problem's tests, else 0; equal pairs are run once."""
    jobs = [(response.answer or "", problem.tests) for problem, response in zip(problems, responses, strict=True)]
    distinct = list(dict.fromkeys(job for job in jobs if job[0].strip()))
    verdicts = dict(zip(distinct, judge(distinct), strict=True)) if distinct else {}
    return [float(job in verdicts and verdicts[job].passed) for job in jobs]


@dataclass(frozen=True)
class Score:
    """The parts of a reward (the package's own are from 0 to 1), and a finite `total`, which training maximises."""

    parts: Mapping[str, float]
    total: float


Reward = Callable[[Sequence[Problem], Sequence[Response]], list[Score]]
"""Scores a batch of responses to as many problems; `apply_reward` checks what it returns."""


def apply_reward(reward: Reward, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Score]:
    """Score `responses` and check the scores: one per response, finite numbers, and the same parts in all.

    Numbers are returned as floats. Raises a one-line `ValueError` that names the reward and what it must return.
    """
    name, scores = f"reward {getattr(reward, '__name__', type(reward).__name__)}", reward(problems, responses)
    if not isinstance(scores, list | tuple):
        found = type(scores).__name__
        raise ValueError(f"{name}: returned a {found}, must return a list of {len(responses)} Scores, one per response")
    if len(scores) != len(responses):
        raise ValueError(f"{name}: returned {len(scores)} scores for {len(responses)} responses, must return one each")
    checked: list[Score] = []
    for i, score in enumerate(scores):
        if not isinstance(score, Score):
            raise ValueError(f"{name}: returned {_short(score)} for response {i}, must return Score(parts, total)")
        if not (isinstance(score.parts, Mapping) and all(isinstance(part, str) for part in score.parts)):
            raise ValueError(f"{name}: the parts of response {i} are {_short(score.parts)}, must map names to numbers")
        if i and score.parts.keys() != checked[0].parts.keys():
            ours, first = (", ".join(parts) or "none" for parts in (score.parts, checked[0].parts))
            raise ValueError(f"{name}: response {i} has the parts {ours}, response 0 has {first}: must be the same")
        numbers = {"total": score.total, **{f"part {part!r}": value for part, value in score.parts.items()}}
        for what, value in numbers.items():
            if not (isinstance(value, Real) and abs(value) <= LARGEST):  # also false for NaN
                raise ValueError(f"{name}: the {what} of response {i} is {_short(value)}, must be a finite number")
        checked.append(Score({part: float(value) for part, value in score.parts.items()}, float(score.total)))
    return checked


def _short(value: object) -> str:
    """Return the type and the value on one line of limited length."""
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@dataclass(frozen=True)
class RuleReward:
    """Weighted sum of accuracy, format and language rewards; R1-Zero: accuracy + 0.1 format (FACTS.md section 8.2).

    With a judge, accuracy is determined by unit tests of the program; without one, by comparison of the answer.
    Parts without a weight are only reported. Raises `ValueError` for a weight of an unknown part.
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
        for correct, response in zip(accuracy, responses, strict=True):
            parts = {"accuracy": correct, "format": has_format(response), "language": language_consistency(response)}
            scores.append(Score(parts, sum(self.weights.get(name, 0.0) * value for name, value in parts.items())))
        return scores


R1_ZERO_WEIGHTS: Mapping[str, float] = {"accuracy": 1.0, "format": 0.1}
