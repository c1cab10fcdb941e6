"""What chapter 13 counts and draws: bytes that stay alive, bytes that ranks exchange, stacked bars, and the claims."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from minids.course.claims import COMPUTED, HOW, MEASURED, QUOTED, claims_table
from minids.course.counted_bytes import CountedBytes
from minids.course.stacked import stacked_bars
from minids.parallel.launch import launch
from minids.training.live_bytes import LiveBytes

CLAIMS = Path(__file__).parents[2] / "docs/CLAIMS.md"


def test_live_bytes_are_those_that_autograd_and_names_keep():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = (x * 2).exp().sum()  # autograd keeps the result of exp, 4000 bytes; the sum has 4
    assert live.total == 4004
    y.backward()
    assert live.total == 4


def test_live_bytes_count_a_storage_once_and_no_views_of_what_was_there():
    x = torch.zeros(100)
    with LiveBytes() as live:
        views = [x[:10], x.view(10, 10)]
        new = torch.ones(50)
        views.append(new[:5])
    assert live.total == 200 and len(views) == 3


def test_live_bytes_fall_where_results_are_recomputed():
    x = torch.ones(1000, requires_grad=True)

    def function(x):
        return x.exp().sin().exp()

    totals = []
    for run in (function, lambda x: checkpoint(function, x, use_reentrant=False)):
        with LiveBytes() as live:
            y = run(x)
        totals.append(live.total)
        y.sum().backward()
    assert totals == [8000, 4000]  # exp keeps its result, sin its input, which is the same storage


def test_counted_bytes_are_those_of_each_collective():
    def work(rank):
        sent = torch.zeros(8)
        with CountedBytes() as counted:
            part = torch.empty(4)
            dist.reduce_scatter_single(part, sent)
            dist.all_gather_single(sent, part)
            dist.all_to_all_single(torch.empty(8), sent)
            dist.send(part, 1) if rank == 0 else dist.recv(part, 0)
        return dict(counted.bytes)

    first, second = launch(work, 2)
    both = {"gradients scattered": 16, "weights gathered": 16, "rows to experts and back": 32}
    assert first == both | {"residual stream between stages": 16} and second == both


def test_stacked_bars_add_up_and_show_totals_and_the_limit():
    figure = stacked_bars(
        {"a": {"x": 30.0, "y": 5.0}, "b": {"x": 1.0, "y": 1.5}}, "size (GB)", "A title", (20, "20 GB")
    )
    (axes,) = figure.axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.containers[-1]]
    assert ends == [35.0, 2.5]
    assert [text.get_text().strip() for text in axes.texts] == ["35", "2.5", "20 GB"]
    assert axes.get_xlim()[1] > 35


def test_the_table_of_claims_has_the_twenty_with_their_verdicts():
    table, how = claims_table(CLAIMS)
    assert len(how) == len(HOW) == 20 and set(how) == {COMPUTED, MEASURED, QUOTED}
    assert "| V3 cost less than a tenth of GPT-4o ... | not checkable | **quoted** | 00 |" in table


def test_a_claim_that_is_not_in_the_document_is_named(tmp_path):
    (tmp_path / "CLAIMS.md").write_text("| something else | x | agrees | y | z |")
    with pytest.raises(ValueError, match="has 0 claims that begin with 'V3: 2048 H800"):
        claims_table(tmp_path / "CLAIMS.md")
