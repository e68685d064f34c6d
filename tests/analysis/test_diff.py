"""What a difference of two runs must be, whatever the runs: exact, antisymmetric, zero for equal runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.analysis.causes import changes
from lab.analysis.counterfactual import HEADLINES
from lab.analysis.diff import diff
from lab.analysis.difference import Diff
from lab.analysis.frames import PARTS, intervals
from lab.analysis.verdict import verdict
from tests.analysis.toy import ToyRun, linear, pair, toy_run

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 30)
pools = st.sampled_from([24, 40, 200])
few = settings(max_examples=20, deadline=None)


def total_ns(d: Diff, latency: str, stage: str) -> int:
    return int(d.requests[f"{latency}_{stage}_delta_ns"].sum())


@few
@given(seeds, sizes, pools)
def test_toy_runs_tile_every_request(seed: int, count: int, blocks: int) -> None:
    """The generator obeys the rule that the analysis relies on."""
    run = toy_run(seed, count, blocks=blocks)
    pieces = intervals(run.requests).groupby("id")
    for row in run.requests.itertuples():
        part = pieces.get_group(row.id)
        assert part["start_ns"].iloc[0] == row.arrival_ns
        assert part["end_ns"].iloc[-1] == row.end_ns
        assert all(end == start for end, start in pairwise_edges(part))


def pairwise_edges(part: pd.DataFrame) -> list[tuple[int, int]]:
    return [(a[1], b[0]) for a, b in pairwise(zip(part["start_ns"], part["end_ns"], strict=True))]


@few
@given(seeds, sizes, pools)
def test_stage_differences_sum_to_each_requests_difference_exactly(
    seed: int, count: int, blocks: int
) -> None:
    real, sim, _ = pair(seed, count=count, blocks=blocks)
    d = diff(real, sim)
    for latency in ("e2e", "ttft"):
        parts = sum(d.requests[f"{latency}_{stage}_delta_ns"] for stage in PARTS)
        assert (parts == d.requests[f"{latency}_delta_ns"]).all()
        assert d.attribution[latency]["residual_ns"] == 0
    both = real.requests.set_index("id"), sim.requests.set_index("id")
    expected = (both[1]["last_token_ns"] - both[0]["last_token_ns"]).sort_index()
    assert d.requests["e2e_delta_ns"].tolist() == expected.tolist()


@few
@given(seeds, sizes, pools)
def test_identical_runs_differ_by_exactly_nothing(seed: int, count: int, blocks: int) -> None:
    run = toy_run(seed, count, blocks=blocks)
    d = diff(run, run, run)
    assert d.decisions["first_divergent_step"] is None
    assert d.decisions["common_prefix_ratio"] == 1.0
    assert d.parity is True
    assert all(cell["error_pct"] == 0 for cell in d.metrics.values())
    assert not d.requests[[c for c in d.requests if c.endswith("_delta_ns")]].to_numpy().any()
    assert d.distances["interval_iou"] == 1.0
    values = [v for kind in ("e2e", "ttft", "itl", "completions") for v in d.distances[kind].values()]
    assert all(value in (0, None) for value in values)
    assert d.counterfactual is not None
    assert all(value == 0 for split in d.counterfactual.values() for value in split.values())
    assert all(cell["delta_ms"] == 0 for cell in d.attribution["steps"]["phases"].values())


@few
@given(seeds, sizes)
def test_swapping_the_runs_negates_signed_values_and_keeps_distances(seed: int, count: int) -> None:
    real, sim, _ = pair(seed, count=count, blocks=40)
    there, back = diff(real, sim), diff(sim, real)
    for latency in ("e2e", "ttft"):
        for stage in PARTS:
            assert total_ns(there, latency, stage) == -total_ns(back, latency, stage)
            cells = (d.attribution[latency]["stages"][stage] for d in (there, back))
            left, right = (cell["share"] for cell in cells)
            assert left == pytest.approx(right)
    assert there.distances["interval_iou"] == pytest.approx(back.distances["interval_iou"])
    assert there.distances["e2e"]["ks"] == back.distances["e2e"]["ks"]
    assert there.distances["completions"]["area_ns"] == -back.distances["completions"]["area_ns"]
    assert there.decisions["first_divergent_step"] == back.decisions["first_divergent_step"]


@few
@given(seeds, sizes)
def test_area_between_completion_curves_is_the_sum_of_differences(seed: int, count: int) -> None:
    real, sim, _ = pair(seed, count=count)
    d = diff(real, sim)
    found = d.distances["completions"]
    assert found["area_ns"] == found["sum_of_differences_ns"] == d.requests["e2e_delta_ns"].sum()
    assert found["absolute_area_over_lifetime"] >= 0


@few
@given(seeds, st.integers(2, 30))
def test_duration_and_decision_error_add_up_and_equal_rules_leave_no_decision_error(
    seed: int, count: int
) -> None:
    real, sim, again = pair(seed, count=count, blocks=40)
    d = diff(real, sim, again)
    assert d.parity is True
    assert d.counterfactual is not None
    for name in HEADLINES:
        if name not in d.counterfactual:
            continue
        split = d.counterfactual[name]
        assert split["total"] == pytest.approx(split["duration"] + split["decision"], abs=1e-9)
        assert split["decision"] == pytest.approx(0, abs=1e-9)


def test_a_hidden_rule_shows_as_decision_error_and_broken_parity() -> None:
    """Equal durations, another order of the queue: nothing of it may be called duration error."""
    options = {"count": 60, "rate_per_s": 400.0, "max_seqs": 4}
    cost = linear()
    real = toy_run(3, backend="real", cost=cost, **options)
    sim = toy_run(3, cost=cost, swap_order_from_step=20, **options)
    d = diff(real, sim, sim)
    assert d.parity is False
    assert d.counterfactual is not None
    assert d.counterfactual["ttft_ms.mean"]["duration"] == 0
    assert d.counterfactual["ttft_ms.mean"]["decision"] != 0
    assert any("Parity fails" in sentence for sentence in verdict(d))


@pytest.mark.parametrize("step", [20, 35, 50])
def test_planted_divergence_is_found_at_its_step_with_its_cause(step: int) -> None:
    options = {"count": 80, "rate_per_s": 2000.0, "max_seqs": 4}
    a = toy_run(5, **options)
    b = toy_run(5, swap_order_from_step=step, **options)
    d = diff(a, b)
    admissions = a.plans[(a.plans["step"] >= step) & (a.plans["admitted"].map(len) > 0)]
    assert d.decisions["first_divergent_step"] == int(admissions["step"].iloc[0])
    found = d.decisions["first_divergence"]
    assert found["cause"] == "rule"
    first = admissions["admitted"].iloc[0][0]
    assert first in found["difference"]["admitted"]["a"]
    assert found["a"]["now_ns"] == found["b"]["now_ns"]
    assert changes(d)


def test_divergence_by_time_names_the_request_that_had_arrived_on_one_side_only() -> None:
    real, sim, _ = pair(1, count=60, blocks=60)
    found = diff(real, sim).decisions["first_divergence"]
    assert found["cause"] == "arrivals"
    (late,) = found["arrived_only"]["sim"] or found["arrived_only"]["real"]
    arrival = int(real.requests.set_index("id").loc[late, "arrival_ns"])
    low, high = sorted(found[key]["now_ns"] for key in ("real", "sim"))
    assert low < arrival <= high


def test_a_run_that_is_a_prefix_of_the_other_diverges_where_it_ends() -> None:
    whole = toy_run(2, count=20)
    cut = replace(whole, steps=whole.steps.iloc[:30], plans=whole.plans.iloc[:30])
    d = diff(whole, cut)
    assert d.decisions["first_divergent_step"] == 30
    assert d.decisions["first_divergence"]["cause"] == "ended"


def test_requests_that_cannot_be_aligned_are_named_and_left_out() -> None:
    a, b = toy_run(4, count=20), toy_run(4, count=20)
    gone = a.requests["id"].iloc[3]
    rejected = b.requests.copy()
    rejected.loc[rejected["id"] == "r0007", "outcome"] = "rejected"
    d = diff(a, replace(b, requests=rejected[rejected["id"] != gone]))
    assert d.alignment["matched"] == 18
    assert d.alignment["only"] == {"a": [gone], "b": []}
    assert d.alignment["unlike_outcome"] == ["r0007"]
    assert any("not alike" in sentence for sentence in verdict(d))


def test_a_run_whose_intervals_leave_a_gap_shows_a_residual() -> None:
    """The residual is measured, not assumed."""
    run = toy_run(6, count=10)
    broken = run.requests.copy(deep=True)
    pieces = [dict(piece) for piece in broken["intervals"].iloc[0]]
    pieces[-1]["start_ns"] += 1000
    broken["intervals"] = [pieces, *broken["intervals"].iloc[1:]]
    d = diff(run, replace(run, requests=broken))
    assert d.attribution["e2e"]["residual_ns"] == 1000


def test_sides_are_named_by_backend_and_otherwise_a_and_b() -> None:
    real, sim, _ = pair(0, count=5)
    assert diff(real, sim).keys == ("real", "sim")
    assert diff(sim, sim).keys == ("a", "b")
    assert set(diff(real, sim).metrics["ttft_ms.p50"]) == {"real", "sim", "error_pct"}


@few
@given(seeds, st.integers(0, 3))
def test_json_is_strict_sorted_and_has_the_documented_keys(seed: int, count: int) -> None:
    real, sim, again = pair(seed, count=count)
    tree = diff(real, sim, again).to_json()
    text = json.dumps(tree, allow_nan=False)
    assert list(tree) == sorted(tree)
    assert json.loads(text) == tree
    assert tree["decisions"]["first_divergent_step"] is None or tree["decisions"]["first_divergent_step"] >= 0
    assert tree["replay"]["parity"] is True
    assert {"e2e", "ttft", "steps"} == set(tree["attribution"])


def test_an_undefined_metric_is_null_and_a_change_from_zero_has_no_percentage() -> None:
    run = toy_run(0, count=5)
    other: ToyRun = replace(run, metrics={**run.metrics, "preemptions": 3, "queue_ms": {"p50": float("nan")}})
    d = diff(run, other)
    assert d.metrics["preemptions"] == {"a": 0, "b": 3, "error_pct": None}
    assert d.metrics["queue_ms.p50"]["b"] is None
