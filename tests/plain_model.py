"""The model once more, from the papers' equations, one sequence at a time: what the package is compared with.

Loops over tokens and heads, vectors instead of batches, nothing shared with minids but the names of the weights.
Weights are taken from a module as they are, so a float64 module gives a float64 reference, and gradients flow.
"""

import math
from collections import Counter

import torch

from minids.config import ModelConfig
from minids.model.transformer import MiniDS

# The sizes are written out, because the tests count with them.
NANO = ModelConfig(
    vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_nextn_predict_layers=1,
    max_position_embeddings=4096, initializer_range=None, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1,
    moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
)  # fmt: skip


def build(config=NANO, dtype=torch.float64, seed=1) -> MiniDS:
    """A model in which nothing is left at a value that hides a mistake: norm weights are not 1, biases not 0."""
    torch.manual_seed(seed)
    model = MiniDS(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("router.bias"):
                weight.normal_(0, 0.05)
            elif weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("head.weight"):
                weight.normal_(0, config.hidden_size**-0.5)
    return model.to(dtype)


def random_tokens(*shape, seed=2, config=NANO):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_stream(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def through_cache(model, x, sizes, layer=0):
    """Read x [batch, seq, dim] with one layer's attention in chunks of these sizes; its output and its cache."""
    attention, cache = model.layers[layer].attention, model.new_cache(len(x), x.shape[1])
    outs = []
    for part in x.split(list(sizes), dim=1):
        context = model.attention_context(torch.zeros(part.shape[:2], dtype=torch.int64), cache)
        outs.append(attention(part, context, cache.layers[layer]))
        cache.advance(part.shape[1])
    return torch.cat(outs, 1), cache.layers[layer]


def without_cache(model, x, layer=0):
    """The same with nothing cached."""
    return model.layers[layer].attention(x, model.attention_context(torch.zeros(x.shape[:2], dtype=torch.int64)))


# Parts -----------------------------------------------------------------------------------------------------------


def part(w, prefix):
    return {name[len(prefix) :]: value for name, value in w.items() if name.startswith(prefix)}


def rms_norm(x, weight, eps):
    return x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps) * weight


def rms_norm_differentiable(x, weight, eps):
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def swiglu(w, x):
    gate, up = w["gate_proj.weight"] @ x, w["up_proj.weight"] @ x
    return w["down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def frequencies(dim, theta, yarn):
    """Radians per position of each pair; YaRN by hand (FACTS.md section 2.2)."""
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if yarn is None:
        return plain
    length = yarn.original_max_position_embeddings

    def corr(turns):
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(corr(yarn.beta_fast)), 0)
    high = min(math.ceil(corr(yarn.beta_slow)), dim - 1)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
    return [f * (1 - r) + f / yarn.factor * r for f, r in zip(plain, ramp, strict=True)]


def temperature(yarn, mscale):
    return 0.1 * mscale * math.log(yarn.factor) + 1


def turn(x, position, theta, yarn):
    """Rotate the pairs (2i, 2i+1) of one vector."""
    size = 1 if yarn is None else temperature(yarn, yarn.mscale) / temperature(yarn, yarn.mscale_all_dim)
    out = []
    for i, frequency in enumerate(frequencies(len(x), theta, yarn)):
        c, s = size * math.cos(position * frequency), size * math.sin(position * frequency)
        a, b = x[2 * i], x[2 * i + 1]
        out += [a * c - b * s, a * s + b * c]
    return torch.stack(out)


def scale(dim, yarn):
    return 1 / math.sqrt(dim) * (1 if yarn is None else temperature(yarn, yarn.mscale_all_dim) ** 2)


def weighted_sum(scores, values):
    """Softmax over a list of scores, then the mean of the vectors by it."""
    p = torch.stack(scores).softmax(0)
    return sum(p_j * v for p_j, v in zip(p, values, strict=True))


# Attention -------------------------------------------------------------------------------------------------------


def latent_attention(w, c, xs):
    """MLA of one sequence, head by head (V3 eq. 1-11): the outputs [seq, dim] and what is cached [seq, entry]."""
    nope, rank, eps, width = c.qk_nope_head_dim, c.kv_lora_rank, c.rms_norm_eps, c.qk_nope_head_dim + c.v_head_dim
    latents, shared_keys, queries = [], [], []
    for t, x in enumerate(xs):
        down = w["kv_down_proj.weight"] @ x
        latents.append(rms_norm_differentiable(down[:rank], w["kv_norm.weight"], eps))
        shared_keys.append(turn(down[rank:], t, c.rope_theta, c.rope_scaling))
        if c.q_lora_rank is None:
            query = w["q_proj.weight"] @ x
        else:
            compressed = rms_norm_differentiable(w["q_down_proj.weight"] @ x, w["q_norm.weight"], eps)
            query = w["q_up_proj.weight"] @ compressed
        per_head = query.reshape(c.num_attention_heads, -1)
        queries.append([(q[:nope], turn(q[nope:], t, c.rope_theta, c.rope_scaling)) for q in per_head])
    outs = []
    for t in range(len(xs)):
        heads = []
        for h in range(c.num_attention_heads):
            w_key, w_value = w["kv_up_proj.weight"][h * width : (h + 1) * width].split((nope, c.v_head_dim))
            q_nope, q_rope = queries[t][h]
            scores = [
                (q_nope @ (w_key @ latents[j]) + q_rope @ shared_keys[j])
                * scale(nope + c.qk_rope_head_dim, c.rope_scaling)
                for j in range(t + 1)
            ]
            heads.append(weighted_sum(scores, [w_value @ latents[j] for j in range(t + 1)]))
        outs.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outs), torch.stack([torch.cat(e) for e in zip(latents, shared_keys, strict=True)])


def grouped_attention(w, c, xs):
    """MHA, GQA or MQA of one sequence: query head h reads key head h // (heads per key head)."""
    dim, shared = c.v_head_dim, c.num_attention_heads // c.num_key_value_heads

    def heads_of(name, x):
        return (w[name] @ x).reshape(-1, dim)

    queries = [[turn(q, t, c.rope_theta, c.rope_scaling) for q in heads_of("q_proj.weight", x)] for t, x in en(xs)]
    keys = [[turn(k, t, c.rope_theta, c.rope_scaling) for k in heads_of("k_proj.weight", x)] for t, x in en(xs)]
    values = [heads_of("v_proj.weight", x) for x in xs]
    outs = []
    for t in range(len(xs)):
        heads = []
        for h in range(c.num_attention_heads):
            scores = [queries[t][h] @ keys[j][h // shared] * scale(dim, c.rope_scaling) for j in range(t + 1)]
            heads.append(weighted_sum(scores, [values[j][h // shared] for j in range(t + 1)]))
        outs.append(w["o_proj.weight"] @ torch.cat(heads))
    entries = [torch.cat([*keys[t], *values[t]]) for t in range(len(xs))]
    return torch.stack(outs), torch.stack(entries)


en = enumerate


# Mixture of experts ----------------------------------------------------------------------------------------------


def affinities(w, c, x):
    logits = [sum(a * b for a, b in zip(row, x.tolist(), strict=True)) for row in w["weight"].tolist()]
    if c.scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-v)) for v in logits]
    top = max(logits)
    return [math.exp(v - top) / sum(math.exp(u - top) for u in logits) for v in logits]


def choose(scores, bias, c):
    """The k experts of one token (FACTS.md section 3, steps 2 to 4), as a set."""
    biased = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size, best_of_group = c.n_routed_experts // c.n_group, 2 if c.topk_method == "noaux_tc" else 1
    groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
    ranked = sorted(groups, key=lambda g: -sum(sorted((biased[i] for i in g), reverse=True)[:best_of_group]))
    candidates = [i for group in ranked[: c.topk_group] for i in group]
    return set(sorted(candidates, key=lambda i: -biased[i])[: c.num_experts_per_tok])


def route(w, c, x):
    """One token's experts with their weights, as a dict (steps 1 to 5)."""
    scores = affinities(w, c, x)
    chosen = choose(scores, w["bias"].tolist() if "bias" in w else None, c)
    total = sum(scores[i] for i in chosen) if c.norm_topk_prob else 1
    return {i: c.routed_scaling_factor * scores[i] / total for i in chosen}


def mixture(w, c, xs):
    """h' = sum of the shared experts + sum of g_i times routed expert i (V3 eq. 12); and the tokens of each expert."""
    outs, load = [], Counter()
    for x in xs:
        out = swiglu(part(w, "shared."), x) if c.n_shared_experts else torch.zeros_like(x)
        chosen = route(part(w, "router."), c, x.detach())
        for i, weight in chosen.items():
            out = out + weight * expert(w, i, x)
        load.update(chosen.keys())
        outs.append(out)
    return torch.stack(outs), [load[i] for i in range(c.n_routed_experts)]


def expert(w, i, x):
    """One routed expert: its matrices are stored stacked, input first."""
    gate, up = x @ w["experts.gate_proj"][i], x @ w["experts.up_proj"][i]
    return (gate / (1 + torch.exp(-gate)) * up) @ w["experts.down_proj"][i]


def sequence_balance_loss(scores, k):
    """V3 eq. 17-20 of one sequence, scores [token][expert] as lists."""
    tokens, experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(experts):
        chosen = sum(i in sorted(range(experts), key=lambda e: -row[e])[:k] for row in scores)
        f_i = experts / (k * tokens) * chosen
        p_i = sum(row[i] / sum(row) for row in scores) / tokens
        total += f_i * p_i
    return total


def v2_balance_losses(scores, chosen, devices, devices_per_token):
    """V2 eq. 23-31 of one sequence without the alphas; chosen [token] is the set of its experts."""
    tokens, experts, k = len(scores), len(scores[0]), len(chosen[0])
    per_device = experts // devices
    f = [experts / (k * tokens) * sum(i in c for c in chosen) for i in range(experts)]
    p = [sum(row[i] for row in scores) / tokens for i in range(experts)]
    by_device = by_communication = 0.0
    for d in range(devices):
        members = range(d * per_device, (d + 1) * per_device)
        p_device = sum(p[j] for j in members)
        by_device += sum(f[j] for j in members) / per_device * p_device
        sent = sum(any(j in c for j in members) for c in chosen)
        by_communication += devices / (devices_per_token * tokens) * sent * p_device
    return [sum(a * b for a, b in zip(f, p, strict=True)), by_device, by_communication]


# The whole model -------------------------------------------------------------------------------------------------


def norm_all(xs, weight, c):
    return torch.stack([rms_norm_differentiable(x, weight, c.rms_norm_eps) for x in xs])


def block(w, c, xs, loads):
    attention = latent_attention if c.attention == "mla" else grouped_attention
    xs = xs + attention(part(w, "attention."), c, norm_all(xs, w["attention_norm.weight"], c))[0]
    inner = norm_all(xs, w["ffn_norm.weight"], c)
    if "ffn.router.weight" in w:
        out, load = mixture(part(w, "ffn."), c, inner)
        loads.append(load)
    else:
        out = torch.stack([swiglu(part(w, "ffn."), x) for x in inner])
    return xs + out


def forward(model, tokens):
    """Logits [seq, vocab], MTP logits of each depth, and the loads, for one list of tokens (V3 eq. 21-23)."""
    w, c, loads = dict(model.named_parameters()), model.config, []
    embed = w["embedding.weight"]
    xs = torch.stack([embed[t] for t in tokens])
    for i in range(c.num_hidden_layers):
        xs = block(part(w, f"layers.{i}."), c, xs, loads)
    logits = norm_all(xs, w["norm.weight"], c) @ w["head.weight"].T
    further = []
    for k in range(1, c.num_nextn_predict_layers + 1):
        m = part(w, f"mtp.{k - 1}.")
        joined = [
            torch.cat((
                rms_norm_differentiable(xs[i], m["hidden_norm.weight"], c.rms_norm_eps),
                rms_norm_differentiable(embed[tokens[i + k]], m["embedding_norm.weight"], c.rms_norm_eps),
            ))
            for i in range(len(tokens) - k)
        ]  # fmt: skip
        xs = block(part(m, "block."), c, torch.stack([m["proj.weight"] @ x for x in joined]), loads)
        further.append(norm_all(xs, m["norm.weight"], c) @ w["head.weight"].T)
    return logits, further, loads
