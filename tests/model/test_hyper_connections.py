"""Hyper-connections: the constraint, the plain residual connection as a special case, the whole model on n streams."""

import plain_streams as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import NANO, build, random_stream, random_tokens

from minids.config import EngramConfig
from minids.inference.fused import check_model
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively
from minids.model.hyper_connections import HyperConnection, read_streams, sinkhorn, write_streams
from minids.model.transformer import MiniDS

STREAMS = NANO.replace(hc_mult=4)


def context(model, seq):
    return model.attention_context(torch.zeros(1, seq, dtype=torch.int64))


# The constraint ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 6), spread=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_sinkhorn_is_doubly_stochastic(n, spread, seed):
    """Columns exactly; rows in the limit. After V4's 20 iterations the worst of all these cases is 7.8e-4 off."""
    for iterations, tolerance in ((20, 1e-3), (300, 1e-12)):
        torch.manual_seed(seed)
        matrix = sinkhorn(spread * torch.randn(3, n, n, dtype=torch.float64), iterations, 0.0)
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(-2), torch.ones(3, n).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(3, n).double(), atol=tolerance, rtol=0)
        assert torch.linalg.matrix_norm(matrix, 2).max() <= 1 + tolerance  # mixing amplifies no stream


def test_sinkhorn_of_uneven_logits_needs_many_iterations():
    """Columns come last and are exact, rows are not: the gain of a product of such matrices stays above 1."""
    logits = 12 * torch.randn(200, 4, 4, dtype=torch.float64)
    off = {k: (sinkhorn(logits, k, 1e-6).sum(-1) - 1).abs().amax(-1).mean().item() for k in (1, 20, 100)}
    assert off[1] > 2 * off[20] > 4 * off[100] > 0
    assert (sinkhorn(logits, 1, 0.0).sum(-2) - 1).abs().max() < 1e-12
    attenuated = sinkhorn(logits, 1, 1e-6).sum(-2)  # a column of which the softmax left less than 1e-5
    assert attenuated.min() < 0.95 and attenuated.max() < 1 + 1e-12


def test_a_product_of_constrained_mixers_keeps_the_mean_of_the_streams():
    x = random_stream(4, 8)
    out = x
    for _ in range(50):
        out = sinkhorn(torch.randn(4, 4, dtype=torch.float64), 100, 0.0).mT @ out
    torch.testing.assert_close(out.mean(0), x.mean(0), atol=1e-9, rtol=0)


# Against the papers' formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_block_equals_the_plain_one(n):
    config = NANO.replace(hc_mult=n, hc_sinkhorn_iters=3)
    model, x = build(config), random_stream(1, 5, n, 64)
    for block in model.layers[:2]:  # a dense one and a mixture
        got, _ = block(x, context(model, 5))
        torch.testing.assert_close(got, plain.hyper_block(block, config, x, context(model, 5)), atol=1e-9, rtol=0)


def test_final_norm_equals_the_plain_one():
    model, x = build(STREAMS), random_stream(2, 3, 4, 64)
    want = plain.collapsed(model.norm, STREAMS, x)
    want = want / (want.square().mean(-1, keepdim=True) + STREAMS.rms_norm_eps).sqrt() * model.norm.weight
    torch.testing.assert_close(model.norm(x), want, atol=1e-9, rtol=0)


# The plain residual connection as a special case -------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [20, 0])
def test_model_starts_as_the_plain_one(iterations):
    """Without the part that depends on the token, equal streams stay equal and are the plain residual stream."""
    simple = build(NANO)
    model = MiniDS(STREAMS.replace(hc_sinkhorn_iters=iterations)).double()
    shared = simple.state_dict()
    unknown = model.load_state_dict(shared, strict=False)
    assert not unknown.unexpected_keys and all("connection" in name or "collapse" in name for name in
                                               unknown.missing_keys)  # fmt: skip
    tokens = random_tokens(2, 9)
    as_it_starts = model(tokens).logits
    for module in model.modules():
        if hasattr(module, "scale") and isinstance(module.scale, torch.nn.Parameter):
            module.scale.data.zero_()
    want = simple(tokens, mtp=True)
    got = model(tokens, mtp=True)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.mtp_logits[0], want.mtp_logits[0], atol=1e-4, rtol=0)
    assert (got.hidden - got.hidden[:, :, :1]).abs().max() < 1e-4
    assert 1e-3 < (as_it_starts - want.logits).abs().max() < 0.5


def test_one_stream_is_the_residual_connection():
    connection = HyperConnection(NANO.replace(hc_sinkhorn_iters=5)).double()
    connection.proj.data.normal_()
    connection.scale.data[:2] = 0  # reads and writes once; the mixing of one stream is 1 whatever its logit
    x, out = random_stream(3, 7, 1, 64), random_stream(3, 7, 64, seed=4)
    weights = connection.coefficients(x)
    torch.testing.assert_close(read_streams(x, weights.read), x[..., 0, :], atol=1e-4, rtol=0)
    torch.testing.assert_close(write_streams(x, out, weights), x + out[..., None, :], atol=1e-4, rtol=0)


def test_streams_become_different_in_training():
    model, tokens = MiniDS(STREAMS.replace(num_hidden_layers=2)), random_tokens(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(8):
        model(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean().neg().backward()
        if not _:
            idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and "mtp" not in n]
            assert not idle
        optimizer.step()
        optimizer.zero_grad()
    streams = model(tokens).hidden
    spread = (streams - streams.mean(2, keepdim=True)).square().mean().sqrt() / streams.square().mean().sqrt()
    assert spread > 0.008


# Precision, cache, counts ------------------------------------------------------------------------------------------


def test_coefficients_are_float32_in_a_model_of_16_bits():
    model = build(STREAMS, torch.float32).bfloat16()
    connection = model.layers[0].ffn_connection
    assert {p.dtype for p in connection.parameters()} == {torch.float32}
    assert {p.dtype for p in model.norm.collapse.parameters()} == {torch.float32}
    x = random_stream(1, 5, 4, 64, dtype=torch.bfloat16)
    weights = connection.coefficients(x)
    assert {w.dtype for w in weights} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        again = connection.coefficients(x)
    torch.testing.assert_close(again.mix, weights.mix, atol=0, rtol=0)
    out = model(random_tokens(1, 6), mtp=True)
    assert out.logits.dtype == out.hidden.dtype == torch.bfloat16
    assert {p.dtype for p in model.double().layers[0].ffn_connection.parameters()} == {torch.float64}


@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 1, 4)])
def test_cached_decoding_equals_the_whole(sizes):
    model, tokens = build(STREAMS), random_tokens(2, 9)
    cache = model.new_cache(2, 9)
    parts = [model.logits(model.trunk(part, cache)[0]) for part in tokens.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, atol=1e-9, rtol=0)
    assert cache.num_bytes() == build(NANO).new_cache(2, 9).num_bytes()  # streams are not cached


def test_speculative_decoding_writes_the_same_text():
    model, prompts = build(STREAMS).eval(), random_tokens(3, 5).tolist()
    plainly = generate(model, prompts, max_new_tokens=8, sampling=Sampling(0.0))
    for some in (slice(3), slice(1)):  # a batch, and the loop for one sequence
        drafted, _ = generate_speculatively(model, prompts[some], max_new_tokens=8, sampling=Sampling(0.0))
        assert drafted == plainly[some]


def test_parameters_added_by_the_streams():
    n, dim, sites = 4, 64, 2 * 3
    added = sites * ((2 * n + n * n) * (n * dim + 1) + 3) + n * (n * dim + 1) + 1
    assert MiniDS(STREAMS).num_parameters() - MiniDS(NANO).num_parameters() == added


@pytest.mark.parametrize("changes", [{"hc_mult": 4}, {"engram": EngramConfig(layers=(0,), rows=20, heads=1, dim=4)}])
def test_compiled_decoding_and_export_refuse_them(changes):
    (field,) = changes
    config = NANO.replace(**changes)
    with pytest.raises(ValueError, match=f"^{field}=.*fused step"):
        check_model(MiniDS(config))
    with pytest.raises(ValueError, match=f"^{field}=.*transformers"):
        config.to_hf()
