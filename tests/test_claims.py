"""docs/CLAIMS.md: each claim has a verdict, its numbers follow from minids.cost, and chapter 00 quotes it verbatim."""

from collections import Counter

import pytest
from cost_configs import LLAMA, LLM_67B, V2, V3, gqa
from documents import ROOT, cells, read, rows

from minids import cost

DOCUMENT = ROOT / "docs/CLAIMS.md"
CLAIMS = {claim: (finding, verdict) for claim, finding, verdict, *_ in rows(read(DOCUMENT), columns=5)}
HOURS, ALL_HOURS = cost.V3_GPU_HOURS["pre-training"], sum(cost.V3_GPU_HOURS.values())
LLAMA_HOURS = 30.84e6


def less(config, other, bits=16):
    return 100 * (1 - cost.kv_bytes_per_token(config, bits) / cost.kv_bytes_per_token(other))


COMPUTED = [  # words of the claim, what its finding must contain
    (
        "less than two months",
        f"{HOURS / 2048 / 24:.1f} days of pre-training, {cost.rent_usd(ALL_HOURS) / 1e6:.3f} million",
    ),
    ("is pre-training alone", f"{cost.rent_usd(HOURS) / 1e6:.3f} million"),
    ("made post-training nearly free", f"{100 * cost.V3_GPU_HOURS['post-training'] / ALL_HOURS:.1f} %"),
    ("a few hundred thousand USD", f"{cost.rent_usd(sum(cost.R1_GPU_HOURS.values())) / 1e3:.0f} thousand"),
    ("16,000 H100 80 days", f"{LLAMA_HOURS / 1e6} million hours are {LLAMA_HOURS / 16384 / 24:.0f} days"),
    ("more than 60 million USD", f"{cost.rent_usd(LLAMA_HOURS) / 1e6:.1f} million"),
    ("1/10 of Meta's", f"{LLAMA_HOURS / ALL_HOURS:.1f} times fewer hours"),
    ("50,000 Hopper GPUs", f"at most {278 * 8:,} on one day"),
    ("944 million to run them", f"{100 * ALL_HOURS / (50_000 * 365 * 24):.2f} %"),
    ("589 billion", f"{589 / 0.17 / 1e3:.2f} trillion"),
    ("37 of 671", f"{cost.num_parameters(V3, active=True) / 1e9:.2f} of {cost.num_parameters(V3) / 1e9:.2f}"),
    ("256 routed experts", f"{V3.num_moe_layers} of {V3.num_hidden_layers} layers"),
    ("about 90 %", f"{less(V2, LLM_67B, 6):.1f}, {less(V2, LLM_67B):.1f} or {less(V3, gqa(V3, 128)):.1f} %"),
    ("inference 86 %", f"75 % is the same factor of {1 / 0.25:.0f}, 86 % is {1 / 0.14:.1f}"),
    ("No more compute", f"{49e9 * 33e12 / (37e9 * 14.8e12):.1f} times V3's work"),
]


@pytest.mark.parametrize("claim, number", COMPUTED)
def test_a_number_in_the_document_is_the_computed_one(claim, number):
    (finding,) = [finding for words, (finding, _) in CLAIMS.items() if claim in words]
    assert number in finding


def test_every_claim_has_one_of_four_verdicts():
    assert len(CLAIMS) == 52
    assert Counter(verdict for _, verdict in CLAIMS.values()) == {
        "agrees": 18, "partly": 8, "contradicted": 8, "not checkable": 18,
    }  # fmt: skip


def test_the_chapter_quotes_twenty_of_them_with_the_same_verdict():
    quoted = [
        row
        for cell in cells(ROOT / "chapters/00_claims.ipynb")
        for output in cell.get("outputs", [])
        for row in rows(output.get("data", {}).get("text/markdown", ""), columns=5)
    ]
    assert len(quoted) == 20
    for claim, _, verdict, *_ in quoted:
        assert CLAIMS[claim][1] == verdict.strip("*"), claim


def test_the_flops_of_llama_with_the_tokens_and_context_that_meta_reports():
    """15.6T tokens at a context of 8,192 (seen in secondary sources only), beside V3's run."""
    v3_flops = 14.8e12 * cost.training_flops_per_token(V3, 4096)
    llama_flops = 15.6e12 * cost.training_flops_per_token(LLAMA, 8192)
    assert llama_flops / v3_flops == pytest.approx(10.62, abs=0.005)
    assert (LLAMA_HOURS / llama_flops) / (HOURS / v3_flops) == pytest.approx(1.09, abs=0.005)
    assert llama_flops / (3600 * LLAMA_HOURS * cost.H800_PEAK_FLOPS) == pytest.approx(0.358, abs=0.0005)
    assert cost.gpu_hours_by_mfu(llama_flops, 0.41) / 1e6 == pytest.approx(27.0, abs=0.05)
