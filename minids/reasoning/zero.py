"""R1-Zero in miniature, from nothing: a base model from a small web, then reinforcement learning from rules alone."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import tyro

from minids.config import ModelConfig
from minids.data.batches import TokenizedCorpus
from minids.files import write_text_whole
from minids.model.transformer import MiniDS
from minids.reasoning.grpo import VARIANTS, Variant
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, Reward, RuleReward
from minids.reasoning.rl import RLRecipe, RLTrainer
from minids.reasoning.sandbox import Sandbox
from minids.reasoning.tasks import TASKS, Task, TaskName, Web
from minids.training.checkpoint import latest_checkpoint, load_checkpoint
from minids.training.loop import Recipe, TextData, Trainer

BASE_RECIPE = Recipe(
    steps=1500, batch_size=16, seq_len=128, learning_rate=3e-3, warmup_steps=50, weight_decay=0.01, mtp_weight=0.0,
    evaluate_every=500, checkpoint_every=500,
)  # fmt: skip


def base_config(vocab_size: int) -> ModelConfig:
    """A MiniDS of 215 thousand parameters with everything that V3's trunk has: MLA, a dense layer, two of experts."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_nextn_predict_layers=0,
        max_position_embeddings=256, initializer_range=None, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=1, moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0, aux_loss_alpha=0.0,
    )  # fmt: skip


def web_text(task: Task, seed: int = 0, web: Web = Web(), rows: int = 6000) -> TextData:  # noqa: B008 - frozen
    """The pre-training documents of a task, in rows of `BASE_RECIPE.seq_len` tokens.

    Every row begins with a document, as what the model is asked later will.
    """
    training = _rows(task, random.Random(f"web {seed}"), rows, web)
    validation = _rows(task, random.Random(f"validation {seed}"), min(rows, 256), web)
    return TextData(training, validation, task.tokenizer)


def _rows(task: Task, rng: random.Random, rows: int, web: Web) -> TokenizedCorpus:
    tokenizer, seq_len = task.tokenizer, BASE_RECIPE.seq_len
    tokens = np.zeros((rows + 1, seq_len), tokenizer.dtype)  # the last row only lends its first token as a target
    for row in tokens:
        documents: list[int] = []
        while len(documents) < seq_len:
            text = tokenizer.encode(task.document(rng, web), allow_special=True)
            documents += [tokenizer.bos_id, *text, tokenizer.eos_id]
        row[:] = documents[:seq_len]
    starts = np.arange(0, tokens.size, seq_len)
    return TokenizedCorpus(tokens.reshape(-1), starts, np.zeros_like(starts), (task.name,))


def base_trainer(task: Task, recipe: Recipe = BASE_RECIPE, web: Web = Web()) -> Trainer:  # noqa: B008 - frozen
    """A fresh base model and the web of its task: `run()` it, then take its `model`."""
    torch.manual_seed(recipe.seed)
    model = MiniDS(base_config(task.tokenizer.vocab_size))
    return Trainer(model, web_text(task, recipe.seed, web), recipe)


def load_base(directory: Path, task: Task) -> MiniDS:
    """The model of a run's newest checkpoint. Raises `ValueError` where it cannot be one for this task."""
    newest = latest_checkpoint(directory / "checkpoints")
    if newest is None:
        raise ValueError(f"{directory} holds no checkpoint")
    tensors, state = load_checkpoint(newest)
    config = ModelConfig.from_dict(state["config"])
    if config.vocab_size != task.tokenizer.vocab_size:
        raise ValueError(f"{directory} has vocab_size={config.vocab_size}: the task has {task.tokenizer.vocab_size}")
    model = MiniDS(config)
    model.load_state_dict(tensors["model"])
    return model


@contextlib.contextmanager
def rule_reward(task: TaskName, weights: dict[str, float] | None = None, weaker: bool = False) -> Iterator[Reward]:
    """The reward of a task: by comparison for "trace", by unit tests in a sandbox for "program".

    `weaker` accepts the sandbox's weaker walls where the strong ones cannot be had.
    """
    weights = dict(R1_ZERO_WEIGHTS) if weights is None else weights
    if task == "trace":
        yield RuleReward(weights)
    else:
        with Sandbox(workers=2, weaker=weaker) as sandbox:
            yield RuleReward(weights, sandbox.run_many)


def rl_command(
    task: TaskName = "trace",
    variant: Variant | None = None,
    recipe: tyro.conf.OmitArgPrefixes[RLRecipe] = RLRecipe(),  # noqa: B008 - frozen
    format_weight: float = R1_ZERO_WEIGHTS["format"],
    language_weight: float = 0.0,
    base: Path | None = None,
    base_steps: int = BASE_RECIPE.steps,
    name: str | None = None,
    resume: Path | None = None,
    weaker_sandbox: bool = False,
    threads: int | None = None,
) -> None:
    """Teach a base model by rewards alone, as R1-Zero was, and keep the run under runs/.

    Args:
        task: What to learn: trace (arithmetic, judged by the answer) or program (Python, judged by unit tests).
        variant: Set averaging, ratio, std and clips as published: grpo, dr_grpo, dapo or gspo.
        format_weight: Worth of the right form; a right answer is worth 1.
        language_weight: Worth of a thought in English only.
        base: Folder of a run to start from; by default a base is trained first.
        base_steps: Steps of that training.
        name: Folder under runs/; by default rl-TASK.
        resume: Folder of a run to go on with; all but weaker_sandbox and threads is then read from there.
        weaker_sandbox: Run programs also where the sandbox's strong walls cannot be had.
        threads: CPU threads; by default torch's choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    directory = resume or Path("runs") / (name or f"rl-{task}")
    if resume is None:
        if directory.exists():
            raise ValueError(f"{directory} exists: choose another --name, or go on with --resume {directory}")
        if variant is not None:
            recipe = dataclasses.replace(recipe, **VARIANTS[variant])
        weights = {"accuracy": 1.0, "format": format_weight, "language": language_weight}
        plan = dict(task=task, weights=weights, base=base and str(base), base_steps=base_steps)
        plan["recipe"] = dataclasses.asdict(recipe)
        directory.mkdir(parents=True)
        write_text_whole(directory / "rl.json", json.dumps(plan, indent=1))
    _carry_out(directory, weaker_sandbox)


def _carry_out(directory: Path, weaker_sandbox: bool) -> None:
    """Begin the run that rl.json describes, or go on with it."""
    try:
        plan = json.loads((directory / "rl.json").read_text())
        task, recipe = TASKS[plan["task"]](), RLRecipe(**plan["recipe"])
        base_recipe = dataclasses.replace(BASE_RECIPE, steps=plan["base_steps"], seed=recipe.seed)
    except FileNotFoundError:
        raise ValueError(f"{directory} is no run of rl: it has no rl.json") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{directory / 'rl.json'} is damaged: not the description of a run") from None
    with rule_reward(plan["task"], plan["weights"], weaker_sandbox) as reward:
        if plan["base"] is not None:
            model = load_base(Path(plan["base"]), task)
        else:
            print(f"{directory}/base: a base model reads the web", flush=True)
            trainer = base_trainer(task, base_recipe)
            trainer.run(directory=directory / "base", resume=_has_begun(directory / "base"))
            if trainer.step < base_recipe.steps:
                print(f"Stopped. Go on with:\n    python -m minids rl --resume {directory}")
                return
            model = trainer.model
        task.tokenizer.save(directory)
        trainer = RLTrainer(model, task.tokenizer, task, reward, recipe)
        print(f"{directory}: {model.num_parameters():,} parameters learn from rewards", flush=True)
        trainer.run(directory=directory, resume=_has_begun(directory))
    if trainer.step < recipe.steps:
        print(f"\nStopped after step {trainer.step}. Go on with:\n    python -m minids rl --resume {directory}")
        return
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    before, *_, after = (metrics for metrics in map(json.loads, lines) if "held_out/pass@1" in metrics)
    for name in (name for name in after if name.startswith("held_out/pass") and not name.endswith("interval")):
        (old, old_half), (new, new_half) = ((m[name], m[f"{name}_interval"]) for m in (before, after))
        print(f"{name}: {old:.3f} ± {old_half:.3f} before, {new:.3f} ± {new_half:.3f} after")
    print(f"Kept in {directory}/: checkpoints, metrics.jsonl, samples/")


def _has_begun(directory: Path) -> bool:
    return latest_checkpoint(directory / "checkpoints") is not None
