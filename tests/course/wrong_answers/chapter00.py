"""Wrong answers to the exercises of chapter 00."""

import math

RECOGNISED = "this is what comes out when {}"


def counts(h, i, la, n, kv, w, e, c, v):
    """The correct counts, by another way."""
    layer = h * (2 * n * w + 2 * kv * w) + e * h + 2 * h
    stored, used = (la * (layer + k * 3 * h * i) + h + 2 * v * h for k in (e, c))
    return stored, used, used - v * h - (2 * la + 1) * h


def counts_of_floats(*sizes):
    return tuple(float(count) for count in counts(*sizes))


def eight_times_seven(h, i, la, n, kv, w, e, c, v):
    dense = la * (2 * h * (n + kv) * w + 3 * h * i) + 2 * v * h
    return e * dense, c * dense, c * dense


def one_table_and_no_router(h, i, la, n, kv, w, e, c, v):
    stored, used, multiplied = counts(h, i, la, n, kv, w, e, c, v)
    less = v * h + la * e * h
    return stored - less, used - less, multiplied - less


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


def time(flops, size, tokens, peak, bandwidth):
    return 1e6 * tokens * max(flops / peak, size / bandwidth)


def decode(n, kv, w, r, ro, t, p, b, *, gqa=1.0, mla=1.0):
    """The correct times, with the bytes of either kind multiplied by a factor."""
    return (
        time(4 * n * w, 4 * kv * w * gqa, t, p, b),
        time(2 * n * (2 * r + ro), 2 * (r + ro) * mla, t, p, b),
    )


def expanded(n, kv, w, r, ro, t, p, b):
    return decode(n, kv, w, r, ro, t, p, b)[0], time(2 * n * (2 * w + ro), 2 * (r + ro), t, p, b)


WRONG = {
    "0.1": [
        ("floats", counts_of_floats, "the parameters stored: the value is correct, but return an int, not a float"),
        ("eight models of seven billion", eight_times_seven, r"the parameters stored: got \d+, expected \d+"),
        ("two counts", lambda *sizes: counts(*sizes)[:2], "should have 3 parts, not 2"),
        ("in billions", lambda *sizes: tuple(n / 1e9 for n in counts(*sizes)), "the parameters stored: got 46.7"),
        (
            "two mistakes: no router, one table",
            one_table_and_no_router,
            RECOGNISED.format("the router's own matrix is left out and one matrix serves as embedding and as head"),
        ),
    ],
    "0.2": [
        ("only V3 in 16 bits", only_v3, "it misses a bug; hint: V2 is served with 6 bits"),
        ("one layer", one_layer, "it misses a bug; hint: how many layers"),
        ("too strict: an int", wants_an_int, "it rejects the correct implementation"),
        ("too strict: the number of the book", believes_the_book, "it rejects the correct implementation"),
        ("too weak: an inequality", an_inequality, "it misses a bug; hint: compare with a published number"),
        ("no assert", lambda cache_bytes: cache_bytes(1, (2,), 3, 8) == 6, "a test needs an assert that can fail"),
    ],
    "0.3": [
        ("the causal half forgotten", lambda seed: 320.0, "tokens: median 320, from 320"),
        ("V3's context", lambda seed: 29_317.0, "expected: a median between 6"),
        ("a text", lambda seed: "640", "the function should return a float"),
        ("a tuple", lambda seed: (81_920.0, 256.0), "the function should return a float"),
        ("a division by zero", lambda seed: 1 / 0, "your code raised ZeroDivisionError"),
    ],
    "0.4": [
        ("seconds", lambda *a: tuple(1e-6 * t for t in decode(*a)), "the microseconds of GQA: got 0.00016026, exp"),
        ("MLA expanded", expanded, "the microseconds of MLA: got .*, expected"),
        ("MLA only", lambda *a: decode(*a)[1], "should be a tuple of 2: the microseconds of GQA, the microseconds of"),
        ("keys of every query head", lambda *a: decode(*a, gqa=a[0] / a[1]), "the microseconds of GQA: got 2564"),
        (
            "two mistakes: one byte, the longer and the shorter added",
            lambda n, kv, w, r, ro, t, p, b: (
                1e6 * t * (4 * n * w / p + 2 * kv * w / b),
                1e6 * t * (2 * n * (2 * r + ro) / p + (r + ro) / b),
            ),
            RECOGNISED.format("the two times are added, although a GPU reads and computes at once and a value has one"),
        ),
    ],
}
