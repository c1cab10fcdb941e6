"""Pre-training: the recipe, the training step, and the evaluation on held-out text.

Notable choices: a step is a function of (model, optimizer state, data position); gradient, losses and tokens per expert
are those of the whole global batch, for any division into micro-batches.
"""

import functools
import math
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from minids.config import ModelConfig, check_fields, require
from minids.data.batches import Batch, BatchStream, TokenizedCorpus, evaluation_batches
from minids.data.tokenizer import Tokenizer
from minids.fp8.linear import convert_to_fp8
from minids.model.engram import merged_tokens
from minids.model.kv_cache import IndexerTraining, IndexStage
from minids.model.moe import max_violation
from minids.model.sparse_attention import set_trained_parameters
from minids.model.transformer import MiniDS
from minids.training.compile import check_compiled, compile_layers
from minids.training.loop import Diverged, Loop
from minids.training.loss import LossDenominators, Losses, bits_per_byte, losses
from minids.training.lr_schedule import LRSchedule
from minids.training.metrics import Metrics
from minids.training.optimizer import make_optimizers
from minids.training.qk_clip import QKClip


@dataclass(frozen=True)
class Recipe:
    """Settings of a pre-training run.

    The defaults train the preset `tiny` for two minutes on two CPU cores; larger models need smaller learning rates.
    Weights of the losses, decay and clipping are V3's (FACTS.md section 7.1).
    """

    steps: int = 800
    """Optimizer steps of the run; the learning-rate schedule is a function of step / steps."""
    batch_size: int = 4
    """Sequences per optimizer step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; lower it if memory runs out. None takes the whole batch at once."""
    seq_len: int = 256
    """Tokens per training sequence, at most the context length of the model."""
    learning_rate: float = 6e-3
    """Peak learning rate; lower it for larger models, or if training diverges."""
    warmup_steps: int = 30
    """Steps of linear warm-up to the peak learning rate."""
    optimizer: Literal["adamw", "muon", "muon_v4"] = "adamw"
    """adamw for all parameters, or muon for the two-dimensional matrices of the layers and adamw for the others;
    muon_v4 is V4's Muon, with ten Newton-Schulz steps, and takes the experts too."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's first and second moments (V3 uses bf16)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, multiplied by the learning rate; norm weights have none."""
    clip_norm: float = 1.0
    """Maximum of the global gradient norm; larger gradients are scaled down to it."""
    qk_clip: float | None = None
    """Threshold of QK-Clip: heads with a larger attention logit get smaller query and key matrices; None for none."""
    mtp_weight: float = 0.3
    """Weight of the multi-token prediction loss, divided by 3 when the learning rate decays; 0 skips MTP modules."""
    balance_speed: float = 0.001
    """Change of a router bias per step toward balanced load; 0 freezes the biases, as in the last part of the run."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Precision of the matrix products: fp32, bf16 (autocast) or fp8 (emulated on CPUs); weights stay in fp32."""
    index_stage: IndexStage = "sparse"
    """Stage of a model with index_topk: dense_warmup trains its indexers alone, on dense attention; sparse all."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""
    evaluate_every: int = 100
    """Steps between evaluations on held-out text."""
    evaluation_batches: int = 16
    """Micro-batches of held-out text per evaluation; more give a less noisy value."""
    checkpoint_every: int = 100
    """Steps between checkpoints, of which the newest two are kept."""

    def __post_init__(self):
        check_fields(self, may_be_zero=("warmup_steps", "seed", "weight_decay", "mtp_weight", "balance_speed"))


@dataclass(frozen=True)
class TextData:
    """Tokenized text of a run: training and validation split, and the tokenizer."""

    train: TokenizedCorpus
    validation: TokenizedCorpus
    tokenizer: Tokenizer


def training_batches(data: TextData, recipe: Recipe) -> BatchStream:
    """Create the stream of a run's global batches, at its first batch. Raises `ValueError` if the text is too short."""
    return BatchStream(data.train, batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=recipe.seed)


def validation_batches(data: TextData, recipe: Recipe) -> Iterator[Batch]:
    """Create the batches of validation text on which a run is evaluated. Raises `ValueError` if it is too short."""
    rows = recipe.micro_batch_size or recipe.batch_size
    return evaluation_batches(
        data.validation, batch_size=rows, seq_len=recipe.seq_len, max_batches=recipe.evaluation_batches
    )


def check(config: ModelConfig, data: TextData, recipe: Recipe) -> None:
    """Raise `ValueError` if model, text and recipe do not match."""
    if recipe.seq_len > config.max_position_embeddings:
        raise ValueError(f"seq_len={recipe.seq_len}: the context holds {config.max_position_embeddings}")
    if data.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} tokens")
    if recipe.index_stage == "dense_warmup":
        rule = "needs a model with indexers, so an index_topk"
        require(config.index_topk is not None, "index_stage", recipe.index_stage, rule)
        require(recipe.qk_clip is None, "qk_clip", recipe.qk_clip, "must be None where all but the indexers is frozen")
    training_batches(data, recipe)  # raises an error for text that is too short
    validation_batches(data, recipe)


class Trainer(Loop):
    """Pre-training loop; its checkpoints also hold the position in the training data.

    With `compiled`, the layers are compiled for training (compile.py).
    """

    def __init__(self, model: MiniDS, data: TextData, recipe: Recipe, compiled: bool = False):
        check(model.config, data, recipe)
        if recipe.precision == "fp8":
            convert_to_fp8(model)
        if model.engram is not None:
            words = [data.tokenizer.decode([i], skip_special=False) for i in range(data.tokenizer.vocab_size)]
            model.engram.merge(merged_tokens(words))
        if model.config.index_topk is not None:
            set_trained_parameters(model, recipe.index_stage)
        optimizers = make_optimizers(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.moments)
        self.qk_clip = QKClip(model, recipe.qk_clip) if recipe.qk_clip is not None else None
        super().__init__(model, recipe, optimizers)
        self.compiled, self.compared = compiled, not compiled
        if compiled:
            compile_layers(model, recipe.precision)
        self.data, self.schedule = data, LRSchedule(recipe.steps, recipe.warmup_steps)
        self.stream = training_batches(data, recipe)

    def evaluation_metrics(self, directory: Path | None) -> Metrics:
        """Evaluate on validation text."""
        return {"validation_bits_per_byte": self.evaluate()}

    def progress_message(self, metrics: Metrics) -> str:
        """Loss and throughput, for the progress bar."""
        return f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s"

    def train_step(self) -> Metrics:
        """Take one optimizer step on the next global batch. Raises `Diverged`, without changing the weights."""
        recipe, began = self.recipe, time.perf_counter()
        mtp_weight = recipe.mtp_weight / (3 if self.schedule.is_falling(self.step) else 1)
        learning_rate = recipe.learning_rate * self.schedule.learning_rate_factor(self.step)
        frozen = recipe.index_stage == "dense_warmup" or self.schedule.has_fallen(self.step)
        balance_speed = 0.0 if frozen else recipe.balance_speed

        self.model.train()
        batch = next(self.stream)
        if not self.compared:
            check_compiled(self.model, lambda: self.backward(batch, mtp_weight)[0].main.item())
            self.compared = True
        sums, tokens_per_expert = self.backward(batch, mtp_weight)
        norm = self.clip_gradients()
        main = sums.main.item()
        if not math.isfinite(norm) or not main < 3 * math.log(self.model.config.vocab_size):
            raise Diverged(
                f"training diverged in step {self.step + 1} (loss {main:.4g}, gradient norm {norm:.4g}): "
                f"learning_rate={recipe.learning_rate!r} may be too high"
            )

        self.optimizer_step(learning_rate)
        largest_logit = self.qk_clip.step() if self.qk_clip is not None else None
        self.step += 1
        metrics = {
            "step": self.step,
            "loss": main,
            "mtp_loss": sums.mtp.item(),
            "balance_loss": sums.balance.item(),
            "learning_rate": learning_rate,
            "gradient_norm": norm,
        }
        if self.model.config.index_topk is not None:
            metrics["indexer_loss"] = sums.indexer.item()
        if largest_logit is not None:
            metrics["max_attention_logit"] = largest_logit
        if tokens_per_expert is not None:
            self.model.update_balance_bias(tokens_per_expert, balance_speed)
            metrics["max_violation"] = max_violation(tokens_per_expert).mean().item()
        tokens = recipe.batch_size * recipe.seq_len
        seconds = time.perf_counter() - began
        return metrics | {"tokens": self.step * tokens, "tokens_per_second": tokens / seconds}

    def backward(
        self, batch: Batch, mtp_weight: float, denominators: LossDenominators | None = None
    ) -> tuple[Losses, torch.Tensor | None]:
        """Accumulate gradients over the micro-batches of a batch; return its losses and tokens per expert.

        `batch` is a global batch, or a part of one if its `denominators` are given.
        """
        denominators = denominators or LossDenominators.of(batch)
        device = self.model.head.weight.device
        parts, counts = [], []
        for micro in batch.to(device).micro_batches(self.recipe.micro_batch_size or len(batch.tokens)):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                indexer = IndexerTraining(self.recipe.index_stage)
                out = self.model.states(micro.tokens[:, :-1], mtp=bool(mtp_weight), indexer=indexer)
                part = losses(self.model, out, micro, denominators)
            part.total(mtp_weight).backward()
            parts.append(part.detach())
            if out.routings:
                counts.append(out.tokens_per_expert)
        return functools.reduce(operator.add, parts), torch.stack(counts).sum(0) if counts else None

    def evaluate(self) -> float:
        """Compute the bits per byte of a fixed sample of the validation text."""
        self.model.eval()
        batches, token_bytes = validation_batches(self.data, self.recipe), self.data.tokenizer.token_bytes()
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            return bits_per_byte(self.model, batches, token_bytes)

    def state(self) -> dict[str, Any]:
        return super().state() | {"data": self.stream.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.stream.load_state_dict(state["data"])


def train(
    model: MiniDS,
    data: TextData,
    recipe: Recipe,
    *,
    directory: Path | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    on_step: Callable[[Metrics], None] | None = None,
) -> list[Metrics]:
    """Train `model` in place and return the metrics; the keyword arguments are those of `Loop.run`."""
    trainer = Trainer(model, data, recipe)
    return trainer.run(directory=directory, progress=progress, tensorboard=tensorboard, on_step=on_step)
