"""Four ways to balance experts, side by side: the experiments behind chapters/03_moe.ipynb.

    python benchmarks/balance.py                     everything: about fifteen minutes of one core
    python benchmarks/balance.py --only "sign bias"  one way, in place of what the results hold of it

One small model (a dense layer, then a layer of 8 experts, 2 per token) is trained on the built-in text with each way
and several seeds; a seed decides the first weights and the order of the text, the same for all ways. Then each way's
strength is varied. Controls: the same model without a node limit, a dense one that uses as many weights per token, one
with a ninth routed expert (and a third choice) in place of the shared one, and, without balancing, models whose router
or whose routed experts keep their first weights.
Results go to benchmarks/results/balance.json, with commands, seeds and versions.

What is measured of each run, on the whole validation split: bits per byte; MaxVio of all its tokens ("global") and the
mean MaxVio of its sequences; and, over the last 50 training steps, the mean MaxVio of a batch.
"""

import argparse
import json
import platform
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.config import ModelConfig
from minids.course.experiment import builtin_text
from minids.data.batches import evaluation_batches
from minids.files import atomic_write_text
from minids.model.moe import max_violation
from minids.model.transformer import MiniDS
from minids.training.loss import bits_per_byte
from minids.training.pretrain import Recipe, Trainer

RESULTS = Path(__file__).parent / "results" / "balance.json"
CONFIG = ModelConfig.preset(
    "nano", num_hidden_layers=2, num_nextn_predict_layers=0, intermediate_size=96, aux_loss_alpha=0.0
)
RECIPE = Recipe(
    steps=300, batch_size=16, seq_len=64, learning_rate=4e-3, warmup_steps=20, balance_speed=0.0, evaluate_every=300
)
V2_FACTORS = {"expert_balance_alpha": 0.003, "device_balance_alpha": 0.05, "communication_balance_alpha": 0.02}
SEEDS = (0, 1, 2)
EVERY = 10  # steps between two records of loads and biases


def proportional(bias: Tensor, load: Tensor, speed: float) -> None:
    """In place of the sign: the error itself, in mean loads."""
    load = load.float()
    bias.data.add_(speed * (load.mean() - load) / load.mean())


@dataclass(frozen=True)
class Way:
    """One way to balance: what it changes in config and recipe, and the rule where it is not the package's."""

    config: dict = field(default_factory=dict)
    speed: float = 0.0
    rule: Callable[[Tensor, Tensor, float], None] | None = None
    frozen: str = ""
    """Parameters whose name contains this keep their first values."""


def auxiliary(times: float) -> Way:
    return Way({name: times * alpha for name, alpha in V2_FACTORS.items()})


def ways(sign_speed: float = 0.003, proportional_speed: float = 0.01) -> dict[str, Way]:
    compared = {
        "none": Way(),
        "auxiliary losses": auxiliary(1),
        "sign bias": Way(speed=sign_speed),
        "proportional bias": Way(speed=proportional_speed, rule=proportional),
        "sign bias, no node limit": Way({"n_group": 1, "topk_group": 1}, sign_speed),
        "sign bias, no shared expert": Way(
            {"n_routed_experts": 9, "num_experts_per_tok": 3, "n_shared_experts": 0, "n_group": 1, "topk_group": 1},
            sign_speed,
        ),
        "dense": Way({"first_k_dense_replace": CONFIG.num_hidden_layers}),
        "none, experts frozen": Way(frozen=".experts."),
        "none, router frozen": Way(frozen=".router."),
        "sequence loss 0.1": Way({"aux_loss_alpha": 0.1}),
    }
    slower_and_faster = {f"sign bias {speed:g}": Way(speed=speed) for speed in (0.0003, 0.001, 0.01, 0.1)}
    weaker_and_stronger = {f"auxiliary losses x {times:g}": auxiliary(times) for times in (0.1, 10)}
    return compared | slower_and_faster | weaker_and_stronger


def measure(way: Way, seed: int, recipe: Recipe = RECIPE) -> dict:
    """Train one model and say how it ended, and, of a mixture, how its loads and biases came there."""
    torch.manual_seed(seed)
    model = MiniDS(CONFIG.replace(**way.config))
    for name, parameter in model.named_parameters():
        if way.frozen and way.frozen in name:
            parameter.requires_grad_(False)
    trainer = Trainer(model, builtin_text(), replace(recipe, seed=seed, balance_speed=way.speed))
    update_as_packaged = model.update_balance_bias
    loads, biases = [], []

    def update_and_record(load: Tensor, speed: float) -> None:
        bias = model.routers()[0].bias
        if way.rule is None:
            update_as_packaged(load, speed)
        else:
            way.rule(bias, load[0], speed)
        loads.append(load[0])
        biases.append(bias.detach().clone())

    model.update_balance_bias = update_and_record
    violations = [metrics.get("max_violation") for metrics in trainer.run(progress=False)]
    run = {"seed": seed} | judge(trainer)
    if loads:
        run |= {
            "batch_max_violation": sum(violations[-50:]) / 50,
            "max_violation": torch.tensor(violations).unflatten(0, (-1, EVERY)).mean(-1).tolist(),
            "loads": torch.stack(loads).unflatten(0, (-1, EVERY)).sum(1).tolist(),
            "biases": torch.stack(biases)[EVERY - 1 :: EVERY].tolist(),
        }
    return run


@torch.no_grad()
def judge(trainer: Trainer) -> dict[str, float]:
    """The model on the whole validation split."""
    model, data, recipe = trainer.model.eval(), trainer.data, trainer.recipe
    batches = list(evaluation_batches(data.validation, batch_size=recipe.batch_size, seq_len=recipe.seq_len))
    verdict = {"bits_per_byte": bits_per_byte(model, batches, data.tokenizer.token_bytes())}
    if model.routers():
        experts = torch.cat([model(batch.tokens[:, :-1]).routings[0].experts for batch in batches])
        loads = F.one_hot(experts.flatten(1), model.config.n_routed_experts).sum(1)
        verdict["global_max_violation"] = max_violation(loads.sum(0)).item()
        verdict["sequence_max_violation"] = max_violation(loads).mean().item()
    return verdict


def store(name: str, way: Way, runs: list[dict]) -> None:
    """Put a way's runs into the file, in place of those that it had."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"ways": {}}
    found["ways"][name] = {
        "command": shlex.join(["python", "benchmarks/balance.py", "--only", name]),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "config": way.config,
        "speed": way.speed,
        "frozen": way.frozen,
        "runs": rounded(runs),
    }
    ordered = {known: found["ways"][known] for known in ways() if known in found["ways"]}
    setting = {"config": CONFIG.to_dict(), "recipe": asdict(RECIPE), "steps_per_record": EVERY}
    atomic_write_text(RESULTS, json.dumps(setting | {"ways": ordered}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WAY", choices=list(ways()), default=list(ways()))
    torch.set_num_threads(1)
    for name in parser.parse_args().only:
        way, runs = ways()[name], []
        for seed in SEEDS:
            runs.append(measure(way, seed))
            shown = ", ".join(f"{what} {value:.3f}" for what, value in runs[-1].items() if isinstance(value, float))
            print(f"{name}, seed {seed}: {shown}", flush=True)
        store(name, way, runs)


def rounded(value: object) -> object:
    """Floats to five digits, all through: the file is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
