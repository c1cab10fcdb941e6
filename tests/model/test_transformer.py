"""The whole model: against the plain one, multi-token prediction, parameter counts, initialisation, purity."""

import pytest
import torch
from plain_model import NANO, build, forward, random_tokens

from minids.config import ModelConfig, YaRN
from minids.model.moe import MoE, balance_loss
from minids.model.transformer import MiniDS

DEEP = NANO.replace(num_nextn_predict_layers=3)
CONFIGS = {
    "nano": NANO,
    "three depths": DEEP,
    "no query compression, 2 shared, YaRN": NANO.replace(
        q_lora_rank=None, n_shared_experts=2, rope_scaling=YaRN(original_max_position_embeddings=64)
    ),
    "V2": NANO.replace(
        scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, num_nextn_predict_layers=0
    ),
    "dense GQA": NANO.replace(attention="gqa", num_key_value_heads=2, first_k_dense_replace=3),
    "every layer a mixture": NANO.replace(first_k_dense_replace=0, n_shared_experts=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_model_equals_the_plain_one(name):
    model, tokens = build(CONFIGS[name]), random_tokens(2, 6)
    out = model(tokens, mtp=True)
    plain_loads = []
    for row, sequence in enumerate(tokens.tolist()):
        logits, further, loads = forward(model, sequence)
        torch.testing.assert_close(out.logits[row], logits, atol=1e-9, rtol=0)
        assert len(out.mtp_logits) == len(further) == model.config.num_nextn_predict_layers
        for got, want in zip(out.mtp_logits, further, strict=True):
            torch.testing.assert_close(got[row], want, atol=1e-9, rtol=0)
        plain_loads.append(loads)
    if plain_loads[0]:
        assert torch.equal(out.tokens_per_expert, torch.tensor(plain_loads).sum(0))
    torch.testing.assert_close(model(tokens).logits, out.logits, atol=1e-12, rtol=0)


# Multi-token prediction --------------------------------------------------------------------------------------------


def test_depth_k_has_k_positions_less_and_comes_only_when_asked_for():
    model, tokens = build(DEEP), random_tokens(2, 7)
    out = model(tokens, mtp=True)
    assert out.logits.shape == (2, 7, 272) and out.hidden.shape == (2, 7, 64)
    assert [logits.shape for logits in out.mtp_logits] == [(2, 6, 272), (2, 5, 272), (2, 4, 272)]
    assert model(tokens).mtp_logits == []
    assert build(CONFIGS["V2"])(tokens, mtp=True).mtp_logits == []


@pytest.mark.parametrize("changed", [1, 3, 5, 6])
def test_changing_token_j_moves_depth_k_from_position_j_minus_k_on(changed):
    """Depth k at position i reads tokens up to i + k: t_{i+k} itself is used, its label t_{i+k+1} is not seen."""
    model, tokens = build(DEEP), random_tokens(1, 7)
    other = tokens.clone()
    other[0, changed] = (tokens[0, changed] + 1) % 272
    with torch.no_grad():
        a, b = model(tokens, mtp=True), model(other, mtp=True)
    for k, (x, y) in enumerate(zip([a.logits, *a.mtp_logits], [b.logits, *b.mtp_logits], strict=True)):
        first, moved = max(changed - k, 0), (x - y).abs().amax(-1)[0]
        assert (moved[:first] < 1e-10).all()
        assert moved[first] > 1e-6


def test_every_token_up_to_i_plus_k_counts():
    model, tokens = build(DEEP), random_tokens(1, 6)
    with torch.no_grad():
        base = model(tokens, mtp=True).mtp_logits
        for j in range(6):
            other = tokens.clone()
            other[0, j] = (tokens[0, j] + 1) % 272
            for k, (x, y) in enumerate(zip(base, model(other, mtp=True).mtp_logits, strict=True), start=1):
                last = 5 - k
                assert ((x - y)[0, last].abs().max() > 1e-6) == (j <= last + k)


def test_modules_share_embedding_and_head_and_own_the_rest():
    model, tokens = build(DEEP), random_tokens(1, 6)
    vocabulary_sized = [name for name, p in model.named_parameters() if 272 in p.shape]
    assert vocabulary_sized == ["embedding.weight", "head.weight"]
    out = model(tokens, mtp=True)
    sum(logits.square().sum() for logits in out.mtp_logits).backward()
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert without_gradient == ["norm.weight"]  # the main model's final norm is the main head's alone
    assert model.head.weight.grad.any() and model.embedding.weight.grad.any()


def test_modules_do_not_touch_what_the_main_model_says():
    model, tokens = build(DEEP), random_tokens(1, 6)
    before = model(tokens).logits
    for p in model.mtp.parameters():
        p.data.mul_(-3)
    assert torch.equal(model(tokens, mtp=True).logits, before)


def test_module_norms_both_of_its_inputs():
    """The stream and the embedding reach the projection at the same size, whatever size they have."""
    model, tokens = build(NANO), random_tokens(1, 5)
    module, hidden, embedding = model.mtp[0], torch.randn(1, 5, 64).double(), torch.randn(1, 5, 64).double()
    context = model.attention_context(tokens)
    want = module(hidden, embedding, context)[0]
    torch.testing.assert_close(module(1e3 * hidden, embedding, context)[0], want, atol=1e-4, rtol=0)
    torch.testing.assert_close(module(hidden, 1e3 * embedding, context)[0], want, atol=1e-4, rtol=0)


# What a forward pass returns and leaves alone ----------------------------------------------------------------------


def test_loads_have_a_row_per_moe_layer_the_mtp_modules_last():
    model, tokens = build(NANO.replace(num_nextn_predict_layers=2)), random_tokens(3, 5)
    out = model(tokens, mtp=True)
    assert out.tokens_per_expert.shape == (2 + 2, 8) and not out.tokens_per_expert.is_floating_point()
    assert out.tokens_per_expert.sum(1).tolist() == [3 * 5 * 2, 3 * 5 * 2, 3 * 4 * 2, 3 * 3 * 2]
    assert torch.equal(model(tokens).tokens_per_expert, out.tokens_per_expert[:2])
    inner = [layer.ffn.router for layer in model.layers if isinstance(layer.ffn, MoE)]
    assert model.routers() == [*inner, *(module.block.ffn.router for module in model.mtp)]


def test_update_balance_bias_gives_each_router_its_row():
    model = build(NANO)
    for router in model.routers():
        router.bias.data.zero_()
    loads = torch.tensor([[4, 0, 2, 2, 2, 2, 2, 2], [0, 4, 2, 2, 2, 2, 2, 2], [2, 2, 4, 0, 2, 2, 2, 2]])
    model.update_balance_bias(loads, 0.5)
    assert [router.bias.tolist() for router in model.routers()] == [
        [-0.5, 0.5, 0, 0, 0, 0, 0, 0],
        [0.5, -0.5, 0, 0, 0, 0, 0, 0],
        [0, 0, -0.5, 0.5, 0, 0, 0, 0],
    ]
    model.update_balance_bias(loads[:2], 0.5)  # a step without the prediction modules leaves theirs alone
    assert model.routers()[2].bias.tolist() == [0, 0, -0.5, 0.5, 0, 0, 0, 0]
    build(CONFIGS["V2"]).update_balance_bias(loads[:2], 0.5)  # V2 has no bias: nothing to do


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_change_no_parameter_and_no_buffer(training, dtype):
    model, tokens = build(NANO, dtype).train(training), random_tokens(2, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = model(tokens, mtp=True)
    loss = out.logits.float().logsumexp(-1).mean() + sum(balance_loss(r, NANO) for r in out.routings)
    loss.backward()
    with torch.no_grad():
        cache = model.new_cache(2, 6)
        for part in tokens.split((4, 1, 1), 1):
            model(part, cache=cache)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_same_tokens_give_the_same_output_bit_for_bit():
    model, tokens = build(NANO, torch.float32), random_tokens(2, 9)
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = build(NANO), random_tokens(3, 6)
    with torch.no_grad():
        together = model(tokens).logits
        for row in range(3):
            alone = model(tokens[row : row + 1]).logits
            torch.testing.assert_close(alone[0], together[row], atol=1e-10, rtol=0)


# Precision ---------------------------------------------------------------------------------------------------------


def test_bfloat16_model_keeps_the_balancing_bias_in_float32():
    model = build(NANO).bfloat16()
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    for name, kind in kinds.items():
        assert kind == (torch.float32 if name.endswith("router.bias") else torch.bfloat16), name
    out = model(random_tokens(1, 5), mtp=True)
    assert out.logits.dtype == torch.bfloat16 and out.routings[0].scores.dtype == torch.float32
    before = model.routers()[0].bias.clone()
    model.update_balance_bias(out.tokens_per_expert, 0.001)
    assert ((model.routers()[0].bias - before).abs().max() - 0.001).abs() < 1e-7


def test_autocast_keeps_gate_and_stream_in_float32():
    model, tokens = build(NANO, torch.float32), random_tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, mtp=True)
    assert out.hidden.dtype == torch.float32
    assert {routing.scores.dtype for routing in out.routings} == {torch.float32}
    with torch.no_grad():
        want = model(tokens).hidden
    assert ((out.hidden - want).norm(dim=-1) / want.norm(dim=-1)).median() < 0.05


# Sizes (FACTS.md section 1.1) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, total, active, mtp",
    [
        ("v3", 671_026_419_200, 37_552_297_472, 11_610_068_224),
        ("v2", 235_741_434_880, 21_375_800_320, 0),
        ("v2_lite", 15_706_484_224, 2_661_150_208, 0),
    ],
)
def test_published_models_have_the_published_parameters(preset, total, active, mtp):
    with torch.device("meta"):
        model = MiniDS(ModelConfig.preset(preset))
    assert model.num_parameters() == total
    assert model.num_active_parameters() == active
    assert model.num_parameters(mtp=True) - total == mtp
    if preset == "v3":
        biases = sum(router.bias.numel() for router in model.routers()[:58])
        assert total - biases == 671_026_404_352
        copies = model.embedding.weight.numel() + model.head.weight.numel()
        assert model.num_parameters(mtp=True) + copies == 684_489_845_504  # the released checkpoint


def test_counts_of_a_small_model_by_hand():
    model = MiniDS(NANO)
    attention = 64 * 32 + 32 + 32 * 4 * 24 + 64 * 40 + 32 + 32 * 4 * 32 + 4 * 16 * 64
    expert, gate = 3 * 64 * 32, 8 * 64 + 8
    layers = 3 * (attention + 2 * 64) + 3 * 64 * 128 + 2 * (gate + 9 * expert)
    assert model.num_parameters() == 2 * 272 * 64 + 64 + layers
    assert model.num_active_parameters() == model.num_parameters() - 2 * 6 * expert
    assert model.num_parameters(mtp=True) == sum(p.numel() for p in model.parameters())
    dense = MiniDS(NANO.replace(first_k_dense_replace=3, num_nextn_predict_layers=0))
    assert dense.num_active_parameters() == dense.num_parameters()


# Initialisation ----------------------------------------------------------------------------------------------------


def stds(config):
    torch.manual_seed(0)
    model = MiniDS(config)
    ones = [n for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith("router.bias")]
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (1 if name in ones else 0)).all()
    return {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}


def test_published_initialisation_gives_every_matrix_the_same_std():
    assert ModelConfig.preset("v3").initializer_range == 0.006
    for name, std in stds(NANO.replace(initializer_range=0.006)).items():
        assert std == pytest.approx(0.006, rel=0.1), name


def test_scaled_initialisation_follows_fan_in_and_depth():
    """1 / sqrt(fan-in); what writes to the stream, over sqrt(2 * layers); the embedding 1, the head 1 / width."""
    to_stream = 6**-0.5
    want = {
        "embedding.weight": 1,
        "head.weight": 1 / 64,
        "layers.0.attention.q_down_proj.weight": 64**-0.5,
        "layers.0.attention.q_up_proj.weight": 32**-0.5,
        "layers.0.attention.kv_up_proj.weight": 32**-0.5,
        "layers.0.attention.o_proj.weight": 64**-0.5 * to_stream,
        "layers.0.ffn.gate_proj.weight": 64**-0.5,
        "layers.0.ffn.down_proj.weight": 128**-0.5 * to_stream,
        "layers.1.ffn.router.weight": 64**-0.5,
        "layers.1.ffn.experts.gate_proj": 64**-0.5,
        "layers.1.ffn.experts.up_proj": 64**-0.5,
        "layers.1.ffn.experts.down_proj": 32**-0.5 * to_stream,
        "layers.1.ffn.shared.up_proj.weight": 64**-0.5,
        "layers.1.ffn.shared.down_proj.weight": 32**-0.5 * to_stream,
        "mtp.0.proj.weight": 128**-0.5,
    }
    got = stds(NANO)
    assert {name: got[name] / std for name, std in want.items()} == {name: pytest.approx(1, rel=0.1) for name in want}


def test_scaled_initialisation_does_not_shrink_the_way_into_the_latent():
    assert stds(NANO)["layers.0.attention.kv_down_proj.weight"] == pytest.approx(64**-0.5, rel=0.1)


def test_initial_model_is_close_to_chance():
    torch.manual_seed(0)
    model, tokens = MiniDS(NANO), random_tokens(4, 32)
    loss = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(272.0).log().item(), abs=0.1)
