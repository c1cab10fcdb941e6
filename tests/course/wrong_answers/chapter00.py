"""Wrong answers to the exercises of chapter 00."""

import math

RECOGNISED = "this is what comes out when {}"


def moe_layer_as_floats(hidden, inner, routed, shared, chosen):
    expert, router = 3.0 * hidden * inner, routed * hidden
    return (routed + shared) * expert + router, (chosen + shared) * expert + router


def moe_layer_one_more(hidden, inner, routed, shared, chosen):
    expert, router = 3 * hidden * inner, routed * hidden
    return (routed + shared) * expert + router, (chosen + shared + 1) * expert + router


def moe_layer_with_three_mistakes(hidden, inner, routed, shared, chosen):
    return (routed + 1) * 2 * hidden * inner, (chosen + 1) * 2 * hidden * inner


def hours(weights, layers, heads, width, seq_len, tokens, mfu, peak):
    forward = 2 * weights + 2 * layers * heads * width * seq_len / 2
    return tokens * 3 * forward / (mfu * peak) / 3600


def hours_of_one_head(weights, layers, heads, width, seq_len, tokens, mfu, peak):
    return hours(weights, layers, 1, width, seq_len, tokens, mfu, peak)


def serving(hits, misses, outputs, prices, nodes, usd):
    cost = nodes * 8 * 24 * usd
    revenue = (hits * prices[0] + misses * prices[1] + outputs * prices[2]) / 1e6
    return cost, revenue, revenue / cost - 1


def only_v3(cache_bytes):
    assert cache_bytes(61, (512, 64), 1, 16) == 70_272


def one_layer(cache_bytes):
    assert cache_bytes(1, (512, 64), 1, 6) == 432


def wants_an_int(cache_bytes):
    assert type(cache_bytes(61, (512, 64), 1, 16)) is int


def believes_the_book(cache_bytes):
    assert math.isclose(cache_bytes(61, (16384, 16384), 128_000, 16), 7.8 * 2**30, rel_tol=0.01)


def an_inequality(cache_bytes):
    assert cache_bytes(60, (512, 64), 1, 6) < cache_bytes(61, (512, 64), 1, 16)


WRONG = {
    "0.1": [
        ("floats", moe_layer_as_floats, "the parameters stored: the value is correct, but return an int, not a float"),
        ("one expert too many", moe_layer_one_more, r"the parameters used: got \d+, expected \d+"),
        ("three mistakes at once", moe_layer_with_three_mistakes, r"the parameters stored: got \d+, expected \d+"),
        ("the sum of the two", lambda *a: sum(moe_layer_one_more(*a)), "should be a tuple of 2: the parameters stored"),
        (
            "two mistakes: no router, no shared expert used",
            lambda h, i, r, s, c: ((r + s) * 3 * h * i, c * 3 * h * i),
            RECOGNISED.format("the router's own matrix is left out and a token does not use the shared experts"),
        ),
    ],
    "0.2": [
        ("a whole number of hours", lambda *a: round(hours(*a)), "example 3 of 3.*\n.*the result: got "),
        ("one head", hours_of_one_head, "example 1 of 3, weights = 3.662e"),
        ("a list", lambda *a: [hours(*a)], "the result should be a number, got"),
        ("days", lambda *a: hours(*a) / 24, "the result: got .*, expected "),
        (
            "two mistakes: forward only, no attention",
            lambda w, la, h, wi, s, t, m, p: t * 2 * w / (m * p) / 3600,
            RECOGNISED.format("only the forward pass is counted and attention is left out"),
        ),
        (
            "two mistakes: seconds, the whole sequence",
            lambda w, la, h, wi, s, t, m, p: t * 6 * (w + la * h * wi * s) / (m * p),
            "also to what comes after it and the result is in seconds",
        ),
    ],
    "0.3": [
        ("only V3 in 16 bits", only_v3, "it misses a bug; hint: V2 is served with 6 bits"),
        ("one layer", one_layer, "it misses a bug; hint: how many layers"),
        ("too strict: an int", wants_an_int, "it rejects the correct implementation"),
        ("too strict: the number of the book", believes_the_book, "it rejects the correct implementation"),
        ("too weak: an inequality", an_inequality, "it misses a bug; hint: compare with a published number"),
        ("no assert", lambda cache_bytes: cache_bytes(1, (2,), 3, 8) == 6, "a test needs an assert that can fail"),
    ],
    "0.4": [
        ("without the margin", lambda *a: serving(*a)[:2], "should have 3 parts, not 2"),
        ("the margin only", lambda *a: serving(*a)[2], "should be a tuple of 3: the cost, the revenue, the margin"),
        ("revenue first", lambda *a: (serving(*a)[1], serving(*a)[0], serving(*a)[2]), "the cost: got .*, expected"),
        (
            "two mistakes: one GPU a node, share of the revenue",
            lambda h, m, o, p, n, u: (
                n * 24 * u,
                (h * p[0] + m * p[1] + o * p[2]) / 1e6,
                1 - n * 24 * u * 1e6 / (h * p[0] + m * p[1] + o * p[2]),
            ),
            RECOGNISED.format("a node has one GPU and the profit is divided by the revenue"),
        ),
        (
            "output tokens are not sold",
            lambda h, m, o, p, n, u: serving(h, m, 0, p, n, u),
            "the revenue: got .*, expected",
        ),
    ],
    "0.5": [
        (
            "a rounded share",
            lambda g, y, k, c, r: round((g / (y * 8760) + k * c) / r, 2),
            "the result: got 0.53, expected",
        ),
        ("a tuple", lambda g, y, k, c, r: (g / (y * 8760), k * c), "the result should be a number, got"),
        ("leap years", lambda g, y, k, c, r: (g / (y * 365.25 * 24) + k * c) / r, "the result: got .*, expected"),
        (
            "two mistakes: no power, first year",
            lambda g, y, k, c, r: g / 8760 / r,
            RECOGNISED.format("all the capital is written off in the first year and power is left out"),
        ),
        (
            "two mistakes: power for hours of use only, days",
            lambda g, y, k, c, r: g / (y * 365) / (r - k * c),
            "not for all hours and a year is counted in days",
        ),
    ],
}
