"""On-policy distillation: the student samples answers, and the teacher's distribution is the target at every token.

Notable choices: the loss is the exact reverse KL over the vocabulary, not an estimate from the sampled token; the
sampled prefixes are constants of the loss, so no gradient goes through the sampling; the loop is the one of
reinforcement learning, whose reward is only measured here, with the learning-rate schedule of SFT (V4, FACTS.md
section 10.4).
"""

import math

from jaxtyping import Float
from torch import Tensor, no_grad

from minids.data.tokenizer import Tokenizer
from minids.model.layers import at_least_float32
from minids.model.transformer import MiniDS
from minids.reasoning.distill import check_teacher
from minids.reasoning.rewards import Reward
from minids.reasoning.rollout import PaddedSamples, Sample, pad
from minids.reasoning.tasks import Task
from minids.reasoning.trainer import ProblemSet, RLRecipe, RLTrainer
from minids.training.loop import Diverged
from minids.training.lr_schedule import LRSchedule
from minids.training.metrics import Metrics


def reverse_kl(
    logits: Float[Tensor, "*shape vocab"], teacher_logits: Float[Tensor, "*shape vocab"]
) -> Float[Tensor, "*shape"]:
    """Return KL(student || teacher) of each position, in nats: sum over the vocabulary of q (log q - log p).

    q is the student's distribution, p the teacher's, which gets no gradient.
    """
    student = at_least_float32(logits).log_softmax(-1)
    teacher = at_least_float32(teacher_logits.detach()).log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def on_policy_loss(model: MiniDS, teacher: MiniDS, batch: PaddedSamples) -> Float[Tensor, ""]:
    """Return the sum of the reverse KL over the tokens that `model` sampled; `batch.mask` marks them."""
    with no_grad():
        teacher_logits = teacher(batch.tokens[:, :-1]).logits[batch.mask]
    return reverse_kl(model(batch.tokens[:, :-1]).logits[batch.mask], teacher_logits).sum()


class OnPolicyTrainer(RLTrainer):
    """Trainer by on-policy distillation; of the recipe, the settings of GRPO's loss have no effect."""

    def __init__(
        self,
        model: MiniDS,
        teacher: MiniDS,
        tokenizer: Tokenizer,
        problems: Task | ProblemSet,
        reward: Reward,
        recipe: RLRecipe,
    ):
        check_teacher(model, teacher)
        super().__init__(model, tokenizer, problems, reward, recipe)
        self.teacher = teacher.requires_grad_(False).eval()
        self.schedule = LRSchedule(recipe.steps, recipe.warmup_steps)

    def update(self, groups: list[list[Sample]], check: bool) -> Metrics:
        """Take one optimizer step on the answers; return the gradient norm and the mean reverse KL per token."""
        recipe, model = self.recipe, self.model
        batch = pad([sample for group in groups for sample in group], model.head.weight.device)
        tokens, total = int(batch.mask.sum()), 0.0
        model.train()
        for rows in batch.mask.sum(1).argsort(stable=True).split(recipe.micro_batch_size):
            loss = on_policy_loss(model, self.teacher, batch.rows(rows)) / tokens
            loss.backward()
            total += loss.item()
        norm = self.clip_gradients()
        if not math.isfinite(norm):
            raise Diverged(f"the gradient of step {self.step + 1} is {norm}: learning_rate may be too high")
        self.optimizer_step(recipe.learning_rate * self.schedule.learning_rate_factor(self.step))
        return {"gradient_norm": norm, "reverse_kl": total}
