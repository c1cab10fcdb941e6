"""The fused step, a function of tokens, positions and cache, equals the model for any config; see test_compiled too."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from test_any_config import fields

from minids.config import ModelConfig, YaRN
from minids.inference.compiled import FusedDecoder
from minids.inference.fused import FusedStep
from minids.inference.generate import CachedDecoder, prefill
from minids.model.transformer import MiniDS


def model_of(config, seed=0, dtype=torch.float64):
    """A random model whose norms and balancing biases are not those of the first step."""
    torch.manual_seed(seed)
    model = MiniDS(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.to(dtype)


@torch.inference_mode()
def decode_both(model, batch=3, padding=1, steps=4, build=FusedStep):
    """Logits [steps, batch, vocab] of the model and of the fused step, and the largest difference of the caches."""
    vocab = model.config.vocab_size
    prompts = [torch.randint(vocab, (1 + 2 * i,)).tolist() for i in range(batch)]  # of different lengths
    cache = model.new_cache(batch, 2 * batch + steps)
    prefill(model, prompts, cache)
    step = FusedDecoder(build(model), batch + padding, cache, steps)
    plain, ours, theirs = CachedDecoder(model, cache), [], []
    for _ in range(steps):
        tokens = torch.randint(vocab, (batch,))
        theirs.append(plain.step(tokens))
        ours.append(step.step(tokens))
    slots = torch.arange(cache.longest)[None, :, None]
    used = slots < cache.lengths[:, None, None]
    stored = torch.stack([(step.cache[: cache.longest, i, :batch].transpose(0, 1)) for i in range(len(cache.layers))])
    kept = torch.stack([layer[:, : cache.longest] for layer in cache.layers])
    return torch.stack(theirs), torch.stack(ours), ((stored - kept) * used).abs().max()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=fields())
def test_step_of_any_config_equals_the_model(fields):
    """In float64, where no rounding can change the choice of experts; lengths differ, and the batch is padded."""
    try:
        config = ModelConfig(**fields | {"attention": "mla", "index_topk": None})
    except ValueError:
        assume(False)
    theirs, ours, cache_error = decode_both(model_of(config))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert cache_error < 1e-10


CONFIGS = {
    "as V3": ModelConfig.preset("nano", rope_scaling=YaRN(original_max_position_embeddings=4), n_group=2, topk_group=1),
    "no query latent": ModelConfig.preset("nano", q_lora_rank=None, n_shared_experts=0),
    "merged": ModelConfig.preset("nano", kv_lora_rank=8, q_lora_rank=16),
    "dense": ModelConfig.preset("nano", num_hidden_layers=2, first_k_dense_replace=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_step_in_float32_equals_the_model(name):
    theirs, ours, cache_error = decode_both(model_of(CONFIGS[name], dtype=torch.float32), batch=9, steps=6)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert cache_error < 1e-5


def test_matrices_are_merged_only_where_that_reads_fewer_weights():
    apart, merged = (FusedStep(MiniDS(CONFIGS[name])).layers[0].attention for name in ("no query latent", "merged"))
    assert apart.key_up is not None and apart.value_up is not None
    assert merged.key_up is None and merged.value_up is None


def test_weights_in_bfloat16_are_computed_in_float32():
    """Nearer to the same weights in float32 than the model is, which rounds after every operation."""
    narrow = model_of(CONFIGS["no query latent"], dtype=torch.bfloat16)
    wide = model_of(CONFIGS["no query latent"], dtype=torch.float32)
    wide.load_state_dict(narrow.state_dict())
    torch.manual_seed(1)
    theirs, ours, _ = decode_both(narrow)
    torch.manual_seed(1)
    exact, _, _ = decode_both(wide)
    assert (ours - exact).abs().max() < 0.5 * (theirs.float() - exact).abs().max()
    assert (ours - exact).abs().mean() < 2**-8 * exact.abs().max()  # the cache is in bfloat16


PLANTED = {
    "no softmax scale": lambda step: setattr(step.layers[0].attention, "scale", 1.0),
    "values of another head": lambda step: step.layers[1].attention.value_up.copy_(
        step.layers[1].attention.value_up.roll(1, 0)
    ),
    "up for gate": lambda step: step.layers[1].ffn.gate_up.copy_(
        step.layers[1].ffn.gate_up.unflatten(1, (2, -1)).flip(1).flatten(1, 2)
    ),
    "no rotation": lambda step: step.sin.zero_(),
    "no shared expert": lambda step: setattr(step.layers[1].ffn, "shared", None),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(mistake, monkeypatch):
    build = FusedStep.__init__

    def planted(self, model):
        build(self, model)
        PLANTED[mistake](self)

    monkeypatch.setattr(FusedStep, "__init__", torch.no_grad()(planted))
    with pytest.raises(AssertionError):
        test_step_in_float32_equals_the_model("as V3")


def test_attending_to_unused_slots_is_caught(monkeypatch):
    forward = FusedStep.forward

    def late(self, tokens, positions, cache):
        return forward(self, tokens, positions + 1, cache)

    monkeypatch.setattr(FusedStep, "forward", late)
    with pytest.raises(AssertionError):
        test_step_in_float32_equals_the_model("as V3")
