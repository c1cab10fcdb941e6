"""A round as one function drafts and verifies as the model and its module do: same tokens, same distribution."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from inference.test_fused import model_of
from inference.test_generate import GREEDY, decided
from inference.test_speculative import two_sample_p_value
from test_any_config import fields

from minids.config import ModelConfig
from minids.inference import speculative
from minids.inference.compiled import package_path
from minids.inference.fused import FusedStep
from minids.inference.fused_round import FusedRound
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively


@torch.inference_mode()
def by_rounds(model, prompts, sampling=GREEDY, stop=(), new_tokens=20, size=None, generator=None):
    """Generate by `FusedRound` without compiling it."""
    options = new_tokens, sampling, stop, generator, FusedRound(model), size or len(prompts)
    return speculative._by_compiled_rounds(model, prompts, *options)


PROMPTS = [[1, 2, 3, 4, 5, 0, 1], [2], [3, 3, 1, 0]]


def choosy(**changes):
    """A model with few different tokens, so that some drafts are accepted."""
    return model_of(ModelConfig.preset("nano", vocab_size=6, **changes), dtype=torch.float64)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=fields())
def test_greedy_rounds_of_any_config_give_the_tokens_of_plain_decoding(fields):
    """In float64, where no rounding can change the choice of experts; a prompt of one token, and padding."""
    try:
        config = ModelConfig(**fields | {"attention": "mla", "num_nextn_predict_layers": 1, "index_topk": None})
    except ValueError:
        assume(False)
    model = model_of(config)
    prompts = [torch.randint(config.vocab_size, (n,)).tolist() for n in (1, 4, 2)]
    assume(config.max_position_embeddings >= 4 + 6 + 1)
    plain = generate(model, prompts, max_new_tokens=6, sampling=GREEDY)
    assert by_rounds(model, prompts, new_tokens=6, size=4)[0] == plain


def test_greedy_rounds_accept_the_drafts_that_the_general_loop_accepts():
    model = choosy()
    fast, acceptance = by_rounds(model, PROMPTS)
    general, expected = generate_speculatively(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    assert fast == general == generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    assert (acceptance.rounds, acceptance.accepted) == (expected.rounds, expected.accepted)
    assert 0 < acceptance.accepted[0] < acceptance.rounds


def test_stops_and_limits_hold_inside_a_round():
    model = choosy()
    whole = generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    for stop in (whole[0][3], whole[1][6]):
        expected = generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY, stop=[stop])
        assert by_rounds(model, PROMPTS, stop=[stop])[0] == expected
    for limit in range(1, 6):
        assert by_rounds(model, PROMPTS, new_tokens=limit)[0] == [tokens[:limit] for tokens in whole]


@pytest.mark.parametrize("sampling", [Sampling(1.5), Sampling(0.8, top_p=0.7)])
def test_sampled_rounds_have_the_distribution_of_plain_decoding(sampling):
    """Chi-squared on each of three tokens of many texts; both branches of the verification are taken."""
    torch.manual_seed(2)
    model = model_of(ModelConfig.preset("nano", vocab_size=6, first_k_dense_replace=3), seed=2, dtype=torch.float32)
    with torch.no_grad():
        model.head.weight.mul_(6)
    prompt, many = [0, 1], 4000
    plain = generate(model, [prompt] * many, max_new_tokens=3, sampling=sampling)
    fast, acceptance = by_rounds(model, [prompt] * many, sampling, new_tokens=3)
    assert 0.1 < acceptance.rate() < 0.95
    for place in range(3):
        drawn = (torch.tensor([tokens[place] for tokens in texts]) for texts in (plain, fast))
        counts = torch.stack([torch.bincount(tokens, minlength=6) for tokens in drawn])
        assert two_sample_p_value(counts) > 1e-4, place


def test_trusting_the_draft_would_be_caught(monkeypatch):
    monkeypatch.setattr(speculative, "_matches", lambda draft, own: True)
    with pytest.raises(AssertionError):
        test_greedy_rounds_accept_the_drafts_that_the_general_loop_accepts()


def test_compiled_rounds_give_the_tokens_of_plain_decoding(tmp_path, monkeypatch):
    """One sequence, and three in a batch of four: one package each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = choosy(num_hidden_layers=1, first_k_dense_replace=0).float()
    options = dict(max_new_tokens=12, sampling=GREEDY)
    plain = generate(model, PROMPTS, **options)
    assert generate_speculatively(model, PROMPTS[:1], compiled=True, **options)[0] == plain[:1]
    assert generate_speculatively(model, PROMPTS, compiled=True, **options)[0] == plain
    assert len(list((tmp_path / "minids").iterdir())) == 2


def test_a_round_and_a_step_are_different_packages():
    model = choosy()
    assert len({package_path(model, size, kind) for size in (1, 4) for kind in (FusedStep, FusedRound)}) == 4


def test_rounds_need_exactly_one_module():
    with pytest.raises(ValueError, match="num_nextn_predict_layers=2: the compiled round drafts with one module"):
        generate_speculatively(decided(num_nextn_predict_layers=2), PROMPTS, max_new_tokens=3, compiled=True)
