"""Every config is exported with the logits of transformers, YaRN's fields included, or its export is refused."""

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DeepseekV3Config

from minids.config import ModelConfig, YaRN
from minids.interop.hf import load_pretrained, save_pretrained
from minids.model.transformer import MiniDS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
VOCAB, LENGTH = 40, 24


@st.composite
def yarns(draw):
    """YaRN of any kind: no ramp, a ramp beyond the pairs there are, a step; each mscale may be 0."""
    slow = draw(st.sampled_from([1e-6, 0.5, 1, 1.0, 7.5, 1e4]))
    return YaRN(
        factor=draw(st.sampled_from([1, 1.0, 1.5, 40, 1e3])),
        original_max_position_embeddings=draw(st.sampled_from([1, 8, 64, 4096, 10**9])),
        beta_fast=slow * draw(st.sampled_from([1, 1.01, 32, 1e8])),
        beta_slow=slow,
        mscale=draw(st.sampled_from([0, 0.0, 0.5, 0.707, 1, 3.0])),
        mscale_all_dim=draw(st.sampled_from([0, 0.0, 0.5, 0.707, 1, 3.0])),
    )


@st.composite
def configs(draw):
    """Small configs that fit together, with widths of all kinds and every choice that an export must carry over."""
    groups, per_group = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 4))
    kept, layers, heads = draw(st.integers(1, groups)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    fields = dict(
        vocab_size=VOCAB, hidden_size=draw(st.sampled_from([8, 12, 36, 7])), intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=layers, num_nextn_predict_layers=draw(st.integers(0, 1)),
        max_position_embeddings=draw(st.sampled_from([24, 64, 2560])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 0.1, 1])), rope_theta=draw(st.sampled_from([1.5, 100, 10000.0])),
        rope_scaling=draw(st.none() | yarns()), initializer_range=draw(st.sampled_from([None, 0.006, 1])),
        num_attention_heads=heads, num_key_value_heads=draw(st.sampled_from([1, heads])),
        q_lora_rank=draw(st.sampled_from([None, 1, 6])), kv_lora_rank=draw(st.integers(1, 9)),
        qk_nope_head_dim=draw(st.integers(1, 6)), qk_rope_head_dim=draw(st.sampled_from([2, 4, 6, 16])),
        v_head_dim=draw(st.integers(1, 9)), first_k_dense_replace=draw(st.integers(0, layers)),
        moe_intermediate_size=draw(st.sampled_from([8, 12, 5])), n_routed_experts=groups * per_group,
        n_shared_experts=draw(st.integers(0, 2)), num_experts_per_tok=draw(st.integers(1, kept * per_group)),
        n_group=groups, topk_group=kept, norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([0.5, 1, 2.5])),
        index_topk=draw(st.sampled_from([None, None, 6, 99])), index_n_heads=draw(st.integers(16, 20)),
        index_head_dim=draw(st.sampled_from([16, 19])),
    )  # fmt: skip
    try:
        return ModelConfig(**fields)
    except ValueError:
        assume(False)


@torch.no_grad()
def random_model(config):
    """Logits of size one, uneven attention, norms that are not 1, mixed routing biases."""
    model = MiniDS(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("router.bias"):
            parameter.normal_(0, 0.25)
        elif parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 1 if name.startswith("embedding") else parameter.shape[-1] ** -0.5)
    return model


def in_transformers(folder):
    """Read by transformers, whose experts run one by one: its grouped kernel takes multiples of 16 bytes only."""
    options = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def difference(ours, theirs):
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    logits, reference = ours(tokens).logits, theirs(tokens).logits
    return ((logits - reference).abs().max() / reference.abs().max()).item()


PLAIN = ModelConfig.preset("nano", vocab_size=VOCAB, num_nextn_predict_layers=0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(config=configs(), seed=st.integers(0, 100))
@example(config=PLAIN.replace(rope_scaling=YaRN(40.0, 8, mscale_all_dim=0.0)), seed=0)
@example(config=PLAIN.replace(rope_scaling=YaRN(40.0, 8, mscale=0.707, mscale_all_dim=0.0)), seed=0)
@example(config=PLAIN.replace(rope_scaling=YaRN(40.0, 8, mscale=0.0, mscale_all_dim=0.707)), seed=0)
@example(config=PLAIN.replace(rope_scaling=YaRN(40.0, 8, mscale=0.0, mscale_all_dim=0.0)), seed=0)
@example(config=PLAIN.replace(rope_scaling=YaRN(40.0, 1), rope_theta=100.0), seed=0)
@example(config=PLAIN.replace(rope_scaling=YaRN(40.0, 10**9), rope_theta=1.5), seed=0)
@example(config=PLAIN.replace(rope_scaling=YaRN(32.0, 64, 1.0, 1.0), rope_theta=50.0), seed=0)
@example(config=PLAIN.replace(n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1), seed=0)
@example(config=PLAIN.replace(rms_norm_eps=1, routed_scaling_factor=2), seed=0)
def test_any_config_is_exported_with_the_same_logits_or_refused(tmp_path_factory, config, seed):
    torch.manual_seed(seed)
    model, folder = random_model(config), tmp_path_factory.mktemp("export")
    try:
        save_pretrained(model, folder / "out")
    except ValueError as error:
        event("refused")
        assert config.n_routed_experts == 1 and "n_routed_experts=1" in str(error)
        return
    event("exported")
    assert load_pretrained(folder / "out").config == config
    assert difference(model, in_transformers(folder / "out")) < 1e-4


IMPORTED = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2,
    topk_group=1, first_k_dense_replace=1, max_position_embeddings=128,
)  # fmt: skip
ROPE = dict(rope_type="yarn", rope_theta=100.0, factor=8.0, original_max_position_embeddings=8)


@pytest.mark.parametrize(
    "changes",
    [
        dict(first_k_dense_replace=3),
        dict(moe_intermediate_size=12),
        dict(hidden_size=36),
        dict(hidden_size=35, moe_intermediate_size=13),
        dict(rms_norm_eps=1e-1),
        dict(norm_topk_prob=False),
        dict(rope_parameters=ROPE | dict(attention_factor=1.7)),
        dict(rope_parameters=ROPE | dict(attention_factor=1.7, mscale_all_dim=0.7)),
        dict(rope_parameters=ROPE | dict(mscale=1.0, beta_fast=1.0, beta_slow=1.0)),
        dict(rope_parameters=ROPE | dict(beta_fast=None, beta_slow=None)),
    ],
    ids=str,
)
def test_a_model_of_transformers_is_imported_with_the_same_logits(tmp_path, changes):
    theirs = AutoModelForCausalLM.from_config(
        DeepseekV3Config(**IMPORTED | changes), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    assert difference(load_pretrained(tmp_path).eval(), theirs) < 1e-4
