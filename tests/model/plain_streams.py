"""Hyper-connections and Engram once more, from the papers' formulas, token by token, in float64 and in integers."""

import math

import torch


def mixed_by(matrix, streams):
    """x' = H x for H [n, n] and x [n, dim], with loops."""
    n = len(streams)
    return torch.stack([sum(matrix[k][j] * streams[j] for j in range(n)) for k in range(n)])


def unweighted_norm(vector, eps):
    return vector / (vector.square().mean() + eps).sqrt()


def site(w, x, config):
    """H_pre, H_post and H_res of one token with the streams x [n, dim] (mHC eq. 7-9), for weights by name.

    H_res: T_r after T_c, `hc_sinkhorn_iters` times, of exp; V4's code has it transposed and adds eps in every step.
    """
    n, eps = len(x), config.hc_eps
    out = w["proj"].double() @ unweighted_norm(x.double().flatten(), config.rms_norm_eps)
    scale, bias = w["scale"].double(), w["bias"].double()
    read = [torch.sigmoid(scale[0] * out[i] + bias[i]) + eps for i in range(n)]
    write = [2 * torch.sigmoid(scale[1] * out[n + i] + bias[n + i]) for i in range(n)]
    logits = (scale[2] * out[2 * n :] + bias[2 * n :]).view(n, n)
    code = torch.stack([row.exp() / row.exp().sum() + eps for row in logits])  # [from, to]
    for step in range(config.hc_sinkhorn_iters):
        if step:
            code = torch.stack([row / (row.sum() + eps) for row in code])
        code = torch.stack([column / (column.sum() + eps) for column in code.T]).T
    return torch.stack(read), torch.stack(write), code.T


def hyper_block(block, config, streams, context):
    """A layer on [1, seq, n, dim]: the formula's H_res x + H_post^T F(H_pre x) around attention, then feed-forward."""
    for connection, norm, sublayer in (
        (block.attention_connection, block.attention_norm, lambda x: block.attention(x, context)),
        (block.ffn_connection, block.ffn_norm, lambda x: out[0] if isinstance(out := block.ffn(x), tuple) else out),
    ):
        w = dict(connection.named_parameters())
        weights = [site(w, token, config) for token in streams[0]]
        read = torch.stack([pre @ token for (pre, _, _), token in zip(weights, streams[0], strict=True)])
        out = sublayer(norm(read[None]))[0]
        streams = torch.stack(
            [
                mixed_by(res, token) + torch.outer(post, each)
                for (_, post, res), token, each in zip(weights, streams[0], out, strict=True)
            ]
        )[None]
    return streams


def collapsed(norm, config, streams):
    """The weighted sum at the end, for [..., n, dim], before the RMSNorm."""
    w, rows = dict(norm.collapse.named_parameters()), []
    for token in streams.flatten(0, -3):
        out = w["proj"].double() @ unweighted_norm(token.double().flatten(), config.rms_norm_eps)
        rows.append((torch.sigmoid(w["scale"].double() * out + w["bias"].double()) + config.hc_eps) @ token)
    return torch.stack(rows).view(*streams.shape[:-2], -1)


def rows_of(tokens, position, multipliers, table_rows, pad, bos=None):
    """Rows that a position of a sequence reads, by length and head, in Python's integers."""
    places, outside = [], False
    for k in range(len(multipliers)):
        outside = outside or position - k < 0 or (k > 0 and bos is not None and tokens[position - k + 1] == bos)
        places.append(pad if outside else tokens[position - k])
    found = []
    for length, sizes in enumerate(table_rows, start=2):
        mixed = 0
        for k in range(length):
            mixed ^= places[k] * multipliers[k]
        found.append([mixed % size for size in sizes])
    return found


def memory_added(engram, config, tokens, streams, pad, bos=None):
    """What an Engram adds to [seq, n, dim]: per stream the gate times the value."""
    dim, added = streams.shape[-1], []
    tables = engram.table_rows
    for position, token in enumerate(streams):
        pieces, first = [], 0
        rows = rows_of(tokens, position, engram.multipliers, tables, pad, bos)
        for sizes, of_length in zip(tables, rows, strict=True):
            for size, row in zip(sizes, of_length, strict=True):
                pieces.append(engram.table.weight[first + row])
                first += size
        memory = torch.cat(pieces)
        value, streams_of_token = engram.value_proj.weight @ memory, []
        for gate, h in zip(engram.gates, token, strict=True):
            key = unweighted_norm(gate.key_proj.weight @ memory, config.rms_norm_eps) * gate.key_norm.weight
            query = unweighted_norm(h, config.rms_norm_eps) * gate.query_norm.weight
            a = (key @ query).item() / math.sqrt(dim)
            root = math.copysign(math.sqrt(max(abs(a), 1e-6)), a)
            streams_of_token.append(value / (1 + math.exp(-root)))
        added.append(torch.stack(streams_of_token))
    return torch.stack(added)
