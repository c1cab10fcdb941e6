"""The training loop, flat: what `minids train` does in one process, top to bottom, with the package's parts.

    python examples/training_loop.py        trains the smallest preset for 20 steps, some seconds

`minids.training.pretrain.Trainer` takes the same steps (tests/training/test_flat_loop.py compares them); it adds
checkpoints, resuming after a kill, evaluation on the way, FP8, and many processes.
"""

import math
from collections.abc import Iterator

import torch

from minids import MiniDS, ModelConfig
from minids.data.batches import BatchStream
from minids.model.moe import max_violation
from minids.training.loss import LossDenominators, losses
from minids.training.lr_schedule import LRSchedule
from minids.training.optimizer import make_optimizers
from minids.training.pretrain import Recipe, TextData
from minids.training.pretraining_run import PretrainingRun, read_text


def training_loop(model: MiniDS, data: TextData, recipe: Recipe) -> Iterator[dict[str, float]]:
    """Train `model` in place; after each step, yield what was measured."""
    batches = BatchStream(data.train, batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=recipe.seed)
    optimizers = make_optimizers(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.moments)
    schedule = LRSchedule(recipe.steps, recipe.warmup_steps)
    model.train()

    for step in range(recipe.steps):
        # 1. Gradients of the global batch, summed over its micro-batches. Every part is divided by the denominators of
        #    the whole batch, so it does not matter how the batch is cut.
        batch = next(batches)
        denominators = LossDenominators.of(batch)
        mtp_weight = recipe.mtp_weight / (3 if schedule.is_falling(step) else 1)
        loss, tokens_per_expert = 0.0, 0
        for micro in batch.micro_batches(recipe.micro_batch_size or recipe.batch_size):
            out = model.states(micro.tokens[:, :-1], mtp=mtp_weight > 0)  # the losses apply the output head
            parts = losses(model, out, micro, denominators)  # next token, the tokens after it, load balance
            parts.total(mtp_weight).backward()
            loss = loss + parts.main.detach()
            tokens_per_expert = tokens_per_expert + out.tokens_per_expert

        # 2. Clip the global norm, then let the optimizers step at this step's learning rate.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm).item()
        if not math.isfinite(norm):
            raise ArithmeticError(f"training diverged in step {step + 1}")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule.learning_rate_factor(step)
            optimizer.step()
            optimizer.zero_grad()

        # 3. Once per step, move the routers' biases toward an even load (V3 section 2.1.2).
        model.update_balance_bias(tokens_per_expert, 0.0 if schedule.has_fallen(step) else recipe.balance_speed)
        violation = max_violation(tokens_per_expert).mean().item()
        yield {"step": step + 1, "loss": loss.item(), "gradient_norm": norm, "max_violation": violation}


def main() -> None:
    recipe = Recipe(steps=20, batch_size=8, seq_len=64, warmup_steps=5)
    config = ModelConfig.preset("nano")
    data = read_text(PretrainingRun(config, recipe, ("pydocs", "stdlib"), max_bytes=200_000), "bytes")
    torch.manual_seed(recipe.seed)
    model = MiniDS(config.replace(vocab_size=data.tokenizer.vocab_size))
    for measured in training_loop(model, data, recipe):
        print(", ".join(f"{name} {value:.4g}" for name, value in measured.items()))


if __name__ == "__main__":
    main()
