"""Supervised fine-tuning: the pre-training loop on prompts and answers, with the loss on the answers only.

Notable choices: only the loss mask differs from pre-training: the targets are the answer's tokens, not those of prompt
and padding; stopping, resuming and metrics are those of `Trainer`.
"""

import functools
import hashlib
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
from minids.reasoning.tasks import CorpusStyle, Task, template
from minids.training.pretrain import Recipe, TextData, Trainer

CAREFUL = CorpusStyle(slip=0.0, wrong_step=0.0)


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn; the answer contains special tokens by name, neither contains <bos> or <eos>."""

    prompt: str
    answer: str

    def tokens(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt, from <bos>, and of the answer, with <eos>."""
        prompt = [tokenizer.bos_id, *tokenizer.encode(self.prompt)]
        return prompt, [*tokenizer.encode(self.answer, allow_special=True), tokenizer.eos_id]


def as_lines(items: Iterable[Any]) -> str:
    """Format dataclasses as JSON, one per line, in ASCII: half a line from a killed process is still valid text."""
    return "".join(json.dumps(asdict(item)) + "\n" for item in items)


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a file that `as_lines` formatted."""
    return [Example(**json.loads(line)) for line in path.read_text().splitlines()]


def careful_solutions(
    task: Task, rng: random.Random, count: int, difficulties: Sequence[int], widths: Sequence[int]
) -> list[Example]:
    """Return correct worked solutions in English and in the required format, in the document style `CAREFUL`.

    `widths` are possible numbers of instructions per written step, drawn per solution; 0 writes no steps.
    """
    examples = []
    for difficulty in itertools.islice(itertools.cycle(difficulties), count):
        chain = task.chain(rng, difficulty, held_out=False)
        problem = task.problem(rng, chain)
        thought, reply = task.solve(rng, chain, CAREFUL, rng.choice(widths), ("en",))
        examples.append(Example(problem.prompt, template(thought, reply)))
    return examples


class ExampleStream(BatchStream):
    """Endless batches with one padded example per row; every epoch uses each example once, in a new order.

    Batch n is a pure function of (examples, seed, n). Raises `ValueError` for no examples or one that is too long.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Tokenizer, *, batch_size: int, seq_len: int, seed: int):
        if not examples:
            raise ValueError("examples: must contain at least one")
        self.tokens = np.full((len(examples), seq_len + 1), tokenizer.pad_id, np.int64)
        self.loss_mask = np.zeros(self.tokens.shape, bool)
        for row, example in enumerate(examples):
            prompt, answer = example.tokens(tokenizer)
            length = len(prompt) + len(answer)
            if length > seq_len + 1:
                raise ValueError(f"seq_len={seq_len}: example {row} has {length} tokens, a row holds {seq_len + 1}")
            self.tokens[row, :length] = prompt + answer
            self.loss_mask[row, len(prompt) : length] = True
        starts = np.arange(0, self.tokens.size, seq_len + 1)
        corpus = TokenizedCorpus(self.tokens.reshape(-1), starts, np.zeros_like(starts), ("examples",))
        super().__init__(corpus, batch_size=batch_size, seq_len=seq_len, seed=seed)
        self.rows_per_epoch = len(examples)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def batch(self, n: int) -> Batch:
        """Return batch `n`, which may contain the last rows of one epoch and the first of the next."""
        numbers = (divmod(i, self.rows_per_epoch) for i in range(n * self.batch_size, (n + 1) * self.batch_size))
        rows = [self._order(epoch)[place] for epoch, place in numbers]
        tokens, loss_mask = (torch.from_numpy(table[rows]) for table in (self.tokens, self.loss_mask))
        one_document = torch.zeros_like(tokens)
        return Batch(tokens, one_document, one_document, loss_mask)

    def state_dict(self) -> dict[str, int | str]:
        """Return the position as `BatchStream` does, with the loss mask: other targets are other examples."""
        return super().state_dict() | {"loss_mask": hashlib.sha256(np.packbits(self.loss_mask).data).hexdigest()[:16]}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Restore the saved position. Raises `ValueError` if it belongs to other examples."""
        here = self.state_dict()["loss_mask"]
        if state.get("loss_mask") != here:
            raise ValueError(f"saved data position has loss mask {state.get('loss_mask')}, these examples have {here}")
        super().load_state_dict(state)

    def _shuffled(self, epoch: int) -> Int[np.ndarray, "examples"]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows_per_epoch)


def sft_recipe(
    examples: int, *, epochs: int, learning_rate: float, batch_size: int = 32, seq_len: int = 96, seed: int = 0
) -> Recipe:
    """Return the recipe of `epochs`; the router's biases are frozen, because padding would distort their update."""
    steps = math.ceil(examples * epochs / batch_size)
    return Recipe(
        steps=steps, batch_size=batch_size, seq_len=seq_len, learning_rate=learning_rate, warmup_steps=5,
        weight_decay=0.01, mtp_weight=0.0, balance_speed=0.0, seed=seed, evaluate_every=steps, checkpoint_every=50,
    )  # fmt: skip


class SFTTrainer(Trainer):
    """Trainer on examples, evaluated on held-out documents of the pre-training corpus `text`, to measure forgetting."""

    def __init__(self, model: MiniDS, examples: Sequence[Example], text: TextData, recipe: Recipe):
        super().__init__(model, text, recipe)
        self.stream = ExampleStream(
            examples, text.tokenizer, batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=recipe.seed
        )
