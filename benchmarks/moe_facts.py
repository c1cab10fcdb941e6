"""What idle parameters buy: how many random facts a layer recalls; the experiment behind chapters/03_moe.ipynb, 4.1.

    python benchmarks/moe_facts.py                      the facts: about two minutes of one core
    python benchmarks/moe_facts.py --only "16 experts"  one layer, in place of what the results hold of it

A fact is a random key of 32 values with one of 256 random answers; a layer and a linear head learn 4,096 of them in 400
steps, and are then asked for each. Nothing can be inferred, so what is recalled was stored in the weights. The layers
differ in the weights that they keep and in those that a token uses. Controls: a dense layer with more weights (and more
work), the same weights in coarse experts, a mixture without balancing, and one with a shared expert.

With --rule, half of each batch asks for something that all tokens have in common: a fixed function of the key, on keys
that the layer has never seen. Does a shared expert help there?
Results go to benchmarks/results/moe_facts.json, with commands, seeds and versions.
"""

import argparse
import json
import platform
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.files import atomic_write_text
from minids.model import moe
from minids.model.layers import SwiGLU

RESULTS = Path(__file__).parent / "results" / "moe_facts.json"
DIM, FACTS, ANSWERS, CLASSES = 32, 4096, 256, 16
STEPS, BATCH, LEARNING_RATE = 400, 1024, 3e-3
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Layer:
    """A dense layer (`experts` is 0) of this width, or a mixture of experts of this width, of which a token takes k."""

    width: int
    experts: int = 0
    k: int = 0
    shared: int = 0
    balance_speed: float = 0.003

    def build(self) -> nn.Module:
        if not self.experts:
            return SwiGLU(DIM, self.width)
        sizes = dict(n_routed_experts=self.experts, num_experts_per_tok=self.k, moe_intermediate_size=self.width)
        plain = dict(n_shared_experts=self.shared, n_group=1, topk_group=1, routed_scaling_factor=1.0)
        return moe.MoE(ModelConfig.preset("nano", hidden_size=DIM, **sizes, **plain))

    def weights(self) -> dict[str, int]:
        """The weights of feed-forward networks that the layer keeps, and those that a token uses."""
        one = 3 * DIM * self.width
        kept, used = (self.experts + self.shared, self.k + self.shared) if self.experts else (1, 1)
        return {"kept": kept * one, "used": used * one}


LAYERS = {
    "dense": Layer(32),
    "4 coarse experts": Layer(32, 4, 1),
    "16 experts": Layer(8, 16, 4),
    "16 coarse experts": Layer(32, 16, 1),
    "64 experts": Layer(8, 64, 4),
    "dense, 4 times the work": Layer(128),
    "64 experts, no balancing": Layer(8, 64, 4, balance_speed=0.0),
    "15 experts, 1 shared": Layer(8, 15, 3, 1),
    "63 experts, 1 shared": Layer(8, 63, 3, 1),
}
WITH_A_RULE = ("dense", "16 experts", "15 experts, 1 shared", "64 experts", "63 experts, 1 shared")


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, moe.Routing | None]:
    out = layer(x[None])
    out, routing = out if isinstance(out, tuple) else (out, None)
    return out[0], routing


def measure(kind: Layer, seed: int, rule: bool = False, steps: int = STEPS) -> dict:
    """Train one layer; return the share of facts that it recalls and, with a rule, of new keys that follow it."""
    torch.manual_seed(seed)
    keys, answers = torch.randn(FACTS, DIM), torch.randint(ANSWERS, (FACTS,))
    teacher = nn.Sequential(nn.Linear(DIM, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    layer, head, rule_head = kind.build(), nn.Linear(DIM, ANSWERS, bias=False), nn.Linear(DIM, CLASSES, bias=False)
    for weight in [*layer.parameters(), *teacher.parameters()]:
        if weight.ndim > 1:
            nn.init.normal_(weight, std=DIM**-0.5)
    parameters = [*layer.parameters(), *head.parameters(), *rule_head.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    for _ in range(steps):
        asked, new = torch.randint(FACTS, (BATCH,)), torch.randn(BATCH if rule else 0, DIM)
        out, routing = run(layer, torch.cat((keys[asked], new)))
        loss = F.cross_entropy(head(out[:BATCH]), answers[asked])
        if rule:
            loss = loss + F.cross_entropy(rule_head(out[BATCH:]), teacher(new).argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if routing is not None:
            moe.update_balance_bias(layer.router.bias, routing.tokens_per_expert, kind.balance_speed)
    with torch.no_grad():
        out, routing = run(layer, keys)
        result = {"seed": seed, "recalled": (head(out).argmax(-1) == answers).float().mean().item()}
        if routing is not None:
            result["max_violation"] = moe.max_violation(routing.tokens_per_expert).item()
        if rule:
            new = torch.randn(8192, DIM)
            correct = rule_head(run(layer, new)[0]).argmax(-1) == teacher(new).argmax(-1)
            result["rule"] = correct.float().mean().item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="LAYER", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--rule", action="store_true", help="also teach a rule that all tokens have in common")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part = "facts and a rule" if options.rule else "facts"
    for name in options.only:
        if options.rule and name not in WITH_A_RULE:
            continue
        runs = [measure(LAYERS[name], seed, options.rule) for seed in SEEDS]
        print(name, runs, flush=True)
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        command = ["python", "benchmarks/moe_facts.py", *(["--rule"] if options.rule else []), "--only", name]
        found.setdefault(part, {})[name] = {
            "command": shlex.join(command),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            **LAYERS[name].weights(),
            "runs": [{what: round(value, 4) for what, value in run.items()} for run in runs],
        }
        found[part] = {known: found[part][known] for known in LAYERS if known in found[part]}
        atomic_write_text(RESULTS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
