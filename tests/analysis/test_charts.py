"""What the page's charts draw, number by number, against the runs' tables; no browser needed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lab.analysis.diff import diff
from lab.analysis.drawing import SIDE_COLOURS
from lab.analysis.page import words
from lab.analysis.page.charts import hits, latencies_ms, quantiles, residual_charts
from lab.analysis.page.columns import pack, shape
from lab.analysis.page.embed import available
from lab.analysis.page.house import Side, chart
from lab.analysis.page.many import along, members, trade
from lab.analysis.page.timeline import timeline
from tests.analysis.test_replicas import fleet
from tests.analysis.test_sweep import sweep
from tests.analysis.toy import linear, pair, toy_run

pytestmark = pytest.mark.skipif(not available(), reason="needs Bokeh")

SIDES = [Side("real", SIDE_COLOURS["real"], "solid"), Side("sim", SIDE_COLOURS["sim"], "dashed")]


def data(drawn: Any, glyph: str, nth: int = 0) -> dict[str, Any]:
    found = [one for one in drawn.renderers if one.glyph.__class__.__name__ == glyph]
    return dict(found[nth].data_source.data)


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_a_distribution_says_what_share_is_at_or_below_each_of_its_values(count: int) -> None:
    values = np.sort(np.random.default_rng(count).integers(0, 40, count).astype(float))
    x, share = quantiles(values)
    assert share[0] == 0
    assert (x[0], x[-1], share[-1]) == (values[0], values[-1], 100)
    for at, said in zip(x[1:], share[1:], strict=True):
        assert said == pytest.approx(100 * np.mean(values <= at), rel=1e-6)


def test_latencies_are_those_of_requests_that_finished() -> None:
    run = toy_run(1, count=20)
    whole = latencies_ms(run)
    run.requests.loc[3, "outcome"] = "aborted"
    left = latencies_ms(run)
    gone = run.requests.loc[3]
    assert len(left["TTFT"]) == len(left["E2E"]) == 19
    assert sorted([*left["E2E"], (gone["end_ns"] - gone["arrival_ns"]) / 1e6]) == pytest.approx(
        list(whole["E2E"])
    )
    assert len(whole["ITL"]) - len(left["ITL"]) == gone["output_tokens"] - 1


def test_cache_hits_so_far_and_by_window() -> None:
    run = toy_run(2, count=90)
    run.requests["cached_tokens"] = run.requests["prompt_tokens"] * np.arange(90) // 100
    (drawn,) = hits(
        [run], SIDES[:1], lambda height, title, unit, **more: chart(height, title, "s", unit, **more)
    )
    ordered = run.requests.sort_values("first_scheduled_ns")
    cached, prompt = (ordered[c].to_numpy() for c in ("cached_tokens", "prompt_tokens"))
    so_far = data(drawn, "Line")
    assert so_far["share"] == pytest.approx(100 * cached.cumsum() / prompt.cumsum(), rel=1e-5)
    windows = data(drawn, "Step")
    edges, share = windows["x"], windows["y"]
    moment = ordered["first_scheduled_ns"].to_numpy() / 1e9
    assert edges[0] == moment.min()
    for k in range(len(edges) - 1):
        last = k == len(edges) - 2
        inside = (moment >= edges[k]) & ((moment < edges[k + 1]) | last)
        if inside.any():
            assert share[k] == pytest.approx(100 * cached[inside].sum() / prompt[inside].sum())
        else:
            assert np.isnan(share[k])


def test_the_error_of_a_step_is_a_share_of_the_references_time() -> None:
    """One side's steps take half as long again, whatever their shape."""
    real = toy_run(1, count=40)
    sim = toy_run(1, count=40)
    length = sim.steps["end_ns"] - sim.steps["start_ns"]
    sim.steps["forward_ns"] += length // 2
    sim.steps["end_ns"] += length // 2
    for drawn in residual_charts(diff(real, sim)):
        cells = data(drawn, "Rect")
        assert cells["error"] == pytest.approx(50.0, abs=0.01)
        assert cells["b"] == pytest.approx(1.5 * cells["a"], rel=1e-4)
        assert cells["steps"].sum() == len(real.steps)


# -- columns ---------------------------------------------------------------------------------------------------


def test_a_bar_of_several_steps_has_their_sums_their_most_and_their_last() -> None:
    run = toy_run(1, count=60, rate_per_s=300.0)
    numbers = np.random.default_rng(0)
    for phase in ("plan_ns", "prepare_ns", "commit_ns", "transfer_ns"):
        run.steps[phase] = 1000 * numbers.integers(1, 90, len(run.steps))
    bars = pack(run, shape([run], most_steps=50))["steps"]
    first = np.concatenate([[0], np.cumsum(bars["count"].astype(int))])
    assert bars["count"].max() > 1
    for k, (low, high) in enumerate(itertools.pairwise(first)):
        own = run.steps.iloc[low:high]
        assert bars["host"][k] == own[["plan_ns", "prepare_ns", "commit_ns"]].sum().sum() // 1000
        assert bars["transfer"][k] == own["transfer_ns"].sum() // 1000
        for name in ("batch", "waiting", "running"):
            assert bars[name][k] == own[name].max()
        for name in ("blocks_held", "blocks_cached", "blocks_free"):
            assert bars[name][k] == own[name].iloc[-1]


def test_a_stretch_ends_where_a_request_is_computed_anew() -> None:
    run = toy_run(0, count=1)
    name = run.requests.at[0, "id"]
    rows = [(0, 16), (16, 16), (0, 16), (16, 16)]
    plans = pd.DataFrame(
        [{"step": k, "request": [name], "start": [start], "tokens": [n]} for k, (start, n) in enumerate(rows)]
    )
    found = pack(replace(run, plans=plans), shape([run]))["stretches"]
    assert found["steps"].tolist() == [2, 2]
    assert found["start"].tolist() == [0, 0]


def test_lanes_are_in_order_of_arrival_whatever_their_names() -> None:
    run = toy_run(2, count=12)
    run.requests["id"] = [f"z{11 - k:02d}" for k in range(12)]
    assert shape([run]).ids == [f"z{11 - k:02d}" for k in range(12)]


# -- over time -------------------------------------------------------------------------------------------------


def test_the_overview_draws_one_side_up_and_the_other_down_as_many_as_there_are() -> None:
    real, sim, _ = pair(1, count=40, blocks=60)
    drawn = timeline([real, sim], SIDES, None).charts["overview"][0]
    tops = [data(drawn, "VAreaStep", k)["y2"] for k in range(len(drawn.renderers)) if _is_area(drawn, k)]
    assert max(np.max(top) for top in tops) > 1
    assert min(np.min(top) for top in tops) < -1
    assert all(np.all(top >= 0) or np.all(top <= 0) for top in tops)
    spent = [(run.requests["end_ns"] - run.requests["arrival_ns"]).sum() / 1e9 for run in (real, sim)]
    t = data(drawn, "VAreaStep")["x"].astype(float)
    for time, extreme in zip(spent, (np.maximum, np.minimum), strict=True):
        outline = extreme.reduce(tops)[:-1]
        assert abs((outline * np.diff(t)).sum()) == pytest.approx(time, rel=0.01)


def _is_area(drawn: Any, k: int) -> bool:
    return k < sum(one.glyph.__class__.__name__ == "VAreaStep" for one in drawn.renderers)


def test_where_decisions_part_is_marked_on_each_sides_own_clock_in_its_colour() -> None:
    real, sim, again = pair(1, count=60, blocks=60)
    found = diff(real, sim, again)
    parted = found.decisions["first_divergence"]
    assert parted is not None
    drawn = timeline([real, sim], SIDES, found).charts["batch"][0]
    marks = {(one.location, one.line_color) for one in drawn.center if one.__class__.__name__ == "Span"}
    moments = [parted[key]["now_ns"] / 1e9 for key in found.keys]
    assert marks == {(moment, side.colour) for moment, side in zip(moments, SIDES, strict=True)}
    assert moments[0] != moments[1]


def test_rows_of_steps_are_replicas_side_by_side() -> None:
    run = fleet(toy_run(1, count=20), toy_run(2, count=25))
    steps = timeline([run, run], SIDES, None).charts["lanes"][1]
    labels = steps.yaxis[0].major_label_overrides
    assert [labels[k] for k in range(4)] == ["real 0", "sim 0", "real 1", "sim 1"]


def test_kv_blocks_are_stacked_to_the_pool() -> None:
    drawn = timeline([toy_run(1, count=9)], SIDES[:1], None).charts["kv"][0]
    areas = [one.glyph for one in drawn.renderers if one.glyph.__class__.__name__ == "VAreaStep"]
    assert [(area.y1, area.y2) for area in areas] == [
        (0, "held"),
        ("held", "cached_top"),
        ("cached_top", "free_top"),
    ]


# -- words -----------------------------------------------------------------------------------------------------


def test_an_error_is_graded_by_its_size_not_its_sign() -> None:
    sim = toy_run(1, count=40, cost=linear(1_000_000, 15_000, 100))
    rows = [row for section in words.summary([], diff(toy_run(1, count=40), sim)) for row in section]
    graded = {row["label"]: (row["error"], row["grade"]) for row in rows if row["grade"]}
    assert any(error.startswith("-") and grade == "poor" for error, grade in graded.values())
    for error, grade in graded.values():
        size = abs(float(error.rstrip(" %")))
        assert grade == ("good" if size < 4.95 else "fair" if 5.05 < size < 14.95 else "poor") or size in (
            5,
            15,
        )


def test_the_parting_step_is_told_as_each_side_had_it() -> None:
    real, sim, again = pair(1, count=60, blocks=60)
    found = diff(real, sim, again)
    told = words.parting(found)
    assert told is not None
    rows = dict(told["rows"])
    for i, key in enumerate(found.keys):
        state = found.decisions["first_divergence"][key]
        assert rows["clock (ms)"][i] == f"{state['now_ns'] / 1e6:.3f}"
        assert rows["requests running / waiting"][i] == f"{state['running']} / {state['waiting']}"
        blocks = " / ".join(str(state[f"blocks_{part}"]) for part in ("free", "cached", "held"))
        assert rows["KV blocks free / cached / held"][i] == blocks
        assert rows["tokens in the batch"][i] == str(sum(item["tokens"] for item in state["work"]))
    assert len(set(rows["requests running / waiting"])) + len(set(rows["tokens in the batch"])) > 2


# -- many runs -------------------------------------------------------------------------------------------------


def test_a_sweeps_lines_go_through_each_groups_runs_in_order() -> None:
    found = members(list(reversed(sweep())), ["#111111", "#222222"], "#999999")
    metric = "ttft_ms.p99"
    assert metric in found[0].metrics
    drawn = along(found, "trace.rate", metric, "TTFT p99 (ms)")
    assert drawn is not None
    for nth, policy in enumerate(("fcfs", "sjf")):
        mine = [m for m in found if m.group == policy]
        line = next(
            data(drawn, "Line", k)
            for k in (0, 1)
            if str(data(drawn, "Line", k)["label"][0]).startswith(policy)
        )
        assert line["x"] == [20.0, 40.0, 80.0]
        by_rate = {m.at["trace.rate"]: m.metrics[metric] for m in mine}
        assert line["y"] == [by_rate[rate] for rate in line["x"]], nth
    points = trade(found, ("throughput.requests_per_s", "requests/s"), (metric, "TTFT p99 (ms)"))
    assert points is not None
    dots = data(points, "Scatter")
    assert dots["x"] == [m.metrics["throughput.requests_per_s"] for m in found]
    assert dots["y"] == [m.metrics[metric] for m in found]


def test_what_else_was_varied_keeps_lines_apart() -> None:
    both = [
        replace(m, at={**m.at, "kv.blocks": float(k)})
        for k in (1, 2)
        for m in members(sweep(), ["#111111"] * 2, "#999999")
    ]
    drawn = along(both, "trace.rate", "ttft_ms.p99", "TTFT p99 (ms)")
    assert drawn is not None
    lines = [one for one in drawn.renderers if one.glyph.__class__.__name__ == "Line"]
    assert len(lines) == 4
    assert all(len(one.data_source.data["x"]) == 3 for one in lines)
