"""Problems with verifiable answers, their symbols, and the documents of a synthetic pre-training corpus.

Notable choices: both families are chains of instructions on small numbers, where a single step is easy and a chain
without written steps is hard; the train/test split is by hash of the problem, so no seed can move a held-out problem
into training. The synthetic pre-training corpus contains worked solutions, but mostly direct answers; many documents
break the format or mix two languages: the changes by R1-Zero can then be measured.
"""

import random
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

from minids.data.tokenizer import SymbolTokenizer
from minids.reasoning.tasks.chain import Chain

LABELS = "abcdefgh"
WORDS = {"en": (" then", " wait", " so "), "zh": (" 然后", " 等等", " 所以 ")}
SYMBOLS = (
    *(word for words in WORDS.values() for word in words),
    *"0123456789+-*=?",
    *LABELS,
    *(f" {label}" for label in LABELS),
    *(" plus ", " minus ", " times ", "some", ", f(", ")=", "def f(a):", ";", " return "),
)


@dataclass(frozen=True)
class Problem:
    """A prompt, and what its answer is verified by: the expected text, or unit tests (lines `assert f(1) == 2`)."""

    prompt: str
    answer: str = ""
    tests: str = ""
    difficulty: int = 0


def template(thought: str, answer: str) -> str:
    """Return the format that R1-Zero's prompt requests (FACTS.md section 8.2); the tags are special tokens."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


@dataclass(frozen=True)
class CorpusStyle:
    """Document styles of the pre-training corpus: fractions of documents, and probabilities of mistakes."""

    at_once: float = 0.60  # fraction of direct answers, without a written step
    slip: float = 0.20  # probability of a mistake per instruction in a direct answer
    coarse: float = 0.15  # fraction with a written value for every two instructions; the rest write every value
    wrong_step: float = 0.03  # probability of an incorrect written value
    noticed: float = 0.35  # fraction of the incorrect values that are corrected
    broken_format: float = 0.25
    mixed_languages: float = 0.40
    cheating: float = 0.05  # fraction of direct answers that return the value of the first example (programs only)


class Task(ABC):
    """A family of problems; `difficulty` is the number of instructions."""

    name: str
    difficulties: tuple[int, ...]
    """Difficulties of the problems for reinforcement learning and evaluation, in equal parts."""
    document_difficulties: tuple[int, ...]
    one_held_out_in: int = 10
    """One in this many keys is held out."""

    def __init__(self) -> None:
        self.tokenizer = SymbolTokenizer(SYMBOLS)

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        """Draw training problems, balanced over the difficulties."""
        difficulties = (self.difficulties[i % len(self.difficulties)] for i in range(count))
        return [self.problem(rng, self.chain(rng, n, held_out=False)) for n in difficulties]

    def held_out(self, count: int, seed: int = 99) -> list[Problem]:
        """Return distinct held-out problems, never in training, balanced over the difficulties; the same every time."""
        rng = random.Random(seed)
        found: dict[str, Problem] = {}
        while len(found) < count:
            n = self.difficulties[len(found) % len(self.difficulties)]
            problem = self.problem(rng, self.chain(rng, n, held_out=True))
            found.setdefault(problem.prompt, problem)
        return list(found.values())

    def document(self, rng: random.Random, style: CorpusStyle = CorpusStyle()) -> str:  # noqa: B008 - frozen
        """Write a document: a training problem and a response in a random style; special tokens by name."""
        chain = self.chain(rng, rng.choice(self.document_difficulties), held_out=False)
        return self.problem(rng, chain).prompt + self.response(rng, chain, style)

    def chain(self, rng: random.Random, length: int, *, held_out: bool) -> Chain:
        """Draw a chain that fits, from one side of the split."""
        while True:
            chain = self.any_chain(rng, length)
            if self.fits(chain) and self.is_held_out(self.key(chain)) == held_out:
                return chain

    def any_chain(self, rng: random.Random, length: int) -> Chain:
        """Draw a chain that need not fit."""
        return Chain.draw(rng, length)

    def is_held_out(self, key: str) -> bool:
        """Return whether a key is held out: by its hash, so no seed can move it."""
        return zlib.crc32(key.encode()) % self.one_held_out_in == 0

    def response(self, rng: random.Random, chain: Chain, style: CorpusStyle) -> str:
        """Write a thought and an answer in a random document style."""
        width = rng.choices((0, 2, 1), (style.at_once, style.coarse, 1 - style.at_once - style.coarse))[0]
        languages = ("en", "zh") if rng.random() < style.mixed_languages else rng.choice((("en",), ("zh",)))
        thought, answer = self.solve(rng, chain, style, width, languages)
        if rng.random() >= style.broken_format:
            return template(thought, answer)
        untagged = (thought and thought + WORDS[rng.choice(languages)][2]) + answer
        never_closed = f"<think>{thought}<answer>{answer}</answer>"
        return rng.choice((untagged, never_closed, f"<think>{thought}</think>{answer}"))

    def fits(self, chain: Chain) -> bool:
        """Return whether the chain is a valid problem of this family."""
        return True

    @abstractmethod
    def key(self, chain: Chain) -> str:
        """Return the key of the split, which training and held-out problems must not share."""

    @abstractmethod
    def problem(self, rng: random.Random, chain: Chain) -> Problem: ...

    @abstractmethod
    def solve(
        self, rng: random.Random, chain: Chain, style: CorpusStyle, width: int, languages: tuple[str, ...]
    ) -> tuple[str, str]:
        """Write a thought and an answer with `width` instructions per written step; 0 for a direct answer."""
