"""Supervised fine-tuning: the loop of pre-training on prompts and answers, with the loss on the answers only.

Notable choices: `Batch.documents` already says which tokens are targets (those of the same document as the token
before), so a mask needs no new loss: every prompt token and every padding token is a document of its own, and the
answer goes on with that of the last prompt token; stopping, resuming and reporting are the `Trainer`'s.
"""

import functools
import itertools
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from minids.data.batches import Batch, BatchStream, TokenizedCorpus
from minids.data.tokenizer import Tokenizer
from minids.model.transformer import MiniDS
from minids.reasoning.tasks import Task, Web, template
from minids.training.loop import Recipe, TextData, Trainer

CAREFUL = Web(slip=0.0, wrong_step=0.0)


@dataclass(frozen=True)
class Example:
    """What is asked, and the answer to be learned; special tokens by name in the answer, <bos> and <eos> in neither."""

    prompt: str
    answer: str

    def tokens(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """<bos> prompt, and answer <eos>: what the model reads, and what it must write."""
        prompt = [tokenizer.bos_id, *tokenizer.encode(self.prompt)]
        return prompt, [*tokenizer.encode(self.answer, allow_special=True), tokenizer.eos_id]


def as_lines(items: Iterable[Any]) -> str:
    """Dataclasses as JSON, one a line, all ASCII: half a line, left by a killed process, is still text."""
    return "".join(json.dumps(asdict(item)) + "\n" for item in items)


def read_examples(path: Path) -> list[Example]:
    """Read back a file of `as_lines`."""
    return [Example(**json.loads(line)) for line in path.read_text().splitlines()]


def careful_solutions(
    task: Task, rng: random.Random, count: int, difficulties: Sequence[int], widths: Sequence[int]
) -> list[Example]:
    """What careful authors write in English: right, in the form, `width` instructions to a written step."""
    examples = []
    for difficulty in itertools.islice(itertools.cycle(difficulties), count):
        chain = task.chain(rng, difficulty, held_out=False)
        problem = task.problem(rng, chain)
        thought, reply = task.solve(rng, chain, CAREFUL, rng.choice(widths), ("en",))
        examples.append(Example(problem.prompt, template(thought, reply)))
    return examples


class ExampleStream(BatchStream):
    """Endless batches with an example to a row, padded; an epoch takes every example once, in an order of its own.

    Batch n is a pure function of (examples, seed, n). Raises `ValueError` where no example is given, or one too long.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Tokenizer, *, batch_size: int, seq_len: int, seed: int):
        if not examples:
            raise ValueError("examples: there is none to learn from")
        self.tokens = np.full((len(examples), seq_len + 1), tokenizer.pad_id, np.int64)
        alone = np.ones(self.tokens.shape, bool)  # tokens with which a new document begins
        for row, example in enumerate(examples):
            prompt, answer = example.tokens(tokenizer)
            length = len(prompt) + len(answer)
            if length > seq_len + 1:
                raise ValueError(f"seq_len={seq_len}: example {row} has {length} tokens, a row holds {seq_len + 1}")
            self.tokens[row, :length] = prompt + answer
            alone[row, len(prompt) : length] = False
        self.documents = alone.cumsum().reshape(alone.shape) - 1
        starts = np.flatnonzero(alone)
        corpus = TokenizedCorpus(self.tokens.reshape(-1), starts, np.zeros_like(starts), ("examples",))
        super().__init__(corpus, batch_size=batch_size, seq_len=seq_len, seed=seed)
        self.rows_per_epoch = len(examples)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def batch(self, n: int) -> Batch:
        """Batch number `n`; it may hold the last rows of one epoch and the first of the next."""
        numbers = (divmod(i, self.rows_per_epoch) for i in range(n * self.batch_size, (n + 1) * self.batch_size))
        rows = [self._order(epoch)[place] for epoch, place in numbers]
        tokens, documents = (torch.from_numpy(table[rows]) for table in (self.tokens, self.documents))
        return Batch(tokens, documents, torch.zeros_like(tokens))

    def _shuffled(self, epoch: int) -> Int[np.ndarray, "examples"]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows_per_epoch)


def sft_recipe(
    examples: int, *, epochs: int, learning_rate: float, batch_size: int = 32, seq_len: int = 96, seed: int = 0
) -> Recipe:
    """As many steps as the epochs take. The router's biases rest: padding would count in their balance."""
    steps = math.ceil(examples * epochs / batch_size)
    return Recipe(
        steps=steps, batch_size=batch_size, seq_len=seq_len, learning_rate=learning_rate, warmup_steps=5,
        weight_decay=0.01, mtp_weight=0.0, balance_speed=0.0, seed=seed, evaluate_every=steps, checkpoint_every=50,
    )  # fmt: skip


class SFTTrainer(Trainer):
    """Teaches examples; judged, as pre-training is, by the validation text of `text`: what is forgotten shows there."""

    def __init__(self, model: MiniDS, examples: Sequence[Example], text: TextData, recipe: Recipe):
        super().__init__(model, text, recipe)
        self.stream = ExampleStream(
            examples, text.tokenizer, batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=recipe.seed
        )
