"""The compiled step gives the model's tokens, serves any weights of its config, and says what it cannot do."""

import pytest
import torch
from inference.test_fused import decode_both, model_of
from inference.test_generate import GREEDY, PROMPTS, decided

from minids.cli import sample
from minids.config import ModelConfig
from minids.fp8.linear import convert_to_fp8
from minids.inference.compiled import load_step, package_path
from minids.inference.generate import generate


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "minids"


TINY = dict(num_hidden_layers=2, num_nextn_predict_layers=0, first_k_dense_replace=1)


def test_compiled_generation_gives_the_same_tokens(cache_folder):
    """Batches of 1 and 4 (one sequence stops early); then other weights of the config by the same package."""
    model = decided(**TINY)
    plain = generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY)
    stop = [plain[0][3]]
    stopped = generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY, stop=stop)
    assert generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY, stop=stop, compiled=True) == stopped
    assert generate(model, PROMPTS[:3], max_new_tokens=12, sampling=GREEDY, compiled=True) == plain[:3]
    (package,) = cache_folder.iterdir()  # no unfinished file beside it
    written = package.stat().st_mtime_ns
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, 0))
        for weight in model.parameters():
            if weight.ndim == 1:  # ones and zeros until now, which a compiler must not take for constants
                weight.add_(torch.rand_like(weight))
    changed = generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY)
    assert changed != plain
    assert generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY, compiled=True) == changed
    assert package.stat().st_mtime_ns == written


def test_compiled_logits_equal_the_model(cache_folder):
    model = model_of(
        ModelConfig.preset("nano", **TINY | {"num_hidden_layers": 1, "first_k_dense_replace": 0}), dtype=torch.float32
    )
    theirs, ours, cache_error = decode_both(model, batch=1, padding=0, steps=20, build=lambda m: load_step(m, 1))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert cache_error < 1e-5


def test_without_a_compiler_one_line_is_said_and_the_model_decodes(cache_folder):
    from torch._inductor import config

    model = decided(**TINY, vocab_size=64)
    prompts = [[1, 2, 3]]
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.warns(UserWarning) as said:
        tokens = generate(model, prompts, max_new_tokens=5, sampling=GREEDY, compiled=True)
    assert tokens == generate(model, prompts, max_new_tokens=5, sampling=GREEDY)
    (message,) = [str(w.message) for w in said]
    assert message.startswith("decoding without compilation: the C++ compiler failed") and "\n" not in message
    assert not package_path(model, 1).exists()


def test_a_broken_package_is_named(cache_folder):
    model = decided(**TINY, vocab_size=65)
    path = package_path(model, 1)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"not a package")
    with pytest.raises(ValueError, match="cannot be loaded: .*; delete it to compile it again"):
        load_step(model, 1)


def test_package_depends_on_what_is_compiled_and_not_on_the_weights(monkeypatch):
    one, other = decided(), decided()
    with torch.no_grad():
        other.head.weight.mul_(2)
    assert package_path(one, 1) == package_path(other, 1) != package_path(one, 2)
    assert package_path(one, 1) != package_path(decided(rope_theta=100.0), 1)
    assert package_path(one, 1) != package_path(one.bfloat16(), 1)
    before = package_path(other, 1)
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert package_path(other, 1) != before


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (lambda: decided(attention="gqa"), 1, "attention='gqa': the fused step has mla only"),
        (lambda: decided(), 17, "17 prompts: the compiled step takes at most 16"),
        (lambda: _in_fp8(decided()), 1, "FP8 or sharded experts"),
    ],
)
def test_what_cannot_be_compiled_is_refused(model, batch, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), [[1]] * batch, max_new_tokens=2, compiled=True)


def _in_fp8(model):
    convert_to_fp8(model)
    return model


def test_compile_and_speculative_exclude_each_other():
    with pytest.raises(ValueError, match="--compile: not allowed with --speculative"):
        sample.run("sample", ["some-run", "--compile", "--speculative"])
