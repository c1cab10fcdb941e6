"""The output head in chunks: same loss, log-probabilities and gradients as from whole logits, with less memory."""

import pytest
import torch
import torch.nn.functional as F
from training.helpers import nano

from minids.cli.loss_memory import peaks
from minids.data.batches import Batch
from minids.reasoning import rollout
from minids.reasoning.rollout import token_logps
from minids.training import chunked_loss, loss
from minids.training.chunked_loss import in_chunks
from minids.training.live_bytes import LiveBytes
from minids.training.loss import IGNORED, LossDenominators, bits_per_byte, losses, summed_cross_entropy, targets

ROWS, SEQ = 3, 13  # 36 positions for the next token, 33 and 30 for those after it: multiples of no chunk but 1 and 3
EXACT = 1e-13  # float64: sums of some 36 terms of magnitude 1 in another order
SEVERAL = (1, 5, 12, 35)  # positions of a chunk


def batch_of(kind):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, (ROWS, SEQ), generator=generator)
    documents = torch.zeros_like(tokens)
    if kind == "documents":
        documents[:, 4:], documents[1, 9:] = 1, 2
    mask = {"loss mask": torch.rand(ROWS, SEQ, generator=generator) < 0.4, "no targets": torch.zeros(ROWS, SEQ) > 0}
    return Batch(tokens, documents, torch.zeros_like(tokens), mask.get(kind))


def limit(mp, positions):
    """Let a chunk have this many positions."""
    mp.setattr(chunked_loss, "LOGITS", 1)
    mp.setattr(chunked_loss, "POSITIONS", positions)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, wanted, tolerance=EXACT):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# Losses --------------------------------------------------------------------------------------------------------------


def whole_losses(model, batch):
    """Main and MTP loss from whole logits, with the denominators of the batch (V3 eq. 24)."""
    out = model(batch.tokens[:, :-1], mtp=True)
    count = LossDenominators.of(batch).targets
    sums = [
        F.cross_entropy(logits.flatten(0, 1), targets(batch, k).flatten(), ignore_index=IGNORED, reduction="sum")
        for k, logits in enumerate((out.logits, *out.mtp_logits))
    ]
    return sums[0] / count, sum(sums[1:], torch.zeros(())) / (count * max(len(sums) - 1, 1))


def check_losses(mp, kind="documents", depths=2, chunks=SEVERAL):
    model, batch = nano(num_nextn_predict_layers=depths, aux_loss_alpha=0.0).double(), batch_of(kind)
    main, mtp = whole_losses(model, batch)
    wanted = gradients(model, main + 0.3 * mtp)
    for positions in chunks:
        limit(mp, positions)
        terms = losses(model, model.states(batch.tokens[:, :-1], mtp=True), batch, LossDenominators.of(batch))
        torch.testing.assert_close(terms.main, main, atol=EXACT * SEQ, rtol=0)
        torch.testing.assert_close(terms.mtp, mtp.to(main), atol=EXACT * SEQ, rtol=0)
        assert_equal(gradients(model, terms.total(0.3)), wanted)


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("kind", ["one document", "documents", "loss mask", "no targets"])
def test_losses_and_gradients_equal_those_of_whole_logits(monkeypatch, kind, depths):
    check_losses(monkeypatch, kind, depths)


def test_one_chunk_is_computed_once_and_equals_whole_logits_to_the_bit(monkeypatch):
    head, states = torch.nn.Linear(16, 50, bias=False), torch.randn(36, 16)
    whole, products = head(states), []
    head.register_forward_hook(lambda *_: products.append(1))
    for positions, expected in ((36, 1), (35, 4)):  # two chunks: each forward, and again backward
        limit(monkeypatch, positions)
        products.clear()
        chunks = in_chunks(lambda logits: (logits, logits.exp().sum()), head, states)
        sum(total for _, total in chunks).backward()
        assert len(products) == expected
        assert positions < 36 or torch.equal(chunks[0][0], whole)


def test_float32_differs_by_rounding(monkeypatch):
    """Another order of a sum of n terms changes it by at most 2 n eps times the sum of their magnitudes.

    A chunk's product with the head may also be cut differently, which changes logits and gradients as much, by their
    own sums over `dim` and `vocab` terms.
    """
    dim, vocab, positions, eps = 24, 40, 331, torch.finfo(torch.float32).eps
    torch.manual_seed(1)
    head, states = torch.nn.Linear(dim, vocab, bias=False), torch.randn(1, positions, dim, requires_grad=True)
    labels = torch.randint(vocab, (1, positions)).masked_fill(torch.rand(1, positions) < 0.2, IGNORED)

    def computed():
        value = summed_cross_entropy(head, states, labels)
        return value, *torch.autograd.grad(value, (head.weight, states))

    whole = computed()
    limit(monkeypatch, 64)
    chunked = computed()
    logits = (states[0] @ head.weight.T).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels[0], reduction="sum"), logits)
    of_logits = 2 * dim * eps * (states[0].abs() @ head.weight.abs().T).max()  # of one logit, and so of one slope
    bounds = (
        positions * (2 * eps * whole[0] + 2 * of_logits),
        2 * positions * eps * (slope.abs().T @ states[0].abs()) + of_logits * states[0].abs().sum(0),
        2 * vocab * eps * (slope.abs() @ head.weight.abs()) + of_logits * head.weight.abs().sum(0),
    )
    for got, wanted, bound in zip(chunked, whole, bounds, strict=True):
        assert ((got - wanted).abs() <= bound).all()
        assert bound.max() < 1e-2 * wanted.abs().max()  # far from what a chunk weighs


def check_bfloat16(mp, chunks=64):
    """Equal chunks, so that their gradients add up, and a sum in bf16 loses more with every chunk.

    Gradients are rounded to bf16 (2^-9 of each), of whole logits once, in chunks each chunk's, and added in float32.
    """
    torch.manual_seed(1)
    head, states, labels = torch.nn.Linear(24, 40, bias=False), torch.randn(1, 4, 24), torch.randint(40, (1, 4))
    states, labels = states.repeat(1, chunks, 1), labels.repeat(1, chunks)

    def gradient():
        with torch.autocast("cpu", torch.bfloat16):
            value = summed_cross_entropy(head, states, labels)
        return torch.autograd.grad(value, head.weight)[0]

    whole = gradient()
    limit(mp, 4)
    assert ((gradient() - whole).abs() <= (2 * 2**-9 + 1e-5) * whole.abs() + 1e-6 * whole.abs().max()).all()


def test_gradients_of_chunks_add_up_in_float32_under_autocast(monkeypatch):
    check_bfloat16(monkeypatch)


def test_bits_per_byte_equal_those_of_whole_logits(monkeypatch):
    model, one_byte = nano().double(), torch.ones(272, dtype=torch.int64)
    wanted = bits_per_byte(model, [batch_of("documents")], one_byte)
    limit(monkeypatch, 5)
    assert bits_per_byte(model, [batch_of("documents")], one_byte) == pytest.approx(wanted, rel=1e-14)


# Log-probabilities ---------------------------------------------------------------------------------------------------


def check_log_probabilities(mp, chunks=SEVERAL, restricted=False):
    model, tokens, temperature = nano().double(), batch_of("one document").tokens, 0.7
    allowed = torch.rand(ROWS, SEQ - 1, 272) < 0.6 if restricted else torch.ones(ROWS, SEQ - 1, 272).bool()
    allowed = allowed.scatter(-1, tokens[:, 1:, None], True)
    p = (model(tokens[:, :-1]).logits / temperature).exp() * allowed
    p = p / p.sum(-1, keepdim=True)
    logp = p.gather(-1, tokens[:, 1:, None])[..., 0].log()
    entropy = -torch.where(allowed, p * p.clamp(min=1e-300).log(), 0).sum(-1)
    weights = torch.randn(ROWS, SEQ - 1, dtype=torch.float64)
    wanted = gradients(model, (weights * logp).sum())
    for positions in chunks:
        limit(mp, positions)
        got, got_entropy, _ = token_logps(model, tokens, temperature, None, allowed if restricted else None)
        torch.testing.assert_close(got, logp, atol=EXACT * SEQ, rtol=0)
        torch.testing.assert_close(got_entropy, entropy, atol=EXACT * SEQ, rtol=0)
        assert_equal(gradients(model, (weights * got).sum()), wanted, EXACT * SEQ)


@pytest.mark.parametrize("restricted", [False, True])
def test_log_probabilities_at_a_temperature_equal_those_of_whole_logits(monkeypatch, restricted):
    check_log_probabilities(monkeypatch, restricted=restricted)


# Planted mistakes ----------------------------------------------------------------------------------------------------


def plant_mean_of_the_means_of_chunks(mp):
    """A denominator per chunk: chunks with few targets weigh as much as those with many."""

    def mean_per_chunk(read, head, states, labels):
        sums = in_chunks(read, head, states, labels)
        counts = in_chunks(lambda _, some: (some >= 0).sum(), head, states, labels)
        count = (labels >= 0).sum()
        return [part / n.clamp(min=1) * count / len(sums) for part, n in zip(sums, counts, strict=True)]

    mp.setattr(loss, "in_chunks", mean_per_chunk)


def plant_last_partial_chunk_dropped(mp):
    def whole_chunks(read, head, states, *others):
        size = max(chunked_loss.POSITIONS, chunked_loss.LOGITS // head.out_features)
        whole = len(states) // size * size
        return in_chunks(read, head, *(column[:whole] for column in (states, *others)))

    mp.setattr(loss, "in_chunks", whole_chunks)


def plant_labels_of_the_first_chunk(mp):
    def same_labels(read, head, states, labels):
        size = max(chunked_loss.POSITIONS, chunked_loss.LOGITS // head.out_features)
        return in_chunks(read, head, states, labels[torch.arange(len(labels)) % size])

    mp.setattr(loss, "in_chunks", same_labels)


def plant_chunks_in_reverse(mp):
    mp.setattr(rollout, "in_chunks", lambda *arguments: in_chunks(*arguments)[::-1])


def plant_temperature_of_the_first_chunk_only(mp):
    def warm(read, head, states, *others):
        first, *later = in_chunks(read, head, states, *others)
        return [first, *((logp / 0.7, entropy) for logp, entropy in later)]

    mp.setattr(rollout, "in_chunks", warm)


def plant_cast_of_the_head_shared_by_all_chunks(mp):
    """As autocast does by itself."""
    mp.setattr(torch, "autocast", lambda device, *dtype, once=torch.autocast, **options: once(device, *dtype))


MISTAKES = {
    plant_mean_of_the_means_of_chunks: check_losses,
    plant_last_partial_chunk_dropped: check_losses,
    plant_labels_of_the_first_chunk: check_losses,
    plant_cast_of_the_head_shared_by_all_chunks: check_bfloat16,
    plant_chunks_in_reverse: check_log_probabilities,
    plant_temperature_of_the_first_chunk_only: check_log_probabilities,
}


@pytest.mark.parametrize("plant", MISTAKES)
def test_a_planted_mistake_is_caught(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        MISTAKES[plant](monkeypatch)


# Memory --------------------------------------------------------------------------------------------------------------

WORDS, WIDTH, POSITIONS = 32_768, 32, 2048


def test_the_loss_takes_a_third_of_the_memory_at_32768_words():
    found, logits = peaks(WORDS, POSITIONS, WIDTH), 4 * POSITIONS * WORDS
    assert found["whole logits"] >= 2 * logits, "log-probabilities and their gradient are counted"
    assert found["whole logits"] >= 3 * found["chunks"] and found["chunks"] < logits


@pytest.mark.parametrize("gradient", [True, False])
def test_log_probabilities_take_a_third_of_the_memory_at_32768_words(monkeypatch, gradient):
    """Of a whole policy and, without gradient, reference: the other tensors of a model are small beside logits."""
    model = nano(vocab_size=WORDS, hidden_size=WIDTH, num_nextn_predict_layers=0)
    tokens = torch.randint(WORDS, (8, POSITIONS // 8 + 1))

    def peak(whole):
        monkeypatch.setattr(chunked_loss, "LOGITS", WORDS * POSITIONS if whole else 2**23)
        with LiveBytes() as live, torch.set_grad_enabled(gradient):
            logp, _, _ = token_logps(model, tokens)
            if gradient:
                logp.sum().backward()
        return live.peak

    assert peak(whole=True) >= 3 * peak(whole=False)
