"""Wrong answers to the exercises of chapter 06."""

import math

import torch

from minids.course.exercises import chapter06 as given
from minids.fp8.formats import quantize


def value(code, exponent_bits=4):
    mantissa_bits = 7 - exponent_bits
    e, m = code >> mantissa_bits & 2**exponent_bits - 1, code & 2**mantissa_bits - 1
    bias, whole = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    size = 2.0 ** (e - bias) * (1 + m / whole) if e else 2.0 ** (1 - bias) * m / whole
    return (-1) ** (code >> 7) * (math.nan if code & 127 == 127 else size)


def decode_of_other_format(codes):
    return torch.tensor([value(code, exponent_bits=5) for code in codes])


def decode_without_subnormals_and_with_infinities(codes):
    return given.decode_by_arithmetic(codes, subnormals=False, infinities=True)


def tiles_of_the_package(x, width):
    q, scale = quantize(x, (1, width))
    return q.float(), scale


def tiles_in_eight_bits(x, width):
    q, scale = given.tiles_by_hand(x, width)
    return q.to(torch.float8_e4m3fn), scale


def tiles_without_the_last(x, width):
    q, scale = given.tiles_by_hand(x[:, : x.shape[1] // width * width], width)
    return q, scale


def tiles_as_lists(x, width):
    q, scale = given.tiles_by_hand(x, width)
    return q, scale.tolist()


def tiles_for_another_maximum(x, width):
    return given.tiles_by_hand(x, width, scale_of=lambda maximum: maximum.clamp_min(1e-4) / 240)


def tiles_with_two_mistakes(x, width):
    return given.tiles_by_hand(x, width, magnitude=lambda part: part, per_row=True)


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


def gradient_without_scales(x, grad, height):
    return quantize(grad, (height, 1))[0].float().T @ quantize(x, (height, 1))[0].float()


def gradient_with_input_along_channels(x, grad, height):
    return given.rounded(grad, (height, 1)).T @ given.rounded(x, (1, height))


def gradient_with_two_mistakes(x, grad, height):
    return (grad.T @ given.rounded(x, (1, height))).T


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


WRONG = {
    "6.1": [
        ("a list", lambda codes: [value(code) for code in codes], r"should be a tensor, got \[1, 1\.125, -2\]"),
        ("float64", lambda codes: given.decode(codes).double(), r"of torch\.float32, got torch\.float64"),
        ("PyTorch's float8", given.decode, r"the result is correct, but PyTorch's float8 type decoded the bits"),
        ("5 exponent bits", decode_of_other_format, r"the first at \[0\]: got 0\.5, expected 1"),
        (
            "two mistakes",
            decode_without_subnormals_and_with_infinities,
            r"codes = \[0, 1, 7, 8, 129\].*\n.*\[0\]: got 0\.0",
        ),
    ],
    "6.2": [
        ("the package's function", tiles_of_the_package, r"is correct, but the package's `quantize` made it"),
        ("float8", tiles_in_eight_bits, r"q should be of torch\.float32, got torch\.float8_e4m3fn"),
        ("no narrow tile", tiles_without_the_last, r"example 4 of 7.*\n.*q should have shape \(3, 10\), got \(3, 8\)"),
        ("scales as lists", tiles_as_lists, r"the scales should be a tensor, got \["),
        ("q only", lambda x, width: given.tiles_by_hand(x, width)[0], r"should be a tuple of 2: q, the scales; got a"),
        ("240 for 448", tiles_for_another_maximum, r"the first at \[0, 0\]: got [\d.-]+, expected"),
        ("two mistakes", tiles_with_two_mistakes, r"the first at \[\d, \d\]: got [\d.-]+, expected"),
    ],
    "6.3": [
        ("tiles as long as there are scales", sum_of_tiles_as_long_as_scales, r"the result: got \S+, expected"),
        ("rounded down", lambda *a: given.promoted(*a, cut=floor_to), r"example 2 of 7.*\n.*got -\d+, expected -\d+"),
        ("one bit more", lambda p, s, bits: given.promoted(p, s, bits + 1), r"example 2 of 7.*\n.*: got \S+, expected"),
        ("one bit less", lambda p, s, bits: given.promoted(p, s, bits - 1), r"example 1 of 7.*\n.*: got \S+, expected"),
        ("the total is cut, too", sum_cut_again, r"the result: got \S+, expected"),
        ("the first scale for all", lambda p, s, b: given.promoted(p, [s[0]] * len(s), b), r"the result: got \S+, exp"),
        ("a list", lambda *a: [given.promoted(*a)], r"should be a number, got \[\d+"),
    ],
    "6.4": [
        ("no scales", gradient_without_scales, r"the first at \[0, 0\]: got \S+, expected"),
        ("the input along channels", gradient_with_input_along_channels, r"the first at \[0, 0\]: got \S+, expected"),
        ("two mistakes", gradient_with_two_mistakes, r"should have shape \(2, 3\), got \(3, 2\)"),
        ("tiles one longer", lambda x, g, h: given.weight_gradient(x, g, h + 1), r"values differ; the first at"),
        ("lists", lambda x, g, h: given.weight_gradient(x, g, h).tolist(), r"the result should be a tensor, got \[\["),
        ("one number", lambda x, g, h: given.weight_gradient(x, g, h).sum(), r"should have shape \(2, 3\), got \(\)"),
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
}
