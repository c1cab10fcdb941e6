"""Sparse attention equals transformers' DeepSeek-V3.2: scores, choice, logits, cached decoding, checkpoints both ways.

k = 8 of 40 tokens, since a mistake in the indexer shows only where tokens are left out; 16 index heads, since with few
of them scores of 0 tie, and two correct implementations choose differently.
"""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV32Config

from minids.config import ModelConfig, YaRN
from minids.inference.generate import Sampling, generate
from minids.interop.hf import load_pretrained, save_pretrained
from minids.model.kv_cache import IndexerTraining
from minids.model.sparse_attention import choose
from minids.model.transformer import MiniDS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, LENGTH, K = 64, 40, 8
CONFIG = ModelConfig.preset(
    "nano", vocab_size=VOCAB, max_position_embeddings=128, num_nextn_predict_layers=0, initializer_range=0.02,
    index_topk=K, index_n_heads=16, index_head_dim=24,
)  # fmt: skip
YARN = YaRN(factor=8, original_max_position_embeddings=16)
FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim first_k_dense_replace moe_intermediate_size
    n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group max_position_embeddings index_topk
    index_n_heads index_head_dim""".split()


@torch.no_grad()
def randomize(model):
    """Logits of size one, uneven attention, norms that are not 1, and an index key norm whose bias is not 0."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("router.bias", "e_score_correction_bias", "k_norm.bias")):
            tensor.normal_(0, 0.25)
        elif tensor.ndim == 1 and "inv_freq" not in name:
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model.eval()


def imported(folder, **changes):
    """A model of transformers with random weights, and ours, through the folder that transformers writes."""
    config = DeepseekV32Config(**{name: getattr(CONFIG, name) for name in FIELDS} | changes)
    theirs = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(folder)
    return load_pretrained(folder).eval(), theirs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(1)
    return imported(tmp_path_factory.mktemp("pair"))


def tokens():
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", range(3))
@torch.no_grad()
def test_scores_and_choice(pair, layer, monkeypatch):
    """transformers' scores, as they are when it takes the best of them; and the sets that it takes."""
    ours, theirs = pair
    mine, other = ours.layers[layer].attention, theirs.model.layers[layer].self_attn
    x, seen = torch.randn(2, LENGTH, 64), []
    context = ours.attention_context(tokens())
    causal = torch.full((1, LENGTH, LENGTH), -torch.inf).triu(1)
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *a, **k: seen.append(self) or topk(self, *a, **k))
    latent = other.q_a_layernorm(other.q_a_proj(x))
    best = other.indexer(x, latent, theirs.model.rotary_emb(x, context.positions), causal, context.positions)
    monkeypatch.undo()

    scores = mine.indexer.scores(x, mine.query_latent(x), mine.indexer.key(x, context), context)
    assert scores.std() > 0.1 and (scores == 0).float().mean() < 0.01
    torch.testing.assert_close(scores + causal, seen[0], atol=2e-6, rtol=0)
    reference = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool).scatter_(-1, best.long(), True).tril()
    chosen = choose(scores, torch.ones_like(reference).tril(), K)
    assert torch.equal(chosen, reference)
    assert not torch.equal(chosen, torch.ones_like(chosen).tril().triu(1 - K))  # other tokens than the last k


ROPES = {
    "plain": dict(rope_type="default", rope_theta=500.0),
    "yarn": dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@torch.no_grad()
def test_import(tmp_path, rope):
    ours, theirs = imported(tmp_path, rope_parameters=dict(rope))
    logits, reference = ours(tokens()).logits, theirs(tokens()).logits
    assert reference.std() > 0.3
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
    dense = ours(tokens(), indexer=IndexerTraining("dense_warmup")).logits
    assert (dense - reference).abs().max() > 0.1  # which tokens are left out matters


@torch.no_grad()
def test_cached_decoding(pair):
    """Both decode from their own cache, a prefill and then token by token, as one full pass of transformers."""
    ours, theirs = pair
    want, cache = theirs(tokens()).logits, ours.new_cache(2, LENGTH)
    first, *rest = tokens().split([13, *[1] * (LENGTH - 13)], 1)
    out = theirs(first, use_cache=True)
    got, reference = [ours(first, cache=cache).logits], [out.logits]
    for token in rest:
        got.append(ours(token, cache=cache).logits)
        out = theirs(token, past_key_values=out.past_key_values, use_cache=True)
        reference.append(out.logits)
    torch.testing.assert_close(torch.cat(reference, 1), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)


def test_greedy_generation(pair):
    ours, theirs = pair
    prompt = tokens()[:1, :20]
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, eos_token_id=None)
    want = theirs.generate(prompt, max_new_tokens=15, **options)
    text = generate(ours, prompt.tolist(), max_new_tokens=15, sampling=Sampling(temperature=0))
    assert text[0] == want[0, 20:].tolist()


def test_what_transformers_wrote_goes_back_bit_for_bit(tmp_path, pair):
    ours, theirs = pair
    save_pretrained(ours, tmp_path / "out")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(back) is type(theirs) and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    torch.testing.assert_close(back.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    for name in FIELDS:
        assert getattr(back.config, name) == getattr(theirs.config, name), name


@pytest.mark.parametrize("changes", [{}, dict(rope_scaling=YARN), dict(num_nextn_predict_layers=1)], ids=str)
@torch.no_grad()
def test_export(tmp_path, changes):
    """With a prediction module too: it has an indexer of its own, and transformers leaves the module out.

    In float64: in float32 rounding can decide which of two tokens with nearly equal scores is attended to.
    """
    ours = randomize(MiniDS(CONFIG.replace(**changes)))
    save_pretrained(ours, tmp_path)
    assert load_pretrained(tmp_path).config == ours.config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval().double()
    theirs.set_experts_implementation("eager")  # grouped_mm has no float64
    torch.testing.assert_close(ours.double()(tokens()).logits, theirs(tokens()).logits, atol=1e-5, rtol=0)


def test_an_fp8_export_has_the_formats_of_the_release(tmp_path):
    """In V3.2's files the indexer's query and key matrices are in FP8, its head weights and norm are not."""
    model = randomize(MiniDS(CONFIG))
    save_pretrained(model, tmp_path, fp8=True)
    stored = {name.partition(".indexer.")[2]: t for name, t in load_file(tmp_path / "model.safetensors").items()}
    for name in ("wq_b.weight", "wk.weight"):
        assert stored[name].dtype == torch.float8_e4m3fn and stored[f"{name}_scale_inv"].dtype == torch.float32
    for name in ("weights_proj.weight", "k_norm.weight", "k_norm.bias"):
        assert stored[name].dtype == torch.float32 and f"{name}_scale_inv" not in stored
    loaded = load_pretrained(tmp_path)
    for name, weight in model.layers[0].attention.indexer.named_parameters():
        error = (loaded.get_parameter(f"layers.0.attention.indexer.{name}") - weight).abs().max() / weight.abs().max()
        assert 0 < error < 2**-4 if name in ("q_proj.weight", "k_proj.weight") else error == 0
