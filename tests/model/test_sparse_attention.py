"""DSA: indexer, choice, attention and losses against loops; with the cache, at ties, and where k exceeds the length."""

import plain_indexer as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_indexer import SPARSE, model_of, weights_of
from plain_model import NANO, build, random_stream, random_tokens, through_cache, without_cache

from minids.config import ModelConfig, YaRN
from minids.inference.fused import FusedStep
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively
from minids.model.kv_cache import IndexerTraining
from minids.model.mla import MultiHeadLatentAttention
from minids.model.sparse_attention import SparseLatentAttention, choose, indexer_loss, set_trained_parameters
from minids.model.transformer import MiniDS

LENGTH = 11
SHAPES = {
    "k 4 of 11": {},
    "one key": dict(index_topk=1),
    "index head as wide as the rotated part": dict(index_head_dim=8),
    "YaRN": dict(rope_scaling=YaRN(original_max_position_embeddings=64, factor=8.0)),
}
GREEDY = Sampling(temperature=0)


def context_of(model, length=LENGTH, indexer=None):
    return model.attention_context(torch.zeros(1, length, dtype=torch.int64), indexer=indexer)


def scores_of(model, x):
    """Index scores of the first layer for a sequence without a cache."""
    attention, context = model.layers[0].attention, context_of(model, x.shape[1])
    return attention.indexer.scores(x, attention.query_latent(x), attention.indexer.key(x, context), context)


# Parts against loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_scores_choice_and_output_equal_the_loops(changes):
    model, x = model_of(**changes), random_stream(1, LENGTH, 64)
    attention, config = model.layers[0].attention, model.config
    w = weights_of(attention)
    scores, keys = plain.index_scores(w, config, x[0])
    torch.testing.assert_close(scores_of(model, x)[0], scores, atol=1e-10, rtol=0)
    attended = plain.chosen(scores.tolist(), config.index_topk)
    visible = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = choose(scores[None], visible, config.index_topk)[0]
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == attended
    want = plain.sparse_attention(w, config, x[0], attended)
    torch.testing.assert_close(without_cache(model, x)[0], want, atol=1e-10, rtol=0)
    out, cached = through_cache(model, x, [LENGTH])
    torch.testing.assert_close(out[0], want, atol=1e-10, rtol=0)
    torch.testing.assert_close(cached[0, :, -config.index_head_dim :], keys, atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_choice_matters():
    """Else nothing above would be tested: most rows attend to other tokens than the last k."""
    scores = scores_of(model_of(), random_stream(1, LENGTH, 64))[0]
    attended = plain.chosen(scores.tolist(), SPARSE.index_topk)
    rows = range(SPARSE.index_topk, LENGTH)
    assert sum(attended[t] != set(range(t - SPARSE.index_topk + 1, t + 1)) for t in rows) > len(rows) / 2
    assert (scores < 0).any() and (scores > 0).any()


@pytest.mark.parametrize("stage", ["dense_warmup", "sparse"])
def test_indexer_loss_equals_the_loops(stage):
    """Stage 1: all visible tokens. Stage 2: the chosen ones, with a target that is normalised over them."""
    model, x = model_of(), random_stream(1, LENGTH, 64)
    w, training = weights_of(model.layers[0].attention), IndexerTraining(stage)
    model.layers[0].attention(x, context_of(model, indexer=training))
    attended = [set(range(t + 1)) for t in range(LENGTH)]
    if stage == "sparse":
        attended = plain.chosen(plain.index_scores(w, SPARSE, x[0])[0].tolist(), SPARSE.index_topk)
    (loss,) = training.losses
    assert loss.item() == pytest.approx(plain.indexer_loss(w, SPARSE, x[0], attended), abs=1e-10)
    assert loss > 0.01


def test_indexer_loss_of_two_tokens_by_hand():
    scores = torch.tensor([[[0.0, 9.0], [1.0, 1.0]]])
    target = torch.tensor([[[1.0, 0.0], [0.75, 0.25]]])
    attended = torch.tensor([[[True, False], [True, True]]])
    by_hand = (0 + 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()) / 2
    torch.testing.assert_close(indexer_loss(scores, target, attended), by_hand)


# The choice -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6), min_size=6, max_size=6),
    k=st.integers(1, 8),
)
def test_any_choice_is_the_k_best_visible_ones_and_the_earlier_at_a_tie(rows, k):
    visible = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    mask = choose(torch.tensor([rows]), visible, k)[0]
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == plain.chosen(rows, k)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_with_k_at_least_the_length_it_is_dense(dtype, tolerance):
    dense, tokens = build(NANO, dtype), random_tokens(2, LENGTH)
    sparse = model_of(dtype, index_topk=LENGTH)
    sparse.load_state_dict(dense.state_dict(), strict=False)
    want = dense(tokens).logits
    torch.testing.assert_close(sparse(tokens).logits, want, atol=tolerance, rtol=0)
    cache = sparse.new_cache(2, LENGTH)
    parts = [sparse(part, cache=cache).logits for part in tokens.split([6, 1, 3, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=tolerance, rtol=0)


@torch.no_grad()
def test_later_tokens_change_nothing():
    model, tokens = model_of(), random_tokens(1, LENGTH)
    other = torch.cat((tokens[:, :6], random_tokens(1, LENGTH - 6, seed=9)), 1)
    torch.testing.assert_close(model(other).logits[:, :6], model(tokens).logits[:, :6], atol=0, rtol=0)


# The cache ------------------------------------------------------------------------------------------------------------

FEW_HEADS = dict(index_n_heads=2, index_topk=3)


@torch.no_grad()
def test_few_heads_do_have_ties_at_zero():
    """A tie at the cut lets two correct implementations choose differently; here the earlier token is chosen."""
    model, x = model_of(**FEW_HEADS), random_stream(1, 24, 64)
    scores = scores_of(model, x)[0]
    ties = 0
    for t in range(3, 24):
        best = scores[t, : t + 1].sort(descending=True).values
        ties += int(best[2] == best[3] == 0)
    assert ties > 0


@pytest.mark.parametrize("changes", [{}, FEW_HEADS], ids=["16 heads", "ties"])
@settings(deadline=None, max_examples=8)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6))
@torch.no_grad()
def test_chunks_of_any_size_equal_the_whole(changes, sizes):
    model, tokens = model_of(**changes), random_tokens(2, sum(sizes))
    whole, cache = model(tokens).logits, model.new_cache(2, sum(sizes))
    parts = torch.cat([model(part, cache=cache).logits for part in tokens.split(sizes, 1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("changes", [{}, FEW_HEADS], ids=["16 heads", "ties"])
@torch.no_grad()
def test_token_by_token_equals_the_whole_in_float32(changes):
    model, tokens = model_of(torch.float32, **changes), random_tokens(2, 30)
    cache = model.new_cache(2, 30)
    parts = torch.cat([model(part, cache=cache).logits for part in tokens.split(1, 1)], 1)
    torch.testing.assert_close(parts, model(tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_sequences_of_different_length_share_a_batch_while_tokens_are_fetched():
    """A short sequence has fewer than k entries where a long one has more: what it fetches beyond them is masked."""
    model, lengths = model_of(), [1, 3, 9]
    padded, following = random_tokens(3, 9), random_tokens(3, 6, seed=5)
    cache = model.new_cache(3, 15)
    model(padded, cache=cache)
    cache.truncate(torch.tensor(lengths))
    went_on = torch.cat([model(part, cache=cache).logits for part in following.split(1, 1)], 1)
    for row, length in enumerate(lengths):
        alone = model(torch.cat((padded[row, :length], following[row]))[None]).logits[0]
        torch.testing.assert_close(went_on[row], alone[length:], atol=1e-9, rtol=0)


@torch.no_grad()
def test_one_query_attends_to_k_entries_only(monkeypatch):
    model, seen = model_of(), []
    absorbed = MultiHeadLatentAttention.absorbed

    def spy(self, query, entries, mask):
        seen.append(entries.shape[1])
        return absorbed(self, query, entries, mask)

    monkeypatch.setattr(MultiHeadLatentAttention, "absorbed", spy)
    cache = model.new_cache(1, 20)
    model(random_tokens(1, 19), cache=cache)
    seen.clear()
    model(random_tokens(1, 1), cache=cache)
    assert seen == [SPARSE.index_topk] * SPARSE.num_hidden_layers


def test_the_cache_holds_one_index_key_more_than_that_of_mla():
    with torch.device("meta"):
        attention = SparseLatentAttention(ModelConfig.preset("v3_2"))
    assert attention.cache_width == 576 + 128
    assert sum(p.numel() for p in attention.parameters()) == 187_107_328 + 13_959_424


# Gradients ------------------------------------------------------------------------------------------------------------


def test_the_indexer_learns_from_its_own_loss_only_and_the_model_from_its_own():
    model, training = model_of(), IndexerTraining("sparse")
    out = model(random_tokens(2, LENGTH), mtp=True, indexer=training)
    assert len(out.indexer_losses) == SPARSE.num_hidden_layers + SPARSE.num_nextn_predict_layers
    indexers = {name: p for name, p in model.named_parameters() if ".indexer." in name}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in indexers}

    def gradients(loss, parameters):
        return torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)

    assert all(g is None for g in gradients(sum(out.indexer_losses), others))
    assert all(g.abs().max() > 0 for g in gradients(sum(out.indexer_losses), indexers))
    assert all(g is None for g in gradients(out.logits.sum() + out.mtp_logits[0].sum(), indexers))


def test_warm_up_attends_to_everything_and_trains_the_indexers_alone():
    model, tokens = build(SPARSE), random_tokens(2, LENGTH)
    dense = build(NANO)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".indexer." not in k})
    set_trained_parameters(model, "dense_warmup")
    out = model(tokens, indexer=IndexerTraining("dense_warmup"))
    with torch.no_grad():
        torch.testing.assert_close(out.logits, dense(tokens).logits, atol=1e-12, rtol=0)
    assert not out.logits.requires_grad
    sum(out.indexer_losses).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "layers." in name and ".indexer." in name}
    set_trained_parameters(model, "sparse")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        n for n, _ in model.named_parameters() if n.endswith("router.bias")
    ]


@pytest.mark.parametrize("stage", ["dense_warmup", "sparse"])
def test_gradient_of_the_loss_is_that_of_finite_differences(stage):
    model, x = model_of(), random_stream(1, 7, 64)
    attention = model.layers[0].attention

    def loss():
        training = IndexerTraining(stage)
        attention(x, context_of(model, 7, training))
        return training.losses[0]

    for name in ("k_norm.bias", "head_weights", "q_proj.weight"):
        weight = attention.indexer.get_parameter(name)
        (gradient,) = torch.autograd.grad(loss(), weight)
        place = torch.unravel_index(gradient.abs().argmax(), gradient.shape)
        with torch.no_grad():
            weight[place] += 1e-6
            above = loss()
            weight[place] -= 2e-6
            slope = (above - loss()) / 2e-6
            weight[place] += 1e-6
        assert slope.item() == pytest.approx(gradient[place].item(), rel=1e-4)


def test_scores_are_float32_in_a_bfloat16_model_and_under_autocast():
    model = MiniDS(SPARSE)
    x = random_stream(1, LENGTH, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert scores_of(model, x).dtype == torch.float32
    assert scores_of(model.bfloat16(), x.bfloat16()).dtype == torch.float32
    assert model(random_tokens(1, LENGTH)).logits.dtype == torch.bfloat16


# Generation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_text_is_that_of_full_passes():
    model, prompt = model_of(), random_tokens(1, 7)[0].tolist()
    (text,) = generate(model, [prompt], max_new_tokens=9, sampling=GREEDY)
    for n in range(9):
        assert model(torch.tensor([prompt + text[:n]])).logits[0, -1].argmax() == text[n]
    both = generate(model, [prompt, prompt[:2]], max_new_tokens=9, sampling=GREEDY, prefill_chunk=3)
    assert both[0] == text and both[1] == generate(model, [prompt[:2]], max_new_tokens=9, sampling=GREEDY)[0]


def test_speculative_decoding_generates_the_same_text():
    model, prompts = model_of(), [random_tokens(1, 6)[0].tolist(), [3, 1]]
    for some in (prompts, prompts[:1]):
        drafted, _ = generate_speculatively(model, some, max_new_tokens=8, sampling=GREEDY)
        assert drafted == generate(model, some, max_new_tokens=8, sampling=GREEDY)


def test_the_fused_step_refuses_it():
    with pytest.raises(ValueError, match="^index_topk=4: the fused step has None only; decode without compiled$"):
        FusedStep(MiniDS(SPARSE))
    with pytest.raises(ValueError, match="index_topk=4"):
        generate(MiniDS(SPARSE), [[1]], max_new_tokens=1, compiled=True)
