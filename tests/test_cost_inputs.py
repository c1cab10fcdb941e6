"""Every formula of minids.cost refuses impossible inputs in one line."""

import inspect
from typing import Literal, get_args, get_origin

import pytest
from cost_configs import NANO

from minids import cost

VALID = {
    cost.prefill_flops_per_token: dict(config=NANO, seq_len=8),
    cost.decode_flops_per_token: dict(config=NANO, keys=8),
    cost.training_flops_per_token: dict(config=NANO, seq_len=8),
    cost.kv_bytes_per_token: dict(config=NANO, bits=16),
    cost.tokens_per_day: dict(tokens_per_step=8, seconds_per_step=1.5),
    cost.mfu: dict(tokens_per_second=8.0, flops_per_token=2, peak_flops=1e3),
    cost.gpu_hours_by_throughput: dict(tokens=8, tokens_per_second=2),
    cost.gpu_hours_by_mfu: dict(total_flops=8, utilisation=0.5, peak_flops=1e3),
    cost.rent_usd: dict(gpu_hours=8, usd_per_gpu_hour=2),
    cost.owned_usd_per_gpu_hour: dict(
        capital_usd=8, years=4, kilowatts=1, usd_per_kilowatt_hour=0.1, utilisation=0.5
    ),
    cost.margin: dict(revenue_usd=8, cost_usd=2),
    cost.zero_bytes_per_gpu: dict(count=8, gpus=2, stage=1, weight=2, gradient=4, optimizer=8),
    cost.pipeline_bubble: dict(schedule="dualpipe", stages=4, F=1, B=2, W=1, FB=3),
    cost.expert_link_seconds: dict(tokens=8, copies=2, bytes_per_copy=3, bytes_per_second=1e3),
    cost.decode_bound: dict(link_seconds=1e-3, layers=2),
    cost.figures: dict(config=NANO, context=8, utilisation=0.5, usd=2),
}  # fmt: skip
CASES = [(f, name) for f, valid in VALID.items() for name in valid if name != "config"]


def refused(function, name, value):
    with pytest.raises(ValueError) as caught:
        function(**VALID[function] | {name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: ") and "\n" not in str(caught.value)


def test_every_formula_is_tested_with_bad_inputs():
    own = {f for f in vars(cost).values() if inspect.isfunction(f) and f.__module__ == cost.__name__}
    assert VALID.keys() >= {f for f in own if hasattr(f, "__wrapped__")}
    for function in own:
        kinds = [p.annotation for p in inspect.signature(function).parameters.values()]
        takes_numbers = any(kind in (int, float, cost.Fraction) for kind in kinds)
        assert not takes_numbers or function in VALID, f"{function.__name__} takes a number that nobody checks"
    for function, valid in VALID.items():
        assert valid.keys() == inspect.signature(function).parameters.keys() - {"causal"}


@pytest.mark.parametrize("function, name", CASES, ids=[f"{f.__name__}-{name}" for f, name in CASES])
def test_negative_zero_and_impossible_inputs_are_refused_in_one_line(function, name):
    assert function(**VALID[function])
    kind = inspect.signature(function).parameters[name].annotation
    bad = [-1, float("nan"), float("inf"), -float("inf"), "8", None]
    if get_origin(kind) is Literal:
        bad += [max(get_args(kind)) * 2]
    else:
        bad += [0, 0.0, True]
    if kind is int:
        bad += [1.5]
    if kind is cost.Fraction:
        bad += [1.01]
    for value in bad:
        refused(function, name, value)


def test_inputs_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="^mfu=2.0: no GPU exceeds its peak$"):
        cost.mfu(1e3, 2, peak_flops=1e3)
    with pytest.raises(ValueError, match="^stages=7: must be even for dualpipe$"):
        cost.pipeline_bubble("dualpipe", 7)
    assert cost.pipeline_bubble("zb1p", 7) == 6
    with pytest.raises(ValueError, match=r"^W=2: must be less than the backward B=2"):
        cost.pipeline_bubble("one_f_one_b", 8, W=2)
    with pytest.raises(ValueError, match=r"^W=1.9: must be smaller: the bubble would be negative$"):
        cost.pipeline_bubble("dualpipe", 8, W=1.9)
