import math

import pytest
import torch
from training.helpers import nano

from minids.data.batches import Batch
from minids.training.loss import IGNORED, LossDenominators, bits_per_byte, losses, targets


def batch_of(tokens, documents):
    tokens, documents = torch.tensor(tokens), torch.tensor(documents)
    return Batch(tokens, documents, torch.zeros_like(tokens))


BATCH = batch_of([[10, 11, 12, 20, 21, 22, 23], [30, 31, 32, 33, 34, 35, 36]], [[0, 0, 0, 1, 1, 1, 1], [2] * 7])


def test_targets_do_not_cross_documents():
    assert targets(BATCH)[0].tolist() == [11, 12, IGNORED, 21, 22, 23]
    assert targets(BATCH, depth=1)[0].tolist() == [12, IGNORED, IGNORED, 22, 23]
    assert targets(BATCH, depth=2)[0].tolist() == [IGNORED, IGNORED, IGNORED, 23]
    assert targets(BATCH)[1].tolist() == [31, 32, 33, 34, 35, 36]


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    """A row of two tokens across the border of two documents, or one whose loss mask is empty."""
    tokens, same = torch.tensor([[10, 11, 12]]), torch.zeros(1, 3, dtype=torch.int64)
    for batch in (batch_of([[2, 1]], [[0, 1]]), Batch(tokens, same, same, torch.zeros_like(tokens).bool())):
        model = nano(num_nextn_predict_layers=1, aux_loss_alpha=0.0)
        terms = losses(model, model(batch.tokens[:, :-1], mtp=True), batch, LossDenominators.of(batch))
        terms.total(0.3).backward()
        assert terms.main == terms.mtp == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_losses_equal_a_sum_over_positions():
    """Each term written out; the MTP sum is divided by the number of next-token targets (V3 eq. 24)."""
    model = nano(num_nextn_predict_layers=2)
    out = model(BATCH.tokens[:, :-1], mtp=True)
    share = LossDenominators.of(BATCH)
    assert share == LossDenominators(targets=11, sequences=2)
    main, depths = 0.0, [0.0, 0.0]
    for b in range(2):
        for i in range(6):
            for k in range(3):
                if i + k + 1 > 6 or BATCH.documents[b, i] != BATCH.documents[b, i + k + 1]:
                    continue
                logits = (out.logits if k == 0 else out.mtp_logits[k - 1])[b, i]
                nats = -logits.log_softmax(-1)[BATCH.tokens[b, i + k + 1]].item()
                if k == 0:
                    main += nats
                else:
                    depths[k - 1] += nats
    computed = losses(model, out, BATCH, share)
    assert computed.main.item() == pytest.approx(main / 11, rel=1e-5)
    assert computed.mtp.item() == pytest.approx(sum(depths) / 2 / 11, rel=1e-5)
    expected_total = computed.main + 0.3 * computed.mtp + computed.balance
    assert computed.total(0.3).item() == pytest.approx(expected_total.item())


def test_the_balance_loss_of_a_fresh_model_is_near_alpha_per_layer():
    model = nano(aux_loss_alpha=1e-4)
    out = model(BATCH.tokens[:, :-1])
    balance = losses(model, out, BATCH, LossDenominators.of(BATCH)).balance.item()
    assert 0.9e-4 < balance / len(out.routings) < 2e-4


def test_bits_per_byte_of_a_blind_guess():
    """A uniform model needs log2(vocabulary) bits a token; tokens that stand for two bytes halve it."""
    model = nano()
    torch.nn.init.zeros_(model.head.weight)
    two_bytes = torch.full((model.config.vocab_size,), 2)
    bits = bits_per_byte(model, [BATCH], two_bytes)
    assert bits == pytest.approx(math.log2(model.config.vocab_size) / 2, rel=1e-5)


def test_special_tokens_cost_bits_and_count_no_bytes():
    model = nano()
    torch.nn.init.zeros_(model.head.weight)
    bytes_of = torch.ones(model.config.vocab_size, dtype=torch.int64)
    bytes_of[36] = 0
    expected = math.log2(model.config.vocab_size) * 11 / 10
    assert bits_per_byte(model, [BATCH], bytes_of) == pytest.approx(expected, rel=1e-5)
