"""DSA once more, from V3.2-Exp's equations, one sequence at a time: what `sparse_attention` is compared with.

Loops over tokens and heads; nothing shared with minids but the names of the weights, and the loops of `plain_model`.
"""

import math

import plain_model as plain
import torch
from plain_model import NANO, build

# Index heads enough that no score is 0 but by a rare accident; k well below the lengths that the tests use.
SPARSE = NANO.replace(index_topk=4, index_n_heads=16, index_head_dim=12)
MODELS = {}


def model_of(dtype=torch.float64, **changes):
    """A model with sparse attention in which no norm, bias or weight is left at a value that hides a mistake."""
    key = (dtype, *sorted(changes.items()))
    if key not in MODELS:
        model = build(SPARSE.replace(**changes), dtype)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("k_norm.bias"):
                    weight.uniform_(-0.5, 0.5)
        MODELS[key] = model
    return MODELS[key]


def weights_of(attention):
    """All weights of an attention module, by name."""
    return {name: weight.detach() for name, weight in attention.named_parameters()}


def turn_halves(x, position, config):
    """Rotate channel i with channel i + rope / 2, among the first `rope` channels of one vector."""
    half, out = config.qk_rope_head_dim // 2, x.clone()
    for i, frequency in enumerate(plain.frequencies(2 * half, config.rope_theta, config.rope_scaling)):
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def layer_norm(x, weight, bias):
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * weight + bias


def index_scores(w, config, xs):
    """I_{t,s} of one sequence for all pairs, also s > t (V3.2-Exp eq. 1); and the index keys."""
    heads, dim = config.index_n_heads, config.index_head_dim
    part = {name.removeprefix("indexer."): value for name, value in w.items() if name.startswith("indexer.")}
    keys = [
        turn_halves(layer_norm(part["k_proj.weight"] @ x, part["k_norm.weight"], part["k_norm.bias"]), s, config)
        for s, x in enumerate(xs)
    ]
    scores = torch.zeros(len(xs), len(xs), dtype=xs.dtype)
    for t, x in enumerate(xs):
        latent = plain.rms_norm(w["q_down_proj.weight"] @ x, w["q_norm.weight"], 1e-6)
        for j in range(heads):
            query = turn_halves(part["q_proj.weight"][j * dim : (j + 1) * dim] @ latent, t, config)
            weight = part["head_weights"][j] @ x / math.sqrt(heads * dim)
            for s, key in enumerate(keys):
                scores[t, s] += weight * max(query @ key, 0.0)
    return scores, torch.stack(keys)


def chosen(scores, k):
    """The set S_t of each query: its k best visible tokens, earlier ones where scores are equal."""
    return [set(sorted(range(t + 1), key=lambda s: -scores[t][s])[:k]) for t in range(len(scores))]


def head_probabilities(w, config, xs, attended):
    """Attention probabilities [heads, seq, seq] of MLA over the attended tokens of each query; and per-head values."""
    nope, rank, width = config.qk_nope_head_dim, config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    theta, yarn = config.rope_theta, config.rope_scaling
    down = [w["kv_down_proj.weight"] @ x for x in xs]
    latents = torch.stack([plain.rms_norm(d[:rank], w["kv_norm.weight"], 1e-6) for d in down])
    rotated = torch.stack([plain.turn(d[rank:], s, theta, yarn) for s, d in enumerate(down)])
    up = w["kv_up_proj.weight"].unflatten(0, (config.num_attention_heads, width))
    p = torch.zeros(config.num_attention_heads, len(xs), len(xs), dtype=xs.dtype)
    for t, x in enumerate(xs):
        latent = plain.rms_norm(w["q_down_proj.weight"] @ x, w["q_norm.weight"], 1e-6)
        for h, query in enumerate((w["q_up_proj.weight"] @ latent).reshape(config.num_attention_heads, -1)):
            seen = sorted(attended[t])
            logits = [
                query[:nope] @ (up[h, :nope] @ latents[s]) + plain.turn(query[nope:], t, theta, yarn) @ rotated[s]
                for s in seen
            ]
            p[h, t, seen] = (torch.stack(logits) * plain.scale(config.qk_head_dim, yarn)).softmax(0)
    return p, torch.stack([latents @ up[h, nope:].T for h in range(config.num_attention_heads)])


def sparse_attention(w, config, xs, attended):
    """The outputs [seq, dim] of MLA that attends to the sets `attended` (V3.2-Exp eq. 2)."""
    p, values = head_probabilities(w, config, xs, attended)
    return torch.cat([*(p @ values)], -1) @ w["o_proj.weight"].T


def indexer_loss(w, config, xs, attended):
    """KL(p || softmax(I)) over the attended tokens, mean over queries (V3.2-Exp eq. 3-4)."""
    p, _ = head_probabilities(w, config, xs, attended)
    scores, _ = index_scores(w, config, xs)
    total = 0.0
    for t, seen in enumerate(sorted(each) for each in attended):
        target = p[:, t, seen].sum(0)
        target = target / target.sum()
        log_chance = scores[t, seen].log_softmax(0)
        total += sum((a * (a.log() - b)).item() for a, b in zip(target, log_chance, strict=True))
    return total / len(xs)
