"""Any ModelConfig is either refused in one line or can be trained: configs drawn by hypothesis."""

import json

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from minids.config import EngramConfig, ModelConfig, YaRN
from minids.model.kv_cache import IndexerTraining
from minids.model.moe import balance_loss
from minids.model.transformer import MiniDS


def often(value, *rarely):
    """Mostly the good value; the rest keeps the rules honest."""
    return st.sampled_from([value] * 6 + [*rarely])


@st.composite
def fields(draw):
    """A small config: most fit together, some do not."""
    groups, per_group = draw(st.sampled_from([1, 2, 4])), draw(often(2, 3, 4, 1))
    kept = draw(st.integers(1, groups))
    heads = draw(st.sampled_from([2, 4, 6]))
    layers = draw(st.integers(1, 3))
    return dict(
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=draw(often(16, 8, 24, 20)),
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=layers,
        num_nextn_predict_layers=draw(st.integers(0, 3)),
        max_position_embeddings=64,
        rope_theta=draw(st.sampled_from([2.0, 10000.0])),
        rope_scaling=draw(
            st.sampled_from([None, YaRN(original_max_position_embeddings=4), YaRN(2.0, 64, mscale=0.5), YaRN(1.0, 8)])
        ),
        initializer_range=draw(st.sampled_from([None, 0.006, 0.1])),
        attention=draw(st.sampled_from(["mla", "gqa"])),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([1, 2, heads, heads, 4])),
        q_lora_rank=draw(st.sampled_from([None, 1, 5])),
        kv_lora_rank=draw(st.integers(1, 9)),
        qk_nope_head_dim=draw(st.integers(1, 6)),
        qk_rope_head_dim=draw(often(4, 2, 3)),
        v_head_dim=draw(st.sampled_from([2, 4, 8, 12, 5])),
        first_k_dense_replace=draw(often(min(1, layers), 0, layers, layers + 1)),
        moe_intermediate_size=draw(often(8, 16, 12)),
        n_routed_experts=groups * per_group,
        n_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_tok=draw(st.integers(1, kept * per_group) | often(2, kept * per_group + 1)),
        n_group=groups,
        topk_group=kept,
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        topk_method=draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"][: 3 if kept == groups else 2])),
        norm_topk_prob=draw(st.booleans()),
        aux_loss_alpha=draw(st.sampled_from([0.0, 0.1])),
        expert_balance_alpha=draw(st.sampled_from([0.0, 0.1])),
        device_balance_alpha=draw(st.sampled_from([0.0, 0.1])),
        communication_balance_alpha=draw(st.sampled_from([0.0, 0.1])),
        index_topk=draw(st.sampled_from([None, None, 1, 3, 100])),
        index_n_heads=draw(st.integers(1, 3)),
        index_head_dim=draw(often(5, 4, 3)),
    )


STREAMS_AND_MEMORY = st.fixed_dictionaries({
    "hc_mult": often(1, 2, 3),
    "hc_sinkhorn_iters": often(3, 0),
    "engram": often(
        None,
        EngramConfig(layers=(0,), rows=5, heads=1, dim=3, pad_token=1),
        EngramConfig(layers=(0, 1), rows=1, heads=2, dim=2, max_ngram=2, pad_token=0, bos_token=0),
    ),
})  # fmt: skip


def train_one_step(config, tokens):
    """Forward with the prediction modules, backward with the balance losses, one SGD step; the loss before it."""
    model = MiniDS(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    out = model(tokens, mtp=True, indexer=IndexerTraining("sparse"))
    logits = [out.logits, *out.mtp_logits]
    loss = sum(balance_loss(routing, config) for routing in out.routings) + sum(out.indexer_losses)
    for k, predicted in enumerate(logits, start=1):
        loss = loss + F.cross_entropy(predicted[:, :-1].flatten(0, 1), tokens[:, k:].flatten())
    loss.backward()
    optimizer.step()
    if out.routings:
        model.update_balance_bias(out.tokens_per_expert, 0.001)
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()
        cache = model.new_cache(len(tokens), tokens.shape[1])
        assert all(model(part, cache=cache).logits.isfinite().all() for part in tokens.split([3, 1, 3], 1))
    return loss.item()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=fields(), more=STREAMS_AND_MEMORY, seed=st.integers(0, 100))
def test_any_config_is_refused_or_trains(fields, more, seed):
    fields |= more
    try:
        config = ModelConfig(**fields)
    except ValueError as error:
        event("refused")
        field = str(error).split("=")[0]
        assert field in fields and str(error).startswith(f"{field}={fields[field]!r}: ") and "\n" not in str(error)
        return
    event("trained")
    torch.manual_seed(seed)
    loss = train_one_step(config, torch.randint(config.vocab_size, (2, 7)))
    assert 0 < loss < 1000


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.filter_too_much])
@given(fields=fields(), more=STREAMS_AND_MEMORY)
def test_any_accepted_config_goes_through_json(fields, more):
    try:
        config = ModelConfig(**fields, **more)
    except ValueError:
        assume(False)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
