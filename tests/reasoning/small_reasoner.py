"""A small untrained model on the trace task, and rewards that such a model can earn."""

import torch

from minids.model.transformer import MiniDS
from minids.reasoning import r1_zero
from minids.reasoning.rewards import Score
from minids.reasoning.tasks import TraceTask
from minids.reasoning.trainer import RLRecipe

TASK = TraceTask()
TOKENIZER = TASK.tokenizer
TEXT = r1_zero.pretraining_text(TASK, rows=20)
GOOD = {"accuracy": 1.0, "format": 1.0, "language": 1.0}
RECIPE = RLRecipe(
    steps=4, prompts=2, group_size=4, max_new_tokens=8, evaluate_every=2, evaluation_problems=4, evaluation_samples=2,
    checkpoint_every=2, micro_batch_size=3,
)  # fmt: skip


def small_model(seed=0):
    torch.manual_seed(seed)
    config = r1_zero.base_config(TOKENIZER.vocab_size)
    return MiniDS(config.replace(hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2))


def evens(problems, responses):
    """A reward that every model can be taught: the share of even tokens."""
    shares = (sum(token % 2 == 0 for token in response.tokens) / len(response.tokens) for response in responses)
    return [Score({"accuracy": share}, share) for share in shares]


def accept_most(problems, responses):
    """Something for models to be accepted by that have learned nothing: three answers in four, by their tokens."""
    rights = [float(sum(response.tokens) % 4 > 0) for response in responses]
    return [Score(GOOD | {"accuracy": right, "format": right}, right) for right in rights]
