"""Does training on a learned reward raise the true score, and what does it change to start with it late? Chapter 10.

    python -m benchmarks.reward_model --seeds 0 1 2

Takes under a minute of one core for each seed, once benchmarks/distillation.py has made the models (else two more).
The reward is `reward_model.fit` on 1,200 pairs of answers of the pre-trained student, 300 more pairs test it; one
annotator in five looks at the length only. RL starts from the cold start and makes 34 updates of 64 answers. Three runs
per seed: rewards by rule; the learned reward; by rule for the first 26 updates and the learned reward in the last 8
(R1: the last 400 of 1,700 steps). Rules judge all of them.
Seeds that the results hold already are not run again. Results: benchmarks/results/reward_model.json.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.distillation import REWARD, TASK, judge, student, worked
from minids.course.experiment import record
from minids.reasoning.r1 import MAX_NEW_TOKENS
from minids.reasoning.reward_model import LearnedReward, Pair, agreement, fit, preference
from minids.reasoning.rollout import answer
from minids.reasoning.trainer import RLRecipe, RLTrainer

RESULTS = Path(__file__).parent / "results" / "reward_model.json"
UPDATES, LATE, EVERY = 34, 26, 8
PAIRS, TESTED, CARELESS = 1200, 300, 0.2


def pairs(seed: int) -> list[Pair]:
    """Pairs of answers of the student to training problems, the preferred one first."""
    problems, generator = TASK.draw(random.Random(f"pairs {seed}"), PAIRS + TESTED), torch.Generator().manual_seed(seed)
    groups = answer(
        student(seed).eval(), TASK.tokenizer, problems, REWARD, 2, max_new_tokens=MAX_NEW_TOKENS, generator=generator
    )
    rng = random.Random(f"annotators {seed}")
    return [preference(*group, rng, CARELESS) for group in groups]


def train(seed: int, learned: LearnedReward, late: int) -> list[dict[str, Any]]:
    """RL by rule until update `late`, then by the learned reward; both scores on the way."""
    recipe = RLRecipe(steps=UPDATES, prompts=8, group_size=8, seed=seed, evaluation_problems=2)
    learner, curve = RLTrainer(worked("cold_start", seed), TASK.tokenizer, TASK, REWARD, recipe), []
    for update in range(UPDATES + 1):
        if update % EVERY == 0 or update in (late, UPDATES):
            curve.append({"updates": update} | judge(learner.model))
        if update == UPDATES:
            return curve
        learner.reward = learned if update >= late else REWARD
        learner.train_step()
        samples = [sample for group in learner.groups for sample in group]
        scores = learned([s.problem for s in samples], [s.response for s in samples])
        for name, values in (("batch_learned", [s.total for s in scores]),
                             ("batch_accuracy", [s.parts["accuracy"] for s in scores]),
                             ("batch_length", [len(s.response.tokens) for s in samples])):  # fmt: skip
            curve[-1].setdefault(name, []).append(sum(values) / len(values))
    raise AssertionError


def measure(seed: int) -> dict[str, Any]:
    """One seed: the learned reward, its agreement with the annotators, and three runs of RL."""
    found = pairs(seed)
    rewards = fit(found[:PAIRS], TASK.tokenizer.vocab_size)
    learned, tested = LearnedReward(rewards, REWARD), found[PAIRS:]
    unequal = [pair for pair in tested if pair[0].score.parts["accuracy"] != pair[1].score.parts["accuracy"]]
    correct_first = [sorted(pair, key=lambda s: -s.score.parts["accuracy"]) for pair in unequal]
    names = [TASK.tokenizer.decode([i], skip_special=False) for i in range(len(rewards))]
    result = {
        "seed": seed,
        "agreement": agreement(rewards, tested),
        "agreement_with_correctness": agreement(rewards, [(a, b) for a, b in correct_first]),
        "unequal_pairs": len(unequal),
        "rewards": dict(zip(names, rewards.tolist(), strict=True)),
        "runs": {name: train(seed, learned, late) for name, late in
                 (("rules", UPDATES), ("learned", 0), ("learned, late", LATE))},
    }  # fmt: skip
    for name, curve in result["runs"].items():
        print(f"seed {seed}, {name}:", *(f"{p['pass@1']:.2f}/{p['length']:.0f}" for p in curve), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = {"updates": UPDATES, "late": LATE, "pairs": PAIRS, "tested": TESTED, "careless": CARELESS}
    seeds = json.loads(RESULTS.read_text())["seeds"] if RESULTS.exists() else []
    for seed in set(arguments.seeds) - {of_seed["seed"] for of_seed in seeds}:
        seeds = sorted([*seeds, measure(seed)], key=lambda of_seed: of_seed["seed"])
        record(RESULTS, config=config, seeds=seeds)


if __name__ == "__main__":
    main()
