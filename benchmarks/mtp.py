"""What makes a prediction module's drafts good? The longer runs of chapter 04, every variant with the same seeds.

    python benchmarks/mtp.py --steps 800 --seeds 0 1 2

Each variant trains on the same text in the same order, and with the same seed its trunk starts from the same weights,
whatever hangs behind it. The figures of `measure` go to benchmarks/results/mtp.json, which the chapter reads.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minids.config import ModelConfig
from minids.course.experiment import builtin_text
from minids.data.batches import evaluation_batches
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import Acceptance, generate_speculatively
from minids.model.mtp import MTPModule
from minids.model.transformer import MiniDS
from minids.training.loss import IGNORED, targets
from minids.training.pretrain import Recipe, TextData, Trainer

RESULTS = Path(__file__).parent / "results" / "mtp.json"
CONFIG = ModelConfig.preset(
    "nano", attention="gqa", num_hidden_layers=2, first_k_dense_replace=2, max_position_embeddings=256
)
RECIPE = Recipe(batch_size=4, seq_len=64, learning_rate=1e-2, evaluation_batches=1000)
GREEDY = Sampling(0.0)


class PostNorm(MiniDS):
    """The prediction modules continue from the stream after the final norm."""

    def trunk(self, *inputs):
        hidden, routings = super().trunk(*inputs)
        return self.norm(hidden), routings

    def logits(self, hidden):
        return self.head(hidden)


class EmbeddingFirst(MTPModule):
    """The projection reads [embedding; hidden], the order of the released weights."""

    def forward(self, hidden, embedding, context, cache=None):
        joined = torch.cat((self.embedding_norm(embedding), self.hidden_norm(hidden)), -1)
        return self.block(self.proj(joined), context, cache)


class NoEmbedding(MTPModule):
    """Never told which token came next (PITFALLS, bug i): it knows what an independent, parallel head knows."""

    def forward(self, hidden, embedding, context, cache=None):
        return super().forward(hidden, torch.zeros_like(embedding), context, cache)


class NoMask(MTPModule):
    """In training every position sees the whole sequence, its own label included (PITFALLS, bug h)."""

    def forward(self, hidden, embedding, context, cache=None):
        if cache is None:
            batch, seq, _ = hidden.shape
            context = replace(context, mask=hidden.new_zeros(batch, 1, seq, seq))
        return super().forward(hidden, embedding, context, cache)


@dataclass(frozen=True)
class Variant:
    """A model, and what its prediction modules are made of."""

    depths: int = 1
    model: type[MiniDS] = MiniDS
    module: type[MTPModule] = MTPModule


VARIANTS = {
    "no MTP": Variant(depths=0),
    "MTP": Variant(),
    "hidden after the norm": Variant(model=PostNorm),
    "embedding first": Variant(module=EmbeddingFirst),
    "no embedding": Variant(module=NoEmbedding),
    "no mask": Variant(module=NoMask),
    "three depths": Variant(depths=3),
    "three depths, no embedding": Variant(depths=3, module=NoEmbedding),
}


def build(variant: Variant, seed: int) -> MiniDS:
    """An untrained model. The trunk is drawn before the modules, so it depends on the seed alone."""
    model = variant.model(CONFIG.replace(num_nextn_predict_layers=variant.depths))
    model.mtp = nn.ModuleList(variant.module(model.config) for _ in range(variant.depths))
    torch.manual_seed(seed)
    model.initialize()
    return model


def train(variant: Variant, data: TextData, steps: int, seed: int) -> tuple[MiniDS, float]:
    """The trained model, and the bits per byte of its next-token predictions on the held-out text."""
    model = build(variant, seed)
    recipe = replace(RECIPE, steps=steps, evaluate_every=steps, seed=seed)
    metrics = Trainer(model, data, recipe).run(progress=False)
    return model.eval(), metrics[-1]["validation_bits_per_byte"]


def held_out_prompts(data: TextData, count: int = 64, length: int = 48) -> list[list[int]]:
    """Stretches of the held-out text, evenly spread."""
    tokens = data.validation.tokens
    return [tokens[i : i + length].tolist() for i in range(0, len(tokens) - length, len(tokens) // count)][:count]


def acceptance(model: MiniDS, prompts: list[list[int]], sampling: Sampling) -> Acceptance:
    """How the drafts fare while the model writes 48 bytes after each prompt."""
    generator = torch.Generator().manual_seed(0)
    return generate_speculatively(model, prompts, max_new_tokens=48, sampling=sampling, generator=generator)[1]


@torch.inference_mode()
def held_out_losses(model: MiniDS, data: TextData) -> list[float]:
    """Loss of each prediction depth on the held-out text, teacher-forced, in nats per byte."""
    sums, counts = [0.0] * len(model.mtp), [0] * len(model.mtp)
    for batch in evaluation_batches(data.validation, batch_size=16, seq_len=RECIPE.seq_len):
        for k, logits in enumerate(model(batch.tokens[:, :-1], mtp=True).mtp_logits):
            labels = targets(batch, k + 1)
            sums[k] += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            counts[k] += int((labels != IGNORED).sum())
    return [total / count for total, count in zip(sums, counts, strict=True)]


@torch.inference_mode()
def held_out_agreement(model: MiniDS, data: TextData) -> float:
    """Share of held-out positions where the first module's best token is the model's own; the text is real, no loop."""
    hits = count = 0
    for batch in evaluation_batches(data.validation, batch_size=16, seq_len=RECIPE.seq_len):
        out = model(batch.tokens[:, :-1], mtp=True)
        same = out.mtp_logits[0].argmax(-1) == out.logits[:, 1:].argmax(-1)
        hits, count = hits + int(same.sum()), count + same.numel()
    return hits / count


def measure(model: MiniDS, data: TextData) -> dict:
    """Everything about the drafts of a trained model; rates are lists, one entry per depth."""
    prompts = held_out_prompts(data)
    options = dict(max_new_tokens=48, sampling=GREEDY)
    greedy, sampled = acceptance(model, prompts, GREEDY), acceptance(model, prompts, Sampling())
    depths = range(1, len(model.mtp) + 1)
    return {
        "held_out_losses": held_out_losses(model, data),
        "held_out_agreement": held_out_agreement(model, data),
        "greedy": [greedy.rate(k) for k in depths],
        "sampled": [sampled.rate(k) for k in depths],
        "tokens_per_round": {"greedy": greedy.tokens_per_round, "sampled": sampled.tokens_per_round},
        "lossless": generate_speculatively(model, prompts, **options)[0] == generate(model, prompts, **options),
    }


def mismatches(model: MiniDS, data: TextData) -> dict:
    """Sampled acceptance where drafting does not use a module as training did; nothing is trained again."""
    after_norm = PostNorm(model.config)
    turned = MiniDS(model.config)
    turned.mtp = nn.ModuleList(EmbeddingFirst(model.config) for _ in model.mtp)
    rates = {}
    for name, wrong in (("hidden after the norm", after_norm), ("embedding first", turned)):
        wrong.load_state_dict(model.state_dict())
        rates[name] = acceptance(wrong.eval(), held_out_prompts(data), Sampling()).rate()
    return rates


def speed_up(model: MiniDS, data: TextData, repeats: int = 3) -> list[float]:
    """CPU seconds of plain over speculative greedy decoding at batch 1, taking turns, after one pair to warm up."""
    prompts = held_out_prompts(data, count=8)
    options = dict(max_new_tokens=48, sampling=GREEDY)
    ratios = []
    for _ in range(repeats + 1):
        seconds = []
        for decode in (generate, generate_speculatively):
            began = time.process_time()
            for prompt in prompts:
                decode(model, [prompt], **options)
            seconds.append(time.process_time() - began)
        ratios.append(seconds[0] / seconds[1])
    return ratios[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = builtin_text()
    variants: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for name, variant in VARIANTS.items():
        for seed in arguments.seeds:
            began = time.process_time()
            model, bits = train(variant, data, arguments.steps, seed)
            result = {"seed": seed, "validation_bits_per_byte": bits}
            if variant.depths:
                result |= measure(model, data)
            if name in ("MTP", "three depths"):
                result["speed_up"] = speed_up(model, data)
            if name == "MTP":
                result["mismatched"] = mismatches(model, data)
            variants[name].append(result | {"cpu_seconds": time.process_time() - began})
        rates = [f"{statistics.mean(r['sampled'][0] for r in variants[name]):.3f}"] if variant.depths else []
        print(name, *(f"{r['validation_bits_per_byte']:.3f}" for r in variants[name]), *rates, flush=True)
    seeds = " ".join(map(str, arguments.seeds))
    result = {
        "command": f"python benchmarks/mtp.py --steps {arguments.steps} --seeds {seeds}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "recipe": dataclasses.asdict(replace(RECIPE, steps=arguments.steps)),
        "config": CONFIG.to_dict(),
        "variants": variants,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
