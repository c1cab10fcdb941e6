"""Engram: the hash integer for integer, n-grams across chunks and documents, the gate, tokens of one normal form."""

import plain_streams as plain
import pytest
import torch
from plain_model import NANO, build, random_stream, random_tokens
from tokenizers import Regex, normalizers

from minids.config import EngramConfig, ModelConfig
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively
from minids.model.engram import hash_ngrams, last_tokens, merged_tokens, multipliers, normal_form

MEMORY = EngramConfig(layers=(0, 2), rows=40, heads=2, dim=12, pad_token=7)
CONFIG = NANO.replace(engram=MEMORY)


# The hash: integers that the rule of DeepSeek's demonstration code gives -------------------------------------------


def test_multipliers_and_tables_are_the_published_ones():
    assert multipliers(129280, 1, 3, seed=0) == [58737837727525, 3709723095905, 27562777300965]
    assert multipliers(129280, 15, 3, seed=0) == [22166238923025, 42939128327945, 41336139856257]
    first, second = EngramConfig().table_rows().values()
    assert first[0] == [646403, 646411, 646421, 646423, 646433, 646453, 646519, 646523]
    assert first[1][0] == 646537 and second[0][0] == 646631 and second[1][-1] == 646879
    every = [size for layer in (first, second) for sizes in layer for size in sizes]
    assert len(set(every)) == 32  # all different


def test_rows_read_are_the_published_ones():
    config = EngramConfig(rows=640, heads=2, dim=2)
    assert config.table_rows() == {1: [[641, 643], [647, 653]], 15: [[659, 661], [673, 677]]}
    tokens = torch.tensor([[5, 999, 17, 0, 42]])
    ngrams = last_tokens(tokens, torch.arange(5)[None], config)
    assert ngrams[0].tolist() == [[5, 2, 2], [999, 5, 2], [17, 999, 5], [0, 17, 999], [42, 0, 17]]
    wanted = {
        1: [[374, 473, 618, 639], [256, 550, 360, 511], [459, 600, 280, 208], [344, 630, 259, 60], [434, 465, 92, 448]],
        15: [[409, 562, 285, 162], [592, 123, 80, 62], [374, 141, 437, 382], [309, 3, 567, 611], [521, 171, 423, 277]],
    }
    for layer, rows in wanted.items():
        drawn = torch.tensor(multipliers(1000, layer, 3, seed=0))
        got = hash_ngrams(ngrams, drawn, torch.tensor(config.table_rows()[layer]))
        assert got.flatten(2)[0].tolist() == rows


def test_no_product_exceeds_63_bits():
    for vocab in (2, 272, 129280):
        assert all(m % 2 and m * (vocab - 1) < 2**63 for m in multipliers(vocab, 3, 4, seed=1))


# The layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams, bos", [(1, None), (3, None), (1, 4)])
def test_memory_equals_the_plain_one(streams, bos):
    config = CONFIG.replace(hc_mult=streams, engram=EngramConfig(**(vars(MEMORY) | {"bos_token": bos})))
    model, tokens = build(config), random_tokens(1, 8)
    tokens[0, 3] = 4
    x = random_stream(1, 8, *([streams] if streams > 1 else []), 64)
    ngrams = model.engram.ngrams(tokens, model.attention_context(tokens), None)
    engram = model.engram.layers[1]
    want = plain.memory_added(engram, config, tokens[0].tolist(), x.view(8, streams, 64), 7, bos)
    torch.testing.assert_close(model.engram(2, x, ngrams), x + want.view(x.shape), atol=1e-9, rtol=0)
    assert model.engram(1, x, ngrams) is x


def test_memory_without_value_is_the_model_without_memory():
    model, plain_model, tokens = build(CONFIG), build(NANO), random_tokens(2, 9)
    model.load_state_dict(plain_model.state_dict(), strict=False)
    assert (model(tokens).logits - plain_model(tokens).logits).abs().max() > 1e-3
    for engram in model.engram.layers:
        engram.value_proj.weight.data.zero_()
    torch.testing.assert_close(model(tokens).logits, plain_model(tokens).logits, atol=0, rtol=0)


def test_only_the_rows_read_get_a_gradient():
    model, tokens = build(CONFIG), random_tokens(1, 6)
    model(tokens).logits.square().sum().backward()
    engram = model.engram.layers[0]
    rows = engram.rows_read(model.engram.ngrams(tokens, model.attention_context(tokens), None))
    touched = engram.table.weight.grad.abs().sum(-1).nonzero()[:, 0]
    assert set(touched.tolist()) == set(rows.flatten().tolist()) and len(touched) <= 6 * 4


def test_later_tokens_change_nothing_before():
    model, tokens = build(CONFIG), random_tokens(1, 9)
    other = tokens.clone()
    other[0, 5:] = (tokens[0, 5:] + 1) % 272
    torch.testing.assert_close(model(tokens).logits[:, :5], model(other).logits[:, :5], atol=1e-12, rtol=0)


# Cache and documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 1, 4)])
@pytest.mark.parametrize("streams", [1, 4])
def test_cached_decoding_equals_the_whole(sizes, streams):
    model, tokens = build(CONFIG.replace(hc_mult=streams)), random_tokens(2, 9)
    cache = model.new_cache(2, 9)
    parts = [model.logits(model.trunk(part, cache)[0]) for part in tokens.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, atol=1e-9, rtol=0)


def test_generation_of_a_batch_is_that_of_each_prompt():
    """Prompts of different lengths are padded, sequences leave the batch, rejected drafts are forgotten."""
    model, prompts = build(CONFIG).eval(), [random_tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 5)]
    options = dict(max_new_tokens=10, sampling=Sampling(0.0))
    alone = [generate(model, [prompt], **options)[0] for prompt in prompts]
    stop = alone[0][2]
    cut = [text[: text.index(stop) + 1] if stop in text else text for text in alone]
    assert generate(model, prompts, **options, stop=(stop,)) == cut
    assert generate(model, prompts, **options, prefill_chunk=2) == alone
    assert generate_speculatively(model, prompts, **options)[0] == alone
    assert generate_speculatively(model, prompts[:1], **options)[0] == alone[:1]


def test_no_ngram_crosses_the_start_of_a_document():
    bos, config = 1, EngramConfig(max_ngram=4, pad_token=0, bos_token=1)
    two = torch.tensor([[bos, 8, 9, bos, 5, 6]])
    ngrams = last_tokens(two, torch.arange(6)[None], config)[0].tolist()
    alone = last_tokens(two[:, 3:], torch.arange(3)[None], config)[0].tolist()
    assert ngrams[3:] == alone == [[1, 0, 0, 0], [5, 1, 0, 0], [6, 5, 1, 0]]
    assert ngrams[2] == [9, 8, 1, 0]


# Tokens of one normal form -----------------------------------------------------------------------------------------


def test_normal_form_is_that_of_the_tokenizers_library():
    sentinel = "\ue000"
    reference = normalizers.Sequence([
        normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "), normalizers.Replace(Regex(r"^ $"), sentinel),
        normalizers.Strip(), normalizers.Replace(sentinel, " "),
    ])  # fmt: skip
    texts = ["The", " the", "THE ", "café", "CAFE\u0301", "ﬁne", "Ａ", " ", "  \n", "\t", "", "Ünïcödé", "a \n b",
             "\u00a0", "²", "Straße", "İ", "\u0301", "x\x0b", "ΑΣ", "¼", "\u3000"]  # fmt: skip
    assert [normal_form(text) for text in texts] == [reference.normalize_str(text) for text in texts]


def test_tokens_are_merged_by_normal_form():
    assert merged_tokens(["The", " the", "x", "\ufffd", "\ufffd", "", "", "thé"]) == [0, 0, 1, 2, 3, 4, 4, 0]
    model = build(CONFIG)
    tokens, alike = torch.tensor([[3, 5, 9]]), torch.tensor([[3, 6, 9]])
    read = lambda t: model.engram.ngrams(t, model.attention_context(t), None)  # noqa: E731
    assert not torch.equal(read(tokens), read(alike))
    model.engram.merge([0, 1, 2, 3, 4, 5, 5])
    assert torch.equal(read(tokens), read(alike))
    assert "engram.token_numbers" in model.state_dict()  # a checkpoint keeps the numbering


# Config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layers=()), "layers="), (dict(layers=(2, 1)), "layers="), (dict(layers=[1]), "layers="),
        (dict(max_ngram=1), "max_ngram="), (dict(dim=13), "dim="), (dict(rows=0), "rows="), (dict(heads=0), "heads="),
    ],
)  # fmt: skip
def test_memory_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        EngramConfig(**(vars(MEMORY) | changes))


def test_layers_and_special_tokens_must_exist():
    for changes in (dict(layers=(1, 3)), dict(pad_token=272), dict(bos_token=272)):
        with pytest.raises(ValueError, match="^engram=.*must be below"):
            NANO.replace(engram=EngramConfig(**(vars(MEMORY) | changes)))
    assert ModelConfig.from_dict(CONFIG.to_dict() | {"engram": {"layers": [0]}}).engram == EngramConfig(layers=(0,))


def test_a_token_uses_one_row_of_each_table():
    model, without = build(CONFIG), build(NANO)
    rows = [size for layer in MEMORY.table_rows().values() for sizes in layer for size in sizes]
    width, other = 12 // 2, 2 * (2 * 64 * 24 + 2 * 64)
    assert model.num_parameters() - without.num_parameters() == sum(rows) * width + other
    assert model.num_active_parameters() - without.num_active_parameters() == len(rows) * width + other


def test_numbers_of_tokens_survive_a_model_of_16_bits():
    model, tokens = build(CONFIG).bfloat16(), random_tokens(2, 9)
    ngrams = model.engram.ngrams(tokens, model.attention_context(tokens), None)
    assert torch.equal(ngrams[..., 0], tokens)
    assert model(tokens).logits.dtype == torch.bfloat16
