"""V4's attention once more, from its equations, one sequence at a time: what `compressed_attention` is compared with.

Loops over tokens, blocks and heads; nothing shared with minids but the names of the weights, and the loops of
`plain_model`. Sums are written as the paper has them, over sets of tokens.
"""

import math

import plain_model as plain
import torch
from plain_model import NANO, build

from minids.config import YaRN

LAYERS = ("window", "csa", "hca")
COMPRESSED = NANO.replace(
    attention="csa", layer_types=LAYERS, num_nextn_predict_layers=0, v_head_dim=16, sliding_window=5, csa_block=3,
    hca_block=6, index_topk=3, index_n_heads=16, index_head_dim=12, o_groups=2, o_lora_rank=12, num_hash_layers=1,
    rope_scaling=YaRN(factor=4, original_max_position_embeddings=16),
)  # fmt: skip
MODELS = {}


def model_of(**changes):
    """A float64 model in which no norm, bias, sink or weight is left at a value that hides a mistake."""
    key = tuple(sorted(changes.items()))
    if key not in MODELS:
        model = build(COMPRESSED.replace(**changes))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("sink.logit", "place_bias")):
                    weight.normal_(0, 1)
        MODELS[key] = model
    return MODELS[key]


def turn_last(x, position, width, theta, yarn):
    """Rotate the last `width` channels of one vector; a negative position rotates back."""
    return torch.cat((x[:-width], plain.turn(x[-width:], position, theta, yarn)))


def frequencies_of(config, kind):
    """Base and YaRN of a layer: only layers with entries have the larger base, and YaRN."""
    return (config.rope_theta, None) if kind == "window" else (config.compress_rope_theta, config.rope_scaling)


def entries(w, config, xs, m, overlap, width):
    """The entries of the complete blocks, [blocks, width]."""
    content, logits = ([w[name] @ x for x in xs] for name in ("content_proj.weight", "logit_proj.weight"))
    out = []
    for i in range(len(xs) // m):
        parts = []  # (content, logits) of each token in the mixture
        for place in range(m):
            s, bias = i * m + place, w["place_bias"][place]
            if not overlap:
                parts.append((content[s], logits[s] + bias))
                continue
            parts.append((content[s][width:], (logits[s] + bias)[width:]))
            if i > 0:
                parts.append((content[s - m][:width], (logits[s - m] + bias)[:width]))
        weights = torch.stack([z for _, z in parts]).softmax(0)
        mixed = sum(weight * c for weight, (c, _) in zip(weights, parts, strict=True))
        normed = plain.rms_norm_differentiable(mixed, w["norm.weight"], config.rms_norm_eps)
        out.append(turn_last(normed, i * m, config.qk_rope_head_dim, *frequencies_of(config, "csa")))
    return torch.stack(out) if out else torch.zeros(0, width, dtype=xs.dtype)


def index_scores(w, config, xs):
    """I_{t,i} of all queries and entries of csa, also of later ones."""
    heads, dim, part = config.index_n_heads, config.index_head_dim, plain.part(w, "indexer.")
    keys = entries(plain.part(part, "compressor."), config, xs, config.csa_block, True, dim)
    scores = torch.zeros(len(xs), len(keys), dtype=xs.dtype)
    for t, x in enumerate(xs):
        latent = query_latent(w, config, x)
        for j in range(heads):
            query = part["q_proj.weight"][j * dim : (j + 1) * dim] @ latent
            query = turn_last(query, t, config.qk_rope_head_dim, *frequencies_of(config, "csa"))
            weight = part["head_weights"][j] @ x / math.sqrt(heads * dim)
            for i, key in enumerate(keys):
                scores[t, i] += weight * max(query @ key, 0.0)
    return scores


def query_latent(w, config, x):
    return plain.rms_norm_differentiable(w["q_down_proj.weight"] @ x, w["q_norm.weight"], config.rms_norm_eps)


def attended_blocks(w, config, kind, xs):
    """The blocks that each query attends to: complete ones, of csa the best k; earlier ones where scores are equal."""
    if kind == "window":
        return [[] for _ in xs]
    m = config.csa_block if kind == "csa" else config.hca_block
    complete = [[i for i in range(len(xs) // m) if i * m + m - 1 <= t] for t in range(len(xs))]
    if kind == "hca":
        return complete
    scores = index_scores(w, config, xs)
    return [sorted(seen, key=lambda i, t=t: -scores[t, i])[: config.index_topk] for t, seen in enumerate(complete)]


def compressed_attention(w, config, kind, xs):
    """The outputs [seq, dim] of one layer of this kind."""
    dim, rope, eps = config.v_head_dim, config.qk_rope_head_dim, config.rms_norm_eps
    theta, yarn = frequencies_of(config, kind)
    tokens = [
        turn_last(
            plain.rms_norm_differentiable(w["kv_proj.weight"] @ x, w["kv_norm.weight"], eps), t, rope, theta, yarn
        )
        for t, x in enumerate(xs)
    ]
    if kind != "window":
        m = config.csa_block if kind == "csa" else config.hca_block
        blocks = entries(plain.part(w, "compressor."), config, xs, m, kind == "csa", dim)
    outs = []
    for t, (x, chosen) in enumerate(zip(xs, attended_blocks(w, config, kind, xs), strict=True)):
        seen = tokens[max(0, t - config.sliding_window + 1) : t + 1] + [blocks[i] for i in chosen]
        heads = []
        for h, query in enumerate((w["q_up_proj.weight"] @ query_latent(w, config, x)).split(dim)):
            query = turn_last(plain.rms_norm_differentiable(query, 1, eps), t, rope, theta, yarn)
            powers = [(query @ key / math.sqrt(dim)).exp() for key in seen]
            total = sum(powers) + w["sink.logit"][h].exp()
            mixed = sum(power / total * value for power, value in zip(powers, seen, strict=True))
            heads.append(turn_last(mixed, -t, rope, theta, yarn))
        together = torch.cat(heads).split(len(heads) * dim // config.o_groups)
        narrow = [group @ matrix for group, matrix in zip(together, w["group_proj.weight"], strict=True)]
        outs.append(w["o_proj.weight"] @ torch.cat(narrow))
    return torch.stack(outs)


def indexer_loss(w, config, xs):
    """KL(p || softmax(I)) over the attended entries, mean over queries, of which some have none; p as in V3.2."""
    dim, rope, eps, frequencies = config.v_head_dim, config.qk_rope_head_dim, config.rms_norm_eps, frequencies_of
    theta, yarn = frequencies(config, "csa")
    blocks = entries(plain.part(w, "compressor."), config, xs, config.csa_block, True, dim)
    scores, total = index_scores(w, config, xs), 0.0
    for t, (x, chosen) in enumerate(zip(xs, attended_blocks(w, config, "csa", xs), strict=True)):
        if not chosen:
            continue
        p = 0.0
        for h, query in enumerate((w["q_up_proj.weight"] @ query_latent(w, config, x)).split(dim)):
            query = turn_last(plain.rms_norm_differentiable(query, 1, eps), t, rope, theta, yarn)
            window = [
                turn_last(
                    plain.rms_norm_differentiable(w["kv_proj.weight"] @ xs[s], w["kv_norm.weight"], eps),
                    s, rope, theta, yarn,
                )
                for s in range(max(0, t - config.sliding_window + 1), t + 1)
            ]  # fmt: skip
            powers = torch.stack([(query @ key / math.sqrt(dim)).exp() for key in [*window, *blocks[chosen]]])
            p = p + powers[len(window) :] / (powers.sum() + w["sink.logit"][h].exp())
        target = p / p.sum()
        total += (target * (target.log() - scores[t, chosen].log_softmax(0))).sum().item()
    return total / len(xs)
