"""Several replicas in one run: a step is (replica, index), curves add up, and one replica looks as it did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lab.analysis.decisions import compare_decisions
from lab.analysis.diff import diff
from lab.analysis.drawing import summed
from lab.analysis.frames import intervals, stages_of
from lab.analysis.page.columns import pack, shape
from lab.analysis.plots import aligned_steps, figures
from lab.analysis.report import write_report
from lab.analysis.verdict import verdict
from tests.analysis.toy import ToyRun, toy_run


def fleet(*runs: ToyRun) -> ToyRun:
    """Runs as the replicas of one: their steps interleave in time, and both begin with step 0."""

    def joined(name: str) -> pd.DataFrame:
        parts = []
        for i, run in enumerate(runs):
            part = getattr(run, name).assign(replica=i)
            if name == "requests":
                part["id"] = f"{i}-" + part["id"]
            elif name == "plans":
                for column in ("request", "admitted", "preempted", "rejected"):
                    part[column] = [[f"{i}-{request}" for request in cell] for cell in part[column]]
            parts.append(part)
        key = {"requests": "arrival_ns", "steps": "end_ns", "plans": "now_ns"}[name]
        return pd.concat(parts).sort_values(key, kind="stable").reset_index(drop=True)

    return replace(
        runs[0], requests=joined("requests"), steps=joined("steps"), plans=joined("plans"), partial=False
    )


def test_divergence_of_one_replica_is_found_there_and_described_from_its_own_plan() -> None:
    options = {"count": 60, "rate_per_s": 2000.0, "max_seqs": 4}
    same, other = toy_run(5, **options), toy_run(6, **options)
    changed = toy_run(6, swap_order_from_step=20, **options)
    alone = compare_decisions(other, changed, ("a", "b"))
    found = compare_decisions(fleet(same, other), fleet(same, changed), ("a", "b"))
    assert found["first_divergent_step"] == alone["first_divergent_step"]
    assert found["first_divergence"]["replica"] == 1
    assert found["first_divergence"]["cause"] == "rule"
    here, there = (d["first_divergence"]["a"] for d in (found, alone))
    assert [f"1-{item['request']}" for item in there["work"]] == [item["request"] for item in here["work"]]
    assert 0.5 < found["common_prefix_ratio"] < 1
    d = diff(fleet(same, other), fleet(same, changed))
    assert any(f"step {alone['first_divergent_step']} of replica 1 of" in text for text in verdict(d))


def test_a_fleet_compared_with_itself_is_aligned_step_by_step() -> None:
    run = fleet(toy_run(1, count=20), toy_run(2, count=25))
    assert len(aligned_steps(run, run)) == len(run.steps)
    d = diff(run, run, run)
    assert d.parity is True
    assert d.decisions["first_divergent_step"] is None
    phases = d.attribution["steps"]["phases"]
    busy = (run.steps["end_ns"] - run.steps["start_ns"]).sum() / 1e6
    assert phases["idle"]["a_ms"] == pytest.approx(2 * run.steps["end_ns"].max() / 1e6 - busy)
    assert phases["idle"]["a_ms"] > 0


@pytest.mark.parametrize("idle", [False, True])
def test_curves_add_up_over_replicas_at_every_moment(idle: bool) -> None:
    parts = toy_run(1, count=20), toy_run(2, count=25)
    run = fleet(*parts)
    found = summed(run.steps, ("running",), idle=idle)

    def at(steps: pd.DataFrame, when: int) -> int:
        begun = steps[steps["start_ns"] <= when]
        if begun.empty or (idle and begun["end_ns"].iloc[-1] <= when):
            return 0
        return int(begun["running"].iloc[-1])

    assert len(found) > 50
    for when, value in zip(found["start_ns"], found["running"], strict=True):
        assert value == sum(at(part.steps, int(when)) for part in parts), when


def test_one_replica_is_drawn_from_its_own_steps() -> None:
    steps = toy_run(1, count=20).steps
    assert summed(steps, ("blocks_held",))["blocks_held"].tolist() == steps["blocks_held"].tolist()


def test_page_and_figures_of_a_fleet_keep_replicas_apart(tmp_path: Path) -> None:
    run = fleet(toy_run(1, count=8), toy_run(2, count=8))
    write_report(tmp_path / "r.html", [run, run], diff(run, run))
    drawn = pack(run, shape([run]))["steps"]
    number, replica = np.cumsum(drawn["step"].astype(np.int64)), np.asarray(drawn["replica"])
    assert sorted(set(replica.tolist())) == [0, 1]
    for place in (0, 1):
        steps = run.steps.loc[run.steps["replica"] == place, "step"]
        assert number[replica == place].tolist() == steps.tolist()
    assert len(list(figures([run]))) == len(list(figures([toy_run(1, count=8)])))


def swapping(run: ToyRun) -> ToyRun:
    """The same run with its preempted requests waiting in host memory, and copies in each fifth step."""
    requests = run.requests.copy()
    requests["intervals"] = [
        [
            piece | {"cause": "swapped" if piece["cause"] == "preempted" else piece["cause"]}
            for piece in pieces
        ]
        for pieces in requests["intervals"]
    ]
    steps = run.steps.assign(transfer_ns=np.where(run.steps["step"] % 5 == 0, 1_000_000, 0))
    return replace(run, requests=requests, steps=steps)


def test_waiting_swapped_out_is_a_stage_of_its_own_and_shown_only_where_it_happened(tmp_path: Path) -> None:
    run = toy_run(2, count=30, blocks=24)
    assert "preempted" in set(intervals(run.requests)["stage"])
    assert "swapped" not in stages_of(run)
    other = swapping(run)
    stages = intervals(other.requests)["stage"]
    assert (stages == "swapped").sum() == (intervals(run.requests)["stage"] == "preempted").sum()
    assert "swapped" in stages_of(run, other)
    d = diff(run, other)
    moved = d.attribution["e2e"]["stages"]
    assert moved["swapped"]["total_ms"] == -moved["preempted"]["total_ms"] > 0
    assert d.attribution["e2e"]["residual_ns"] == 0
    assert d.attribution["steps"]["phases"]["transfer"]["delta_ms"] == len(run.steps[::5])
    for runs, shown in (([run, run], False), ([run, other], True)):
        write_report(tmp_path / "r.html", runs, diff(*runs))
        page = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert ("queue, swapped out" in page) is shown
        assert ('<th scope="row">transfer</th>' in page) is shown
