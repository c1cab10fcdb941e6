"""When do the clip, GSPO, DAPO's wider clip and V3.2's stabilisers act? One batch of answers, many updates, four seeds.

    python -m benchmarks.off_policy                     all that the results lack: about 25 minutes of one core
    python -m benchmarks.off_policy --only "one batch" --seeds 0 1      some of it; the names are in PARTS and RUNS

With one update per batch of answers every importance ratio is 1, and these methods change nothing: that is the control.
R1-Zero cut a batch into 16 mini-batches with an update each, so 15 of 16 are off-policy. Here, on the trace task and
the bases of benchmarks/r1_zero.py, with 256 answers in 16 mini-batches of one group each:
- "one batch": every method starts from the base and makes 64 updates (four epochs) on the same answers, at lr 1e-3;
- the runs: ten steps, each with new answers. The learning rate is the recipe's 3e-4, or the 1e-3 of a name;
- "bfloat16 sampler": a bfloat16 copy of the base samples, and float32 computes, with and without the experts kept.
All end with 120 held-out problems, 4 answers to each. A seed decides the corpus, the base and everything after it. The
learning rate 1e-3 was chosen on another task, four epochs after a look at seeds 0 and 2. Ten steps cannot show which
method is best in the end, only what acts and what breaks. A run is written when it is complete; one that was
interrupted is run again (the seconds of a base count from its last interruption). Results go to
benchmarks/results/off_policy.json.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.r1_zero import Run, base
from minids.course.experiment import record
from minids.model.transformer import MiniDS
from minids.reasoning.off_policy import log_ratio, ratio_statistics
from minids.reasoning.r1_zero import BASE_RECIPE, rule_reward
from minids.reasoning.rollout import Sample, answer, pad, token_logps
from minids.reasoning.tasks import TraceTask
from minids.reasoning.trainer import Diverged, RLRecipe, RLTrainer
from minids.training.metrics import Metrics

TASK = TraceTask()
RESULTS = Path(__file__).parent / "results" / "off_policy.json"
SEEDS = (0, 1, 2, 3)
RECIPE = RLRecipe(steps=10, evaluation_problems=120)
SIXTEEN = dict(mini_batches=16)
FAST = dict(mini_batches=16, learning_rate=1e-3)
NO_CLIP = dict(clip_low=1e6, clip_high=1e6)

GSPO = dict(averaging="sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4)

RUNS: dict[str, dict[str, Any]] = {
    "one update": {},
    "16 mini-batches, clip": SIXTEEN,
    "16 mini-batches, no clip": SIXTEEN | NO_CLIP,
    "lr 1e-3, 16 mini-batches, clip": FAST,
    "lr 1e-3, 16 mini-batches, no clip": FAST | NO_CLIP,
    "one update, top-p 0.9, kept": dict(top_p=0.9),
    "one update, top-p 0.9, not kept": dict(top_p=0.9),
    "16 mini-batches, GSPO": SIXTEEN | GSPO,
}
"""Ten steps: changes of `RECIPE`."""

METHODS: dict[str, dict[str, Any]] = {
    "clip": {},
    "no clip": NO_CLIP,
    "lr 3e-4, clip": dict(learning_rate=3e-4),
    "lr 3e-4, no clip": dict(learning_rate=3e-4) | NO_CLIP,
    "DAPO's clip, up to 1.28": dict(clip_high=0.28),
    "GSPO": GSPO,
    "R1 eq. 1, clip 10": dict(averaging="sequence", ratio="product", clip_low=10.0, clip_high=10.0),
    "no clip, mask 0.1": NO_CLIP | dict(off_policy_threshold=0.1),
    "clip, mask 0.1": dict(off_policy_threshold=0.1),
    "clip, kept routing": dict(keep_routing=True),
    "clip, k3 0.1": dict(kl_weight=0.1),
    "clip, unbiased KL 0.1": dict(kl_weight=0.1, unbiased_kl=True),
    "no clip, k3 0.1": NO_CLIP | dict(kl_weight=0.1),
    "no clip, unbiased KL 0.1": NO_CLIP | dict(kl_weight=0.1, unbiased_kl=True),
}
"""One batch, 64 updates: changes of `RECIPE` with 16 mini-batches, 4 epochs, lr 1e-3 and no warm-up."""

CURVES = (
    "reward/accuracy", "reward/format", "length", "unfinished", "entropy", "zero_advantage_groups", "gradient_norm",
    "clipped", "outside_clip", "kl_old_new", "largest_ratio", "masked", "kl", "logp_gap",
)  # fmt: skip


class NotKept(RLTrainer):
    """Trains on the probabilities among all tokens, whatever set the sampler drew from; the check is off."""

    def update(self, groups, check):
        return super().update([[replace(sample, allowed=None) for sample in group] for group in groups], check=False)


def carry_out(name: str, seed: int) -> dict[str, Any]:
    """One run: its curves over the steps and its evaluation; "diverged" is the step that could not be taken."""
    model, base_seconds = base(Run(RLRecipe(seed=seed)))
    began = time.process_time()
    recipe = replace(RECIPE, seed=seed, **RUNS[name])
    make = NotKept if name.endswith("not kept") else RLTrainer
    trainer = make(model, TASK.tokenizer, TASK, rule_reward("trace"), recipe)
    curves: dict[str, list[float | None]] = {}
    diverged = None
    while trainer.step < recipe.steps:
        try:
            metrics = trainer.train_step()
        except Diverged:
            diverged = trainer.step + 1
            break
        for key in CURVES:
            curves.setdefault(key, []).append(metrics.get(key))
    return {
        "curves": {key: values for key, values in curves.items() if any(value is not None for value in values)},
        "diverged": diverged,
        "evaluation": trainer.evaluate(),
        "base_cpu_seconds": base_seconds,
        "cpu_seconds": time.process_time() - began,
    }


def one_batch(seed: int) -> dict[str, Any]:
    """Every method's 64 updates on one batch of answers, as 16 points of four updates each (see `points`).

    After them: the evaluation, and how the probabilities of the answers have moved since sampling (`compare`), by the
    routing of now and by that of sampling.
    """
    model, _ = base(Run(RLRecipe(seed=seed)))
    common = replace(RECIPE, seed=seed, warmup_steps=0, inner_epochs=4, **FAST)

    def trainer(**changes: Any) -> RLTrainer:
        recipe = replace(common, **changes)
        return RLTrainer(copy.deepcopy(model), TASK.tokenizer, TASK, rule_reward("trace"), recipe)

    groups, _ = trainer(keep_routing=True).collect()
    bare = [[replace(sample, experts=None) for sample in group] for group in groups]
    samples = [sample for group in groups for sample in group]
    found = {}
    for name, changes in METHODS.items():
        made, began = trainer(**changes), time.process_time()
        used = groups if made.recipe.keep_routing else bare
        updates = [made.update([group], check=False) for group in used * common.inner_epochs]
        found[name] = {
            "curves": points(updates),
            "own routing": compare(made.model, samples, keep=False),
            "kept routing": compare(made.model, samples, keep=True),
            "evaluation": made.evaluate(),
            "cpu_seconds": time.process_time() - began,
        }
        print(f"one batch, seed {seed}, {name}: {found[name]['evaluation']['held_out/pass@1']:.3f}", flush=True)
    return found


def points(updates: Sequence[Metrics], width: int = 4) -> dict[str, list[float | None]]:
    """Means of each metric over `width` updates, maxima of the largest ratio; None where all groups were flat."""
    found: dict[str, list[float | None]] = {}
    for key in (key for key in CURVES if any(key in update for update in updates)):
        windows = [[u[key] for u in updates[i : i + width] if key in u] for i in range(0, len(updates), width)]
        found[key] = [(max if key == "largest_ratio" else fmean)(window) if window else None for window in windows]
    return found


def kept_routing(seed: int) -> dict[str, Any]:
    """Sample with a bfloat16 copy of the base, then compute in float32 with its experts and with the router's own.

    "flipped" is the share of (token, layer) pairs whose set of experts differs.
    """
    model, _ = base(Run(RLRecipe(seed=seed)))
    sampler = copy.deepcopy(model).bfloat16().eval()
    problems = TASK.draw(random.Random(f"kept {seed}"), RECIPE.prompts)
    groups = answer(
        sampler, TASK.tokenizer, problems, rule_reward("trace"), RECIPE.group_size, keep_routing=True,
        max_new_tokens=RECIPE.max_new_tokens, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    samples = [sample for group in groups for sample in group]
    return {"own routing": compare(model, samples, keep=False), "kept routing": compare(model, samples, keep=True)}


@torch.no_grad()
def compare(model: MiniDS, samples: list[Sample], keep: bool) -> dict[str, float]:
    """Log-probabilities of sampling against those of the model now: gaps per token, and the ratio's statistics."""
    batch = pad(samples)
    assert batch.experts is not None
    logp, _, routings = token_logps(model.eval(), batch.tokens, experts=batch.experts if keep else None)
    read = batch.mask.int().flip(1).cumsum(1).flip(1) > 0
    chosen = torch.stack([routing.experts for routing in routings]).sort(-1).values
    flipped = (chosen != batch.experts.sort(-1).values).any(-1)[:, read]
    gaps = log_ratio(logp, batch.old_logp).masked_fill(~batch.mask, 0.0)
    statistics = ratio_statistics(gaps, batch.mask, ratio="token", clip_low=0.2, clip_high=0.2)
    tokens = int(batch.mask.sum())
    return {
        "flipped": flipped.float().mean().item(),
        "mean_gap": gaps.abs().sum().item() / tokens,
        "largest_gap": gaps.abs().max().item(),
        "answers_beyond_1e-4": (gaps.abs().amax(1) > 1e-4).float().mean().item(),
        "outside_clip": statistics["outside_clip"].item() / tokens,
        "kl_old_new": statistics["kl_old_new"].item() / tokens,
    }


def base_evaluation(seed: int) -> dict[str, float]:
    """The base model, by the evaluation of the runs."""
    model, _ = base(Run(RLRecipe(seed=seed)))
    return RLTrainer(model, TASK.tokenizer, TASK, rule_reward("trace"), RECIPE).evaluate()


PARTS = {"base": base_evaluation, "one batch": one_batch, "bfloat16 sampler": kept_routing}


def store(path: Path, name: str, seed: int, found: Mapping[str, Any]) -> None:
    """Add what was found to the results, in the order of the parts, the runs and the seeds."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    parts, runs = stored.get("parts", {}), stored.get("runs", {})
    (parts if name in PARTS else runs).setdefault(name, {})[str(seed)] = found
    record(
        path, command="python -m benchmarks.off_policy", base_recipe=asdict(BASE_RECIPE), recipe=asdict(RECIPE),
        changes={"one batch": METHODS} | {name: RUNS[name] for name in RUNS if name in runs},
        parts={part: dict(sorted(parts[part].items())) for part in PARTS if part in parts},
        runs={name: dict(sorted(runs[name].items())) for name in RUNS if name in runs},
    )  # fmt: skip


def done(path: Path, name: str, seed: int) -> bool:
    """Whether the results hold this run."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    return str(seed) in stored.get("parts" if name in PARTS else "runs", {}).get(name, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *RUNS], default=[*RUNS, *PARTS], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--again", action="store_true", help="run again what the results hold")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        for seed in options.seeds:
            if options.again or not done(options.results, name, seed):
                found = PARTS[name](seed) if name in PARTS else carry_out(name, seed)
                store(options.results, name, seed, found)
                print(f"{name}, seed {seed}", found.get("evaluation", found).get("held_out/pass@1", ""), flush=True)


if __name__ == "__main__":
    main()
