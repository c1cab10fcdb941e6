"""V4's attention: rules of its config, its cache and sizes, the training of its indexer, hash routing.

That its outputs are the equations' is checked in test_compressed_mistakes.py, against transformers in tests/parity.
"""

import plain_compressed as plain
import pytest
import torch
from plain_compressed import COMPRESSED, LAYERS, model_of
from plain_model import random_stream, random_tokens

from minids.config import ModelConfig, YaRN
from minids.inference.generate import Sampling, generate
from minids.model.hash_routing import HashRouting
from minids.model.kv_cache import IndexerTraining
from minids.model.sparse_attention import set_trained_parameters
from minids.model.transformer import MiniDS

FLASH = ModelConfig(
    hidden_size=4096, num_hidden_layers=43, num_nextn_predict_layers=0, max_position_embeddings=2**20,
    attention="csa", layer_types=("window", "window", *("csa", "hca") * 20, "csa"), num_attention_heads=64,
    num_key_value_heads=64, q_lora_rank=1024, v_head_dim=512, index_topk=512, first_k_dense_replace=0,
    num_experts_per_tok=6, n_group=1, topk_group=1, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5, hc_mult=4,
)  # fmt: skip


def in_parts(model, tokens, sizes):
    cache = model.new_cache(*tokens.shape)
    return torch.cat([model(part, cache=cache).logits for part in tokens.split(sizes, 1)], 1)


# Config --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, field, rule",
    [
        ({"attention": "mla", "index_topk": None}, "layer_types", "window, csa, hca"),
        ({"attention": "mla", "index_topk": None, "layer_types": None}, "num_hash_layers", "window, csa, hca"),
        ({"layer_types": ("window", "csa")}, "layer_types", "each layer"),
        ({"layer_types": ("window", "csa", "mla")}, "layer_types", "window, csa, hca"),
        ({"layer_types": 3}, "layer_types", "tuple"),
        ({"index_topk": None}, "index_topk", "csa"),
        ({"q_lora_rank": None, "index_topk": None, "layer_types": ("hca",) * 3}, "q_lora_rank", "number"),
        ({"v_head_dim": 4, "o_groups": 2}, "qk_rope_head_dim", "v_head_dim=4"),
        ({"o_groups": 3}, "o_groups", "num_attention_heads=4"),
        ({"num_hash_layers": 3}, "num_hash_layers", "MoE layers"),
        ({"rope_scaling": YaRN(mscale=0.5)}, "rope_scaling", "mscale"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers", "must be 0"),
        ({"sliding_window": 0}, "sliding_window", "at least 1"),
    ],
)
def test_each_rule_names_field_and_rule(changes, field, rule):
    with pytest.raises(ValueError) as caught:
        COMPRESSED.replace(**changes)
    assert str(caught.value).startswith(f"{field}=") and rule in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_goes_through_a_dictionary_and_its_layers_have_their_kinds():
    fields = COMPRESSED.to_dict() | {"layer_types": list(LAYERS)}  # as JSON has it
    assert ModelConfig.from_dict(fields) == COMPRESSED
    assert [COMPRESSED.of_layer(i).attention for i in range(3)] == list(LAYERS)
    all_alike = COMPRESSED.replace(layer_types=None, attention="hca")
    assert all_alike.of_layer(2) is all_alike
    with pytest.raises(ValueError, match="attention='csa'"):
        COMPRESSED.to_hf()


# Sizes of V4-Flash (FACTS.md section 10) -----------------------------------------------------------------------------


def test_v4_flash_has_the_published_number_of_parameters():
    """284B, as transformers 5.23 counts them; balancing biases are buffers there and parameters here.

    The second number is that of transformers' default config, which has Flash's sizes and Pro's kinds of layers.
    """
    of_pro = ("hca", "hca", *("hca", "csa") * 20, "hca")
    for config, counted in ((FLASH, 284_332_230_231), (FLASH.replace(layer_types=of_pro), 284_325_869_015)):
        with torch.device("meta"):
            assert MiniDS(config).num_parameters() == counted + 43 * 256


def test_v4_flash_caches_640_values_per_4_tokens_and_512_per_128():
    with torch.device("meta"):
        blocks = [MiniDS(FLASH.replace(num_hidden_layers=1, layer_types=(kind,))).layers[0] for kind in LAYERS]
        like = torch.zeros(1, dtype=torch.bfloat16)

    def values(block, slots):
        return block.attention.new_cache(1, slots, like).numel()

    grown = [values(block, 2**17) - values(block, 2**16) for block in blocks]
    assert grown == [0, 2**16 // 4 * (512 + 128), 2**16 // 128 * 512]
    fixed = [values(block, 0) - 2 * per_entry for block, per_entry in zip(blocks, (0, 640, 512), strict=True)]
    assert fixed == [128 * 512, 128 * 512 + 8 * 4 * (512 + 128), 128 * 512 + 128 * 2 * 512]


# The cache -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sequences_of_different_lengths_decode_in_one_batch():
    """9 and 16 tokens are cached: blocks begin and end at different steps of the two."""
    model, tokens = model_of(), random_tokens(2, 24)
    alone, lengths = [], (9, 16)
    for row, length in enumerate(lengths):
        cache = model.new_cache(1, 24)
        model(tokens[row : row + 1, :length], cache=cache)
        alone.append(cache)
    both = model.new_cache(2, 24)
    both.layers = [torch.cat(layers) for layers in zip(*(cache.layers for cache in alone), strict=True)]
    both.lengths, both.longest = torch.tensor(lengths), max(lengths)
    steps = [tokens[[0, 1], [9 + i, 16 + i]][:, None] for i in range(8)]
    got = torch.cat(
        [model(torch.cat(steps[:3], 1), cache=both).logits, *(model(s, cache=both).logits for s in steps[3:])], 1
    )
    for row, length in enumerate(lengths):
        want = model(tokens[row : row + 1, : length + 8]).logits[0, length:]
        torch.testing.assert_close(got[row], want, atol=1e-10, rtol=0)


@torch.no_grad()
def test_finished_sequences_leave_the_batch():
    model, tokens = model_of(), random_tokens(3, 20)
    cache = model.new_cache(3, 20)
    model(tokens[:, :13], cache=cache)
    rows = cache.keep(torch.tensor([0, 2]))
    kept = tokens[[0, 2]][rows.argsort()]
    got = torch.cat([model(kept[:, t : t + 1], cache=cache).logits for t in range(13, 20)], 1)
    torch.testing.assert_close(got, model(kept).logits[:, 13:], atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_rollback_is_refused_and_the_same_lengths_are_not():
    model, cache = model_of(), model_of().new_cache(1, 12)
    model(random_tokens(1, 8), cache=cache)
    cache.truncate(torch.tensor([8]))
    with pytest.raises(ValueError, match=r"lengths=\[7\]: .*same number of tokens"):
        cache.truncate(torch.tensor([7]))
    assert cache.lengths.tolist() == [8]


def test_generation_is_that_of_full_passes_and_refuses_prompts_of_different_lengths():
    model = model_of()
    prompts = random_tokens(2, 7).tolist()
    texts = generate(model, prompts, max_new_tokens=12, sampling=Sampling(temperature=0))
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            full = model(torch.tensor([prompt + text])).logits[0].argmax(-1).tolist()
        assert text == full[len(prompt) - 1 : -1]
    with pytest.raises(ValueError, match="same number of tokens"):
        generate(model, [prompts[0], prompts[1][:5]], max_new_tokens=2)


# Precision -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sinks_biases_and_tables_stay_in_float32():
    model = MiniDS(COMPRESSED).bfloat16()
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {
        name
        for name in model.state_dict()
        if name.endswith(("sink.logit", "place_bias", "router.bias", "routing.tables"))
    }
    logits = in_parts(model, random_tokens(1, 20), [9, *[1] * 11])
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@torch.no_grad()
def test_under_autocast_the_logits_are_near_those_of_float32():
    model, tokens = MiniDS(COMPRESSED), random_tokens(2, 20)
    want = model(tokens).hidden
    with torch.autocast("cpu", torch.bfloat16):
        got = model(tokens).hidden
    off = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.median() < 0.05  # a token may flip an expert or an entry, most do not


# Training ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_the_indexer_is_that_of_the_equations():
    """KL from the entries' probabilities, summed over heads and normalised; queries without entries count as 0."""
    model, tokens = model_of(), random_tokens(1, 17)
    attention, x = model.layers[1].attention, random_stream(1, 17, COMPRESSED.hidden_size)
    context = model.attention_context(tokens)
    for stage in ("dense_warmup", "sparse"):
        context.indexer = IndexerTraining(stage)
        out = attention(x, context)
        (loss,) = context.indexer.losses
        context.indexer = None
        k = 17 if stage == "dense_warmup" else COMPRESSED.index_topk
        config = COMPRESSED.replace(index_topk=k)
        w = {name: weight.detach() for name, weight in attention.named_parameters()}
        want = plain.compressed_attention(w, config, "csa", x[0])
        torch.testing.assert_close(out[0], want, atol=1e-9, rtol=0)
        torch.testing.assert_close(loss.item(), plain.indexer_loss(w, config, x[0]), atol=1e-9, rtol=0)


def test_the_indexer_learns_from_its_loss_only_and_the_model_from_the_others():
    model, training = MiniDS(COMPRESSED), IndexerTraining("sparse")
    out = model(random_tokens(2, 20), indexer=training)
    out.logits.sum().backward(retain_graph=True)
    indexers = {name: p for name, p in model.named_parameters() if ".indexer." in name}
    assert len(indexers) == 6 and all(p.grad is None for p in indexers.values())
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    sum(training.losses).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in indexers.values())
    for name, gradient in before.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name


def test_the_warm_up_lowers_the_loss_of_the_indexer_alone():
    model = MiniDS(COMPRESSED)
    set_trained_parameters(model, "dense_warmup")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    tokens = random_tokens(4, 40)
    for _ in range(30):
        training = IndexerTraining("dense_warmup")
        model(tokens, indexer=training)
        (loss,) = training.losses
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Hash routing --------------------------------------------------------------------------------------------------------


def test_hash_routing_looks_up_different_experts_for_every_token_and_layer():
    config = COMPRESSED.replace(num_hash_layers=2, num_experts_per_tok=3)
    routing, tokens = HashRouting(config), torch.arange(config.vocab_size)[None]
    first, second = routing(0, tokens), routing(1, tokens)
    assert first.shape == (1, 272, 3) and first.dtype == torch.int64 and routing(2, tokens) is None
    assert (first.sort(-1).values.diff(dim=-1) > 0).all()  # different ones
    assert (first != second).any(-1).float().mean() > 0.9
    counts = torch.bincount(first.flatten(), minlength=8)
    assert counts.min() > 0.7 * 272 * 3 / 8 and counts.max() < 1.3 * 272 * 3 / 8
    assert torch.equal(HashRouting(config).tables, routing.tables)


@torch.no_grad()
def test_only_the_first_moe_layers_are_routed_by_token():
    model, tokens = model_of(), random_tokens(1, 12).fill_(5)
    tokens[0, ::2] = 7
    first, second = model(tokens).routings
    table = model.hash_routing.tables[0].long()
    assert torch.equal(first.experts, table[tokens])
    assert not torch.equal(second.experts[0, 0].sort().values, table[7].sort().values)
    weights = first.scores.gather(-1, first.experts)
    expected = COMPRESSED.routed_scaling_factor * weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(first.weights, expected)
    assert torch.equal(
        model(tokens, experts=torch.zeros(2, 1, 12, 2, dtype=torch.int64)).routings[0].experts.max(), torch.tensor(0)
    )
