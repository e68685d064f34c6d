"""The columns that a page carries say of each request and step what the run's tables say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lab.analysis.frames import intervals
from lab.analysis.page import columns
from lab.analysis.page.columns import fitted, in_stage, pack, shape
from tests.analysis.toy import ToyRun, pair, toy_run


def unpacked(run: ToyRun, window_s: tuple[float, float] | None = None) -> tuple[Any, dict[str, Any]]:
    """As `columns.js` does it."""
    shared = shape([run], window_s)
    tables = pack(run, shared)
    lanes, pieces, stretches, steps = (tables[n] for n in ("lanes", "pieces", "stretches", "steps"))
    lane = np.repeat(np.arange(len(shared.ids)), lanes["pieces"])
    ends = np.cumsum(pieces["length"].astype(np.int64))
    before = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(lanes["pieces"].astype(int))])[:-1]]
    end = ends - before[lane] + np.cumsum(lanes["arrival"].astype(np.int64))[lane]
    return shared, {
        "pieces": pd.DataFrame({"lane": lane, "end": end, "start": end - pieces["length"], **pieces}),
        "stretches": pd.DataFrame(
            stretches
            | {
                "lane": np.cumsum(stretches["lane"].astype(np.int64)),
                "step": np.cumsum(stretches["step"].astype(np.int64)),
            }
        ),
        "steps": pd.DataFrame(
            steps
            | {
                "step": np.cumsum(steps["step"].astype(np.int64)),
                "end": np.cumsum(steps["gap"].astype(np.int64) + steps["length"]),
            }
        ),
    }


def test_pieces_are_the_intervals_of_each_request() -> None:
    run = toy_run(3, count=60, blocks=30, rate_per_s=200.0)
    shared, got = unpacked(run)
    want = intervals(run.requests)
    assert (want["stage"] == "preempted").any()
    assert [shared.ids[lane] for lane in got["pieces"]["lane"]] == want["id"].tolist()
    assert [shared.stages[stage] for stage in got["pieces"]["stage"]] == want["stage"].tolist()
    for ours, theirs in (("start", "start_ns"), ("end", "end_ns")):
        assert got["pieces"][ours].tolist() == (want[theirs] // 1000).tolist()
    assert got["pieces"]["last_step"].tolist() == want["last_step"].tolist()


def test_stretches_give_back_every_batch() -> None:
    run = toy_run(5, count=60, blocks=30, rate_per_s=200.0)
    shared, got = unpacked(run)
    stretches = got["stretches"]
    assert len(stretches) < run.plans["request"].map(len).sum() / 3
    for plan in run.plans.itertuples():
        inside = stretches[
            (stretches["step"] <= plan.step) & (plan.step < stretches["step"] + stretches["steps"])
        ]
        past = plan.step - inside["step"]
        start = inside["start"] + past * inside["tokens"]
        batch = {
            (shared.ids[lane], at, n)
            for lane, at, n in zip(inside["lane"], start, inside["tokens"], strict=True)
        }
        assert batch == set(zip(plan.request, plan.start, plan.tokens, strict=True))


def test_steps_keep_their_moments_and_state() -> None:
    run = toy_run(1, count=30)
    _, got = unpacked(run)
    steps = got["steps"]
    assert steps["end"].tolist() == (run.steps["end_ns"] // 1000).tolist()
    for column in (
        "step",
        "prefill_tokens",
        "decode_tokens",
        "batch",
        "waiting",
        "blocks_held",
        "blocks_free",
    ):
        assert steps[column].tolist() == run.steps[column].tolist()


def test_more_steps_than_a_page_shows_are_merged_without_losing_tokens() -> None:
    run = toy_run(1, count=60)
    shared = shape([run], most_steps=50)
    steps = pack(run, shared)["steps"]
    assert len(steps["count"]) <= 50
    assert steps["count"].sum() == len(run.steps)
    for column in ("prefill_tokens", "decode_tokens"):
        assert steps[column].sum() == run.steps[column].sum()


def test_columns_are_thinned_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run(1, count=400, rate_per_s=200.0)
    whole, _ = fitted([run])
    assert len(whole.ids) == 400
    monkeypatch.setattr(columns, "MOST_REQUESTS", 400)
    monkeypatch.setattr(columns, "MOST_BYTES", 16000)
    thinned, tables = fitted([run])
    assert 50 <= len(thinned.ids) < 400
    assert thinned.total == 400
    assert columns._bytes(tables) <= 16000


def test_a_window_holds_the_requests_and_steps_that_touch_it() -> None:
    run = toy_run(2, count=80)
    low, high = 0.4, 0.9
    shared, got = unpacked(run, (low, high))
    inside = (run.requests["arrival_ns"] < high * 1e9) & (run.requests["end_ns"] > low * 1e9)
    assert shared.ids == run.requests.loc[inside, "id"].tolist()
    assert 0 < len(shared.ids) < 80
    touching = (run.steps["start_ns"] < high * 1e9) & (run.steps["end_ns"] > low * 1e9)
    assert got["steps"]["step"].tolist() == run.steps.loc[touching, "step"].tolist()


def test_stage_means_hold_all_the_time_that_requests_spent() -> None:
    run = toy_run(4, count=50, blocks=30, rate_per_s=200.0)
    shared = shape([run])
    edges = np.linspace(0, shared.end_ns, 38).astype(np.int64)
    means = in_stage(run, shared, edges)
    pieces = intervals(run.requests)
    for stage, values in means.items():
        own = pieces[pieces["stage"] == stage]
        spent = (own["end_ns"] - own["start_ns"]).sum()
        assert (values * np.diff(edges)).sum() == pytest.approx(spent)
        assert (values >= -1e-9).all()


def test_a_side_that_lacks_a_request_has_an_empty_lane() -> None:
    real, sim, _ = pair(1, count=12)
    sim = replace(sim, requests=sim.requests.drop(index=3))
    shared = shape([real, sim])
    assert pack(sim, shared)["lanes"]["pieces"][3] == 0
    assert len(shared.ids) == 12


def test_a_run_of_a_day_fits_into_its_unit_of_time() -> None:
    run = toy_run(0, count=3)
    day = 86_400_000_000_000
    for piece in run.requests.at[2, "intervals"]:
        piece["end_ns"] = day
    run.requests.loc[2, "end_ns"] = day
    shared = shape([run])
    assert shared.tick_ns == 100_000
    assert shared.end_ns // shared.tick_ns < 2**31
    assert pack(run, shared)["pieces"]["length"].max() <= day // shared.tick_ns
