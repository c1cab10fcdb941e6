"""Wrong answers to the exercises of chapter 06."""

import math

import torch

from minids.course.exercises import chapter06 as given
from minids.course.exercises import chapter06_mistakes as known
from minids.fp8.formats import dequantize, quantize


def encode_other_format(values):
    return torch.tensor(values).to(torch.float8_e5m2).view(torch.uint8).tolist()


def encode_with_two_mistakes(values):
    return known.encode(values, overflow=0, subnormals=False)


def encode_with_bias_8(values):
    return known.encode([2 * value for value in values])


def retile_with_the_package(q, scale, width, height):
    return given.retile(q, scale, width, height)


def retile_without_the_last(q, scale, width, height):
    q, new = known.retile(q, scale, width, height)
    return q[: len(q) // height * height], new[: len(q) // height]


def retile_for_another_maximum(q, scale, width, height):
    return known.retile(q, scale, width, height, scale_of=lambda amax: known.power_above(amax * 448 / 240))


def retile_in_eight_bits(q, scale, width, height):
    q, scale = known.retile(q, scale, width, height)
    return q.to(torch.float8_e4m3fn), scale


def retile_as_lists(q, scale, width, height):
    q, scale = known.retile(q, scale, width, height)
    return q, scale.tolist()


def retile_dequantised(q, scale, width, height):
    q, scale = known.retile(q, scale, width, height)
    return dequantize(q, scale, (height, 1)), scale


def sum_of_tiles_as_long_as_scales(products, scales, bits):
    size, total = len(scales), 0.0
    for i, scale in enumerate(scales):
        accumulator = 0.0
        for product in products[i * size : (i + 1) * size]:
            accumulator = given.truncate(accumulator + product, bits)
        total += accumulator * scale
    return total


def floor_to(x, bits):
    fraction, exponent = math.frexp(x)
    return math.ldexp(math.floor(math.ldexp(fraction, bits)), exponent - bits)


def sum_cut_again(products, scales, bits):
    return given.truncate(given.promoted_sum(products, scales, bits), bits)


def gradients_without_scales(x, grad, tokens_per_expert, height):
    parts = zip(grad.split(tokens_per_expert), x.split(tokens_per_expert), strict=True)
    return torch.stack([quantize(g, (height, 1))[0].float().T @ quantize(t, (height, 1))[0].float() for g, t in parts])


def gradients_without_empty_experts(x, grad, tokens_per_expert, height):
    return given.expert_gradients(x, grad, [n for n in tokens_per_expert if n], height)


def gradients_one_longer(x, grad, tokens_per_expert, height):
    return given.expert_gradients(x, grad, tokens_per_expert, height + 1)


def one_gradient_of_all(x, grad, tokens_per_expert, height):
    return given.expert_gradients(x, grad, [len(x)], height)[0]


def as_lists(x, grad, tokens_per_expert, height):
    return given.expert_gradients(x, grad, tokens_per_expert, height).tolist()


def close(one, other):
    return ((one - other).norm() / other.norm()) < 0.05


def only_normal_values(round_trip):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert close(round_trip(x, 4), x)


def only_zeros(round_trip):
    assert torch.equal(round_trip(torch.zeros(2, 8), 4), torch.zeros(2, 8))


def only_shapes(round_trip):
    for shape in ((1, 4), (2, 10)):
        assert round_trip(torch.ones(shape), 4).shape == shape


def wants_x_back(round_trip):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(x, 4), x)


def wants_one_percent(round_trip):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert ((round_trip(x, 4) - x).norm() / x.norm()) < 0.01


def wants_an_outlier_to_change_nothing(round_trip):
    x = torch.full((2, 8), 0.3)
    x[0, 1] = 1e8
    assert close(round_trip(x, 4)[0, 2:], x[0, 2:])


def nearest(x, below, above):
    return (x - below > (above - below) / 2).float()


WRONG = {
    "6.1": [
        ("a tensor", lambda values: torch.tensor(given.encode(values)), r"should be a list of 4; got a tensor"),
        (
            "floats",
            lambda values: list(map(float, known.encode(values))),
            r"is correct, but return an int, not a float",
        ),
        ("PyTorch's float8", given.encode, r"the result is correct, but PyTorch's float8 type made the codes"),
        ("5 exponent bits", encode_other_format, r"the result\[0\]: got 60, expected 56"),
        ("a bias of 8", encode_with_bias_8, r"the result\[0\]: got 64, expected 56"),
        ("two mistakes", encode_with_two_mistakes, r"example 2 of 5[\s\S]*got 0, expected 2"),
    ],
    "6.2": [
        ("the package's functions", retile_with_the_package, r"is correct, but the package's `quantize` made it"),
        ("float8", retile_in_eight_bits, r"q should be of torch\.float32, got torch\.float8_e4m3fn"),
        ("no short tile", retile_without_the_last, r"example 4 of 6.*\n.*q should have shape \(5, 7\), got \(4, 7\)"),
        ("scales as lists", retile_as_lists, r"the scales should be a tensor, got \["),
        ("q only", lambda *a: known.retile(*a)[0], r"should be a tuple of 2: q, the scales; got a"),
        ("240 for 448", retile_for_another_maximum, r"the first at \[0, 0\]: got [\d.-]+, expected"),
        ("dequantised", retile_dequantised, r"q: .*the first at \[\d, \d\]: got [\d.-]+, expected"),
    ],
    "6.3": [
        ("tiles as long as there are scales", sum_of_tiles_as_long_as_scales, r"the result: got \S+, expected"),
        ("rounded down", lambda *a: known.promoted(*a, cut=floor_to), r"example 2 of 7.*\n.*got -\d+, expected -\d+"),
        ("one bit more", lambda p, s, bits: known.promoted(p, s, bits + 1), r"example 2 of 7.*\n.*: got \S+, expected"),
        ("one bit less", lambda p, s, bits: known.promoted(p, s, bits - 1), r"example 1 of 7.*\n.*: got \S+, expected"),
        ("the total is cut, too", sum_cut_again, r"the result: got \S+, expected"),
        ("the first scale for all", lambda p, s, b: known.promoted(p, [s[0]] * len(s), b), r"the result: got \S+, exp"),
        ("a list", lambda *a: [known.promoted(*a)], r"should be a number, got \[\d+"),
    ],
    "6.4": [
        ("no scales", gradients_without_scales, r"the first at \[0, 0, 0\]: got \S+, expected"),
        ("empty experts left out", gradients_without_empty_experts, r"should have shape \(3, 5, 3\), got \(2, 5, 3\)"),
        ("tiles one longer", gradients_one_longer, r"values differ; the first at"),
        ("one gradient of all tokens", one_gradient_of_all, r"should have shape \(2, 2, 3\), got \(2, 3\)"),
        ("lists", as_lists, r"the result should be a tensor, got \["),
    ],
    "6.5": [
        ("normal values", only_normal_values, r"catches: the scale is inverted[\s\S]*hint: add an outlier"),
        ("zeros", only_zeros, r"misses a bug; hint: should the result not be close"),
        ("shapes", only_shapes, r"it accepts everything so far"),
        ("x itself", wants_x_back, r"it rejects the correct implementation\n.*AssertionError"),
        ("1 %", wants_one_percent, r"it rejects the correct implementation\n.*AssertionError"),
        ("the tile of an outlier", wants_an_outlier_to_change_nothing, r"it rejects the correct implementation"),
        ("no function", "a test", r"test_round_trip should be a function, got 'a test'"),
    ],
    "6.6": [
        ("to nearest", lambda seed: known.mean_weight(seed, nearest), r"median 1, .*\n.*between 1.95 and 2.05"),
        ("always up", lambda seed: known.mean_weight(seed, lambda x, below, above: torch.ones(1000)), r"median inf"),
        ("always down", lambda seed: known.mean_weight(seed, lambda x, below, above: torch.zeros(1000)), r"median 1,"),
        (
            "a coin",
            lambda seed: known.mean_weight(seed, lambda x, below, above: torch.full((1000,), 0.5)),
            r"median \d+",
        ),
        ("a list", lambda seed: [known.mean_weight(seed)], r"the function should return a float, got"),
    ],
}
