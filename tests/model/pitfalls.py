"""Helpers of the mutation test of the model: every test_pitfalls_* file holds a table of checks and planted mistakes.

For each pitfall of PITFALLS.md there is a `check_*`, which asserts the correct behaviour through what the package
shows, and one or more `plant_*`, which put the mistake into the package. `assert_caught` runs the check on the package
as it is, where it must pass, and with the mistake planted, where it must fail by its own assertion (a crash does not
count). The numbers are those of PITFALLS.md. 19 and 20 concern drafting and are tested in tests/inference.
"""

import functools

import plain_model as plain
import pytest
import torch

from minids.config import ModelConfig

V3 = ModelConfig.preset("v3")


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


def after_init(mp, cls, change):
    """Let `change(module)` finish every new module of a class."""
    original = cls.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    mp.setattr(cls, "__init__", init)


def attention_reference(model, x):
    """Output and cache of the first layer's attention on [1, seq, dim], by the loops of `plain_model`."""
    w = dict(model.layers[0].attention.named_parameters())
    out, entries = plain.latent_attention(w, model.config, x[0])
    return out[None], entries[None]


def mistakes(pitfalls):
    """The rows of a table of pitfalls, one for each planted mistake: (number, name, check, plant)."""
    return [(n, name, check, plant) for n, check, plants in pitfalls for name, plant in plants.items()]


def each_mistake(pitfalls):
    """Parametrise a test by `check` and `plant` of every planted mistake of a table."""
    rows = mistakes(pitfalls)
    ids = [f"{n:02}-{name}" for n, name, *_ in rows]
    return pytest.mark.parametrize("check, plant", [row[2:] for row in rows], ids=ids)


@functools.cache
def passes(check):
    """Run a check on the package as it is: once, however many mistakes it is to catch."""
    check()
    return True


def assert_caught(check, plant, monkeypatch):
    """Assert that a check passes without the planted mistake and fails with it."""
    assert passes(check)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
