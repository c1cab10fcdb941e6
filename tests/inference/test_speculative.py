"""PITFALLS 19 and 20: drafting uses the hidden state of training, and whatever the drafts are, nothing is lost."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inference.test_generate import GREEDY, PROMPTS, decided
from training.helpers import RECIPE, counting_data, nano

from minids.inference import speculative
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import Acceptance, generate_speculatively, verify
from minids.model.mtp import MTPModule
from minids.training.pretrain import train


@pytest.fixture(scope="module")
def counter():
    """A small model with three prediction depths that has learned to count."""
    torch.manual_seed(0)
    model = nano(num_nextn_predict_layers=3)
    recipe = RECIPE.__class__(steps=150, batch_size=8, seq_len=48, learning_rate=1e-2, warmup_steps=10)
    data = counting_data()
    train(model, data, recipe, progress=False)
    return model.eval(), data.tokenizer


def prompts_of(tokenizer):
    return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("one two th", "five", "nine ten one two three fo")]


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_greedy_is_lossless_on_random_models(depths):
    """Every draft wrong, nearly: prompts of every length, stops, and rejected drafts in every cache."""
    model = decided(num_nextn_predict_layers=depths)
    plain = generate(model, PROMPTS, max_new_tokens=25, sampling=GREEDY, stop=[PROMPTS[0][0]])
    fast, acceptance = generate_speculatively(model, PROMPTS, max_new_tokens=25, sampling=GREEDY, stop=[PROMPTS[0][0]])
    assert fast == plain
    assert acceptance.rounds > 0


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_greedy_sequence_equals_plain_decoding_and_the_general_loop(prompt, monkeypatch):
    """Same tokens, same drafts accepted; with a stop inside a round, and on a model that accepts some drafts."""
    model = decided(num_nextn_predict_layers=1)
    with torch.no_grad():  # few different tokens, so that some drafts are accepted
        model.head.weight[6:] = -1e3 * model.head.weight[:1].abs()
    plain = generate(model, [prompt], max_new_tokens=40, sampling=GREEDY)
    fast, acceptance = generate_speculatively(model, [prompt], max_new_tokens=40, sampling=GREEDY)
    assert fast == plain
    stopped, _ = generate_speculatively(model, [prompt], max_new_tokens=40, sampling=GREEDY, stop=[plain[0][5]])
    assert stopped == generate(model, [prompt], max_new_tokens=40, sampling=GREEDY, stop=[plain[0][5]])
    twice, general = generate_speculatively(model, [prompt] * 2, max_new_tokens=40, sampling=GREEDY)
    assert twice == plain * 2
    assert (2 * acceptance.rounds, 2 * acceptance.accepted[0]) == (general.rounds, general.accepted[0])


def test_greedy_is_lossless_and_fast_on_a_trained_model(counter):
    model, tokenizer = counter
    prompts = prompts_of(tokenizer)
    plain = generate(model, prompts, max_new_tokens=60, sampling=GREEDY)
    fast, acceptance = generate_speculatively(model, prompts, max_new_tokens=60, sampling=GREEDY)
    assert fast == plain
    assert acceptance.rate(1) > 0.8 and acceptance.rate(3) > 0.5
    assert acceptance.rate(1) >= acceptance.rate(2) >= acceptance.rate(3)
    assert acceptance.tokens_per_round > 2.5
    assert "four five six" in tokenizer.decode(fast[0])


def test_the_length_limit_and_the_stop_hold_inside_a_round(counter):
    model, tokenizer = counter
    prompt = prompts_of(tokenizer)[:1]
    whole = generate(model, prompt, max_new_tokens=30, sampling=GREEDY)[0]
    for limit in range(1, 9):
        assert generate_speculatively(model, prompt, max_new_tokens=limit, sampling=GREEDY)[0][0] == whole[:limit]
    stop = tokenizer.encode(" ")
    end = whole.index(stop[0]) + 1
    assert generate_speculatively(model, prompt, max_new_tokens=30, sampling=GREEDY, stop=stop)[0][0] == whole[:end]


def test_sampled_text_has_the_distribution_of_plain_decoding(counter):
    """Chi-squared on the third token of many short samples; drafts are made at another sharpness than the model's."""
    model, tokenizer = counter
    prompt, many, sampling = prompts_of(tokenizer)[1], 4000, Sampling(2.5)
    plain = generate(model, [prompt] * many, max_new_tokens=3, sampling=sampling)
    fast, acceptance = generate_speculatively(model, [prompt] * many, max_new_tokens=3, sampling=sampling)
    assert 0.1 < acceptance.rate(1) < 0.95  # both branches are taken
    for place in range(3):
        drawn = (torch.tensor([tokens[place] for tokens in sample]) for sample in (plain, fast))
        counts = torch.stack([torch.bincount(tokens, minlength=272) for tokens in drawn])
        assert two_sample_p_value(counts) > 1e-4, place


def two_sample_p_value(counts):
    """Of the chi-squared statistic for two samples of equal size; rare values share one cell."""
    rare = counts.sum(0) < 20
    counts = torch.cat((counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)), 1).double()
    counts = counts[:, counts.sum(0) > 0]
    statistic = ((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum()
    freedom = torch.tensor(counts.shape[1] - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), depths=st.integers(1, 3))
def test_verification_settles_tokens_of_the_right_distribution(seed, depths):
    """Of any drafts q and any targets p, the first settled token is distributed as p."""
    generator = torch.Generator().manual_seed(seed)
    q = (2 * torch.randn(1, depths, 5, generator=generator)).softmax(-1)
    p = (2 * torch.randn(1, depths + 1, 5, generator=generator)).softmax(-1)
    many = 20000
    drafts = torch.multinomial(q[0], many, replacement=True, generator=generator).T
    settled, count = verify(drafts, q.expand(many, -1, -1), p.expand(many, -1, -1), generator)
    shares = torch.bincount(settled[:, 0], minlength=5) / many
    torch.testing.assert_close(shares, p[0, 0], atol=0.02, rtol=0)
    expected_acceptance = torch.minimum(p[0, 0], q[0, 0]).sum()
    assert ((count > 1).float().mean() - expected_acceptance).abs() < 0.02


def test_greedy_verification_is_exact():
    p = torch.eye(4)[None, [2, 1, 3]]
    settled, count = verify(torch.tensor([[2, 0]]), torch.eye(4)[None, [2, 0]], p)
    assert count.tolist() == [2] and settled[0, :2].tolist() == [2, 1]
    settled, count = verify(torch.tensor([[2, 1]]), torch.eye(4)[None, [2, 1]], p)
    assert count.tolist() == [3] and settled[0].tolist() == [2, 1, 3]


def test_accepting_without_verification_would_be_caught(monkeypatch):
    """PITFALLS 20, planted: drafts are accepted by their own confidence."""

    def trusting(drafts, draft_chances, chances, generator=None):
        final = chances[:, -1].argmax(-1, keepdim=True)
        return torch.cat((drafts, final), 1), torch.full((len(drafts),), drafts.shape[1] + 1)

    monkeypatch.setattr(speculative, "verify", trusting)
    with pytest.raises(AssertionError):
        test_greedy_is_lossless_on_random_models(1)


def test_drafting_from_another_hidden_state_than_trained_would_be_caught(counter, monkeypatch):
    """PITFALLS 19, planted: the text stays right and only the acceptance falls, so the acceptance must be watched."""
    original = MTPModule.forward
    monkeypatch.setattr(MTPModule, "forward", lambda self, hidden, *rest: original(self, hidden.roll(1, -1), *rest))
    model, tokenizer = counter
    prompts = prompts_of(tokenizer)
    fast, acceptance = generate_speculatively(model, prompts, max_new_tokens=60, sampling=GREEDY)
    assert fast == generate(model, prompts, max_new_tokens=60, sampling=GREEDY)
    assert acceptance.rate(1) < 0.6


def test_drafts_are_what_training_predicts(counter):
    """The modules with their caches, a token at a time, equal one pass over the whole text (PITFALLS 18)."""
    model, tokenizer = counter
    prompt = prompts_of(tokenizer)[2]
    text = prompt + generate(model, [prompt], max_new_tokens=30, sampling=GREEDY)[0]
    expected = model(torch.tensor([text]), mtp=True).mtp_logits[0][0].argmax(-1)
    sequences = speculative._Sequences(model, [prompt], slots=64)
    window = len(prompt)
    with torch.inference_mode():
        for position in range(len(prompt) - 1, len(text) - 2):
            sequences.settle(torch.tensor([[text[position + 1]]]), torch.tensor([1]))
            drafts, _ = sequences.draft(window, GREEDY, None)
            assert drafts[0, 0] == expected[position]
            sequences.read(drafts)
            window = 6


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_draft_window_reaches_every_position_that_changed(depths):
    """With every draft accepted, the modules with their caches give the distributions of a full pass, to rounding."""
    model = decided(num_nextn_predict_layers=depths).double().eval()
    sequences = speculative._Sequences(model, [PROMPTS[1]], slots=60)
    sequences.settle(torch.tensor([[3]]), torch.tensor([1]))
    window = len(PROMPTS[1])
    with torch.inference_mode():
        for round in range(5):
            text = sequences.tokens[:, : int(sequences.known)]
            expected = model(text, mtp=True).mtp_logits[0][0, -1].softmax(-1)
            drafts, chances = sequences.draft(window, Sampling(), torch.Generator().manual_seed(round))
            torch.testing.assert_close(chances[0, 0], expected, atol=1e-10, rtol=0)
            sequences.read(drafts)
            own = torch.tensor([[round + 5]])  # the token that the model adds itself
            sequences.settle(torch.cat((drafts, own), 1), torch.tensor([depths + 1]))
            window = speculative.draft_window(depths)


def test_acceptance_counts():
    acceptance = Acceptance(rounds=10, accepted=[8, 4])
    assert acceptance.rate(1) == 0.8 and acceptance.rate(2) == 0.4
    assert acceptance.tokens_per_round == pytest.approx(2.2)


def test_a_model_without_modules_is_refused():
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        generate_speculatively(decided(num_nextn_predict_layers=0), PROMPTS, max_new_tokens=3)
