import pytest
import torch

from minids.config import ModelConfig
from minids.inference.generate import Sampling, generate, prefill, stream
from minids.model.transformer import MiniDS

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [11, 12, 13]]
GREEDY = Sampling(temperature=0.0)


def decided(**changes) -> MiniDS:
    """A random model that is sure of itself: its best token leads by far more than rounding."""
    torch.manual_seed(3)
    model = MiniDS(ModelConfig.preset("nano", **changes)).eval()
    with torch.no_grad():
        model.head.weight.mul_(50)
    return model


def without_cache(model: MiniDS, prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"attention": "gqa", "num_key_value_heads": 1}, {"q_lora_rank": None}])
@pytest.mark.parametrize("prefill_chunk", [None, 1, 4])
def test_greedy_equals_decoding_without_a_cache(changes, prefill_chunk):
    """Batched, with prompts of different length, prefilled in chunks of any size."""
    model = decided(**changes)
    expected = [without_cache(model, prompt, 12) for prompt in PROMPTS]
    options = dict(max_new_tokens=12, sampling=GREEDY, prefill_chunk=prefill_chunk)
    assert generate(model, PROMPTS, **options) == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


def test_each_sequence_stops_by_itself():
    model = decided()
    free = generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    stop = free[0][3]
    stopped = generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY, stop=[stop])
    for whole, cut in zip(free, stopped, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert cut == whole[:end]
    assert len({len(tokens) for tokens in stopped}) > 1


def test_prefill_keeps_the_true_lengths():
    model = decided()
    cache = model.new_cache(len(PROMPTS), 16)
    hidden, tokens = prefill(model, PROMPTS, cache)
    assert cache.lengths.tolist() == [5, 1, 9, 3] and cache.longest == 9
    assert tokens.shape == (4, 9) and hidden.shape == (4, 9, 64)
    alone = model.trunk(torch.tensor([PROMPTS[3]]))[0]
    torch.testing.assert_close(hidden[3, :3], alone[0], atol=1e-5, rtol=1e-5)


def test_a_seed_fixes_the_draw():
    model = decided()

    def draw(seed):
        return generate(model, PROMPTS, max_new_tokens=8, generator=torch.Generator().manual_seed(seed))

    assert draw(0) == draw(0) != draw(1)


def test_stream_yields_what_generate_collects():
    model = decided()
    steps = list(stream(model, PROMPTS, max_new_tokens=5, sampling=GREEDY))
    assert [alive for alive, _, _ in steps] == [[0, 1, 2, 3]] * 5
    collected = [[drawn[i] for _, drawn, _ in steps] for i in range(4)]
    assert collected == generate(model, PROMPTS, max_new_tokens=5, sampling=GREEDY)


def test_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    torch.testing.assert_close(Sampling().probabilities(logits), logits.softmax(-1))
    torch.testing.assert_close(Sampling(0.5).probabilities(logits), (logits / 0.5).softmax(-1))
    assert GREEDY.probabilities(logits).tolist() == [[1, 0, 0, 0]]
    kept = torch.tensor([[2.0, 1.0]]).softmax(-1)  # 0.64 alone is short of 0.7, with 0.24 it is enough
    nucleus = Sampling(top_p=0.7).probabilities(logits)
    torch.testing.assert_close(nucleus[:, :2], kept)
    assert nucleus[0, 2:].tolist() == [0, 0]
    assert Sampling(top_p=0.01).probabilities(logits).tolist() == [[1, 0, 0, 0]]


def test_top_p_reached_exactly_keeps_no_further_token():
    """Four equal tokens of a quarter each, exactly: two of them are a half."""
    kept = Sampling(top_p=0.5).probabilities(torch.zeros(1, 4))
    assert sorted(kept[0].tolist()) == pytest.approx([0, 0, 0.5, 0.5])


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    drawn, logps = Sampling(0.8).draw(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(shares, (logits[0] / 0.8).softmax(-1), atol=0.015, rtol=0)
    torch.testing.assert_close(logps, (logits[0] / 0.8).log_softmax(-1)[drawn])


def test_log_probabilities_of_draws_are_those_of_the_cut_distribution():
    """With top_p the tokens that are left share the whole probability; a greedy token is certain."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    token, logp = Sampling(top_p=0.7).draw(logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(logp, torch.tensor([2.0, 1.0]).log_softmax(-1)[token])
    assert GREEDY.draw(logits)[1].tolist() == [0.0]


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1] * 60], 5, "prompt 0 has 60 tokens, max_new_tokens=5: the context holds 64"),
        ([[1], []], 5, "prompt 1 is empty"),
        ([], 5, "at least one"),
        ([[1, 272]], 5, "token 272: the vocabulary has 272"),
        ([[-1]], 5, "token -1: the vocabulary has 272"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_bad_prompts_are_named(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(decided(max_position_embeddings=64), prompts, max_new_tokens=new)


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_bad_sampling_is_refused(temperature, top_p):
    with pytest.raises(ValueError, match="temperature=|top_p="):
        Sampling(temperature, top_p)
