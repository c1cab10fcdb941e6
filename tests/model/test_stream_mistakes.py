"""Hyper-connections and the router of V4: planted mistakes, each caught by the comparison with the papers' formulas.

Some of them were found in ports of V4 (FACTS.md section 10).
"""

import plain_streams as plain
import torch
from pitfalls import assert_caught, close, each_mistake
from plain_model import NANO, build, random_stream, random_tokens

from minids.model import hyper_connections, moe
from minids.model.hyper_connections import CollapsingNorm, HyperBlock, HyperConnection, HyperMTPModule, StreamProjection
from minids.model.moe import Router

STREAMS = NANO.replace(hc_mult=4, hc_sinkhorn_iters=2)  # few iterations, whose order then shows

# Hyper-connections -------------------------------------------------------------------------------------------------


def check_block_is_the_formula():
    model, x = build(STREAMS), random_stream(1, 5, 4, 64)
    context = model.attention_context(torch.zeros(1, 5, dtype=torch.int64))
    for block in model.layers[:2]:
        got, _ = block(x, context)
        assert got.shape == x.shape
        close(got, plain.hyper_block(block, STREAMS, x, context))


def plant_coefficients(mp, change):
    original = HyperConnection.coefficients
    mp.setattr(HyperConnection, "coefficients", lambda self, x: original(self, x)._replace(**change(original(self, x))))


def plant_post_without_the_factor_2(mp):
    plant_coefficients(mp, lambda w: {"write": w.write / 2})


def plant_post_with_eps(mp):
    plant_coefficients(mp, lambda w: {"write": w.write + 1e-6})


def plant_pre_without_eps(mp):
    plant_coefficients(mp, lambda w: {"read": w.read - 1e-6})


def plant_columns_and_rows_exchanged(mp):
    plant_coefficients(mp, lambda w: {"mix": w.mix.mT})


def plant_sinkhorn(mp, sinkhorn):
    mp.setattr(hyper_connections, "sinkhorn", sinkhorn)


def plant_rows_last(mp):
    def sinkhorn(logits, iterations, eps):
        return original(logits.mT, iterations, eps).mT

    original = hyper_connections.sinkhorn
    plant_sinkhorn(mp, sinkhorn)


def plant_one_iteration_more(mp):
    original = hyper_connections.sinkhorn
    plant_sinkhorn(mp, lambda logits, iterations, eps: original(logits, iterations + 1, eps))


def plant_softmax_alone(mp):
    plant_sinkhorn(mp, lambda logits, iterations, eps: logits.softmax(-1))


def plant_free_mixing(mp):
    plant_sinkhorn(mp, lambda logits, iterations, eps: logits)


def plant_norm_per_stream(mp):
    def projected(self, streams):
        each = streams * (streams.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        return each.flatten(-2) @ self.proj.T

    mp.setattr(StreamProjection, "projected", projected)


def plant_norm_after_the_projection(mp):
    def projected(self, streams):
        out = streams.flatten(-2) @ self.proj.T
        return out * (out.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()

    mp.setattr(StreamProjection, "projected", projected)


def plant_no_norm(mp):
    mp.setattr(StreamProjection, "projected", lambda self, streams: streams.flatten(-2) @ self.proj.T)


def plant_sublayer_before_its_norm(mp):
    """The streams are normalised, then read: the norm stands before the collapse instead of after it."""

    def forward(self, x, context, cache=None, experts=None):
        for connection, norm, sublayer in (
            (self.attention_connection, self.attention_norm, lambda x: self.attention(x, context, cache)),
            (self.ffn_connection, self.ffn_norm, self.ffn),
        ):
            weights = connection.coefficients(x)
            out = sublayer(hyper_connections.read_streams(norm(x), weights.read))
            x = hyper_connections.write_streams(x, out[0] if isinstance(out, tuple) else out, weights)
        return x, None

    mp.setattr(HyperBlock, "forward", forward)


def plant_one_site_per_layer(mp):
    """Attention and feed-forward share the attention's coefficients."""

    def forward(self, x, context, cache=None, experts=None):
        weights = self.attention_connection.coefficients(x)
        for norm, sublayer in (
            (self.attention_norm, lambda x: self.attention(x, context, cache)),
            (self.ffn_norm, self.ffn),
        ):
            out = sublayer(norm(hyper_connections.read_streams(x, weights.read)))
            x = hyper_connections.write_streams(x, out[0] if isinstance(out, tuple) else out, weights)
        return x, None

    mp.setattr(HyperBlock, "forward", forward)


def check_end_is_the_weighted_sum():
    model, x = build(STREAMS), random_stream(2, 3, 4, 64)
    want = plain.collapsed(model.norm, STREAMS, x)
    close(
        model.norm(x), want / (want.square().mean(-1, keepdim=True) + STREAMS.rms_norm_eps).sqrt() * model.norm.weight
    )


def plant_mean_of_the_streams(mp):
    mp.setattr(CollapsingNorm, "read", lambda self, streams: torch.full_like(streams[..., 0], 0.25))


def plant_first_stream_alone(mp):
    mp.setattr(CollapsingNorm, "read", lambda self, streams: torch.eye(4).double()[0].expand(streams.shape[:-1]))


def check_prediction_reads_every_stream():
    model, tokens = build(STREAMS.replace(num_hidden_layers=2)), random_tokens(1, 6)
    module, hidden, embedded = model.mtp[0], random_stream(1, 6, 4, 64), model.embedding(tokens)
    joined = torch.cat((module.hidden_norm(hidden), module.embedding_norm(embedded)[:, :, None].expand_as(hidden)), -1)
    context = model.attention_context(tokens)
    want = plain.hyper_block(module.block, STREAMS, module.proj(joined), context)
    close(module(hidden, embedded, context)[0], want)


def plant_prediction_from_the_collapsed_state(mp):
    original = HyperMTPModule.forward

    def forward(self, hidden, embedding, context, cache=None):
        return original(self, hidden.mean(2, keepdim=True).expand_as(hidden), embedding, context, cache)

    mp.setattr(HyperMTPModule, "forward", forward)


# The router of V4 --------------------------------------------------------------------------------------------------


def check_affinity_is_the_root_of_softplus():
    config = NANO.replace(scoring_func="sqrtsoftplus", n_group=1, topk_group=1)
    router, x = build(config).layers[1].ffn.router, 3 * random_stream(1, 9, 64)
    close(router(x).scores, (1 + (x @ router.weight.T).exp()).log().sqrt(), 1e-6)


def plant_softplus_without_the_root(mp):
    mp.setitem(moe.AFFINITIES, "sqrtsoftplus", torch.nn.functional.softplus)


def plant_sigmoid_kept(mp):
    mp.setattr(Router, "scores", lambda self, x: (x @ self.weight.T).sigmoid())


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (1, check_block_is_the_formula, {
        "post without the factor 2": plant_post_without_the_factor_2,
        "post with eps": plant_post_with_eps,
        "pre without eps": plant_pre_without_eps,
        "columns and rows exchanged": plant_columns_and_rows_exchanged,
        "rows last": plant_rows_last,
        "one iteration more": plant_one_iteration_more,
        "softmax alone": plant_softmax_alone,
        "free mixing": plant_free_mixing,
        "norm per stream": plant_norm_per_stream,
        "norm after the projection": plant_norm_after_the_projection,
        "no norm": plant_no_norm,
        "norm before the collapse": plant_sublayer_before_its_norm,
        "one site per layer": plant_one_site_per_layer,
    }),
    (2, check_end_is_the_weighted_sum, {
        "mean of the streams": plant_mean_of_the_streams,
        "first stream alone": plant_first_stream_alone,
        "no norm": plant_no_norm,
    }),
    (3, check_prediction_reads_every_stream, {"collapsed state": plant_prediction_from_the_collapsed_state}),
    (4, check_affinity_is_the_root_of_softplus, {
        "softplus without the root": plant_softplus_without_the_root,
        "sigmoid kept": plant_sigmoid_kept,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
