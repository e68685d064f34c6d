"""Runs that are not of the same work: only what they have in common is compared, and the verdict says so first."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.analysis.diff import diff
from lab.analysis.frames import scalars, sides
from lab.analysis.runs import load
from lab.analysis.scope import request_metrics
from lab.analysis.verdict import verdict
from lab.control.request import Prompt, SamplingParams, Segment
from lab.observe.rundir import RunDirectory
from tests.analysis.toy import ToyRun, pair, toy_run
from tests.observe.made import info_for, rich

few = settings(max_examples=8, deadline=None)


def interrupted(run: ToyRun, steps: int) -> ToyRun:
    """The run as Ctrl-C after so many steps would have left it."""
    kept = run.steps.iloc[:steps]
    now = int(kept["end_ns"].iloc[-1])
    requests = run.requests[run.requests["arrival_ns"] <= now].copy()
    late = requests["end_ns"] > now
    requests.loc[late, "outcome"], requests.loc[late, "end_ns"] = "unfinished", now
    metrics = {"requests": {"unfinished": int(late.sum())}, "e2e_ms": {"mean": 12345.0}, "steps": steps}
    return replace(
        run, requests=requests, steps=kept, plans=run.plans.iloc[:steps], metrics=metrics, partial=True
    )


@few
@given(st.integers(0, 1000), st.integers(20, 60))
def test_a_run_and_its_own_interrupted_beginning_differ_by_nothing(seed: int, steps: int) -> None:
    whole = toy_run(seed, count=20)
    for a, b in ((interrupted(whole, steps), whole), (whole, interrupted(whole, steps))):
        d = diff(a, b, whole)
        assert d.decisions["first_divergent_step"] is None
        assert set(d.decisions["steps"].values()) == {min(steps, len(whole.steps))}
        assert d.parity is None
        assert d.counterfactual is None
        assert all(cell["error_pct"] in (0, None) for cell in d.metrics.values()) or not d.scope.ids
        assert d.attribution["e2e"]["total_ms"] == 0
        assert verdict(d)[0].startswith("Partial run: ")
        assert not any("Parity" in sentence for sentence in verdict(d))


def test_metrics_of_a_partial_pair_are_those_of_the_requests_that_ended_in_both() -> None:
    real, sim, again = pair(3, count=40, rate_per_s=100.0)
    cut = interrupted(real, 60)
    d = diff(cut, sim, again)
    ended = set(cut.requests.loc[cut.requests["outcome"] == "finished", "id"])
    assert 5 < len(ended) < 40
    assert d.alignment["matched"] == len(ended)
    for key, run in (("real", cut), ("sim", sim)):
        own = run.requests[run.requests["id"].isin(ended)]
        mean = (own["last_token_ns"] - own["arrival_ns"]).mean() / 1e6
        assert d.metrics["e2e_ms.mean"][key] == pytest.approx(mean)
    assert d.metrics["e2e_ms.mean"]["real"] != cut.metrics["e2e_ms"]["mean"]
    assert "60 steps that both took" in verdict(d)[0]
    assert f"{len(ended)} requests that had ended in both" in verdict(d)[0]


def test_a_run_cut_before_anything_ended_is_shown_and_called_unlike() -> None:
    real, sim, again = pair(3, count=20)
    d = diff(interrupted(real, 1), sim, again)
    assert d.alignment["matched"] == 0
    assert "before any request had ended" in verdict(d)[0]
    assert not any("Mean E2E" in sentence for sentence in verdict(d))


def test_metrics_of_requests_follow_the_formulas_of_metrics_json(tmp_path: Path) -> None:
    recorder = rich()
    now = datetime.datetime(2026, 1, 2)
    with RunDirectory.create(tmp_path / "run", "x", now=now, key="k") as directory:
        stated = scalars(directory.save(recorder, info_for(recorder), block_size=16))
    found = scalars(request_metrics(load(tmp_path / "run").requests))
    assert {"ttft_ms.p99", "tpot_ms.p50", "itl_ms.p90", "e2e_ms.mean", "queue_ms.mean"} <= set(found)
    assert {"kv.prefix_hit_ratio_tokens", "preemptions", "requests.rejected"} <= set(found)
    assert found == pytest.approx({key: stated[key] for key in found})


def test_different_workloads_are_said_first_and_only_like_requests_compared() -> None:
    a, b = toy_run(4, count=20), toy_run(4, count=32)  # the first 20 are the same
    d = diff(a, b, b)
    assert verdict(d)[0].startswith("The workloads differ: 12 requests are in ")
    assert d.alignment["matched"] == 20
    assert d.counterfactual is None
    assert d.parity is None
    assert d.metrics["requests.finished"] == {"a": 20, "b": 20, "error_pct": 0}
    assert not any("policy, configuration or engine rules" in sentence for sentence in verdict(d))


def test_prompts_of_equal_lengths_and_other_contents_are_another_workload(tmp_path: Path) -> None:
    recorder, runs = rich(), []
    requests = [record.request for record in recorder.requests]
    other = [replace(r, prompt=Prompt((Segment(7, 0, len(r.prompt)),))) for r in requests]
    drawn = [replace(r, sampling=SamplingParams(seed=99)) for r in requests]
    for name, workload in (("same", requests), ("other", other), ("drawn", drawn)):
        with RunDirectory.create(
            tmp_path / name, "x", now=datetime.datetime(2026, 1, 2), key="k"
        ) as directory:
            directory.write_text("config.yaml", "backend: sim\n")
            directory.save(recorder, info_for(recorder), block_size=16, workload=workload)
        runs.append(load(tmp_path / name))
    assert diff(runs[0], runs[2]).scope.whole  # other draws of the same prompts
    d = diff(runs[0], runs[1], runs[0])
    assert d.parity is None
    assert "the prompts have the same lengths and other contents" in verdict(d)[0]
    assert "Nothing is re-simulated" in verdict(d)[0]


def test_workloads_without_a_like_request_blame_nobody() -> None:
    a, b = toy_run(4, count=20, rate_per_s=40.0), toy_run(4, count=20, rate_per_s=80.0)
    d = diff(a, b, b)
    first, *rest = verdict(d)
    assert first.startswith("The workloads differ: 20 arrive or measure otherwise")
    assert "No request is alike" in first
    assert d.alignment["matched"] == 0
    assert d.counterfactual is None
    assert not any("Mean E2E" in sentence or "Parity" in sentence for sentence in rest)


def test_a_request_rejected_by_one_run_alone_is_no_other_workload() -> None:
    a, b = toy_run(4, count=20), toy_run(4, count=20)
    b.requests.loc[3, "outcome"] = "rejected"
    d = diff(a, b, b)
    assert d.scope.whole
    assert d.counterfactual is not None


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        (
            "policy",
            {"name": "sjf", "window": 64},
            "as expected: the policies differ (policy.name fcfs / sjf)",
        ),
        ("kv", {"blocks": 5, "block_size": 16}, "as expected: the limits differ (kv.blocks 200 / 5)"),
        ("note", "x", "something other than time differs"),
    ],
)
def test_failed_parity_of_two_policies_is_expected(option: str, value: Any, said: str) -> None:
    options: dict[str, Any] = {"count": 60, "rate_per_s": 400.0, "max_seqs": 4}
    a = toy_run(3, backend="real", **options)
    b = toy_run(3, swap_order_from_step=20, **options)
    b = replace(b, config={**b.config, option: value})
    (sentence,) = (text for text in verdict(diff(a, b, b)) if text.startswith("Parity"))
    assert said in sentence


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (("sw/0", "sw/1"), ("sw/0", "sw/1")),
        (("x/sw/0", "y/sw/0"), ("x/sw/0", "y/sw/0")),
        (("before/sim", "after/sim"), ("before/sim", "after/sim")),
        (("runs/a-fcfs", "runs/b-sjf"), ("a-fcfs", "b-sjf")),
        (("same", "same"), ("sim (a)", "sim (b)")),
        ((None, None), ("sim (a)", "sim (b)")),
    ],
)
def test_labels_are_the_ends_of_the_paths_that_tell_two_runs_apart(
    paths: tuple[str | None, str | None], labels: tuple[str, str]
) -> None:
    a, b = (toy_run(0, count=2, path=Path(path) if path else None) for path in paths)
    assert sides(a, b) == (("a", "b"), labels)


def test_partial_and_other_workload_together() -> None:
    a, b = interrupted(toy_run(4, count=20), 60), toy_run(4, count=32)
    d = diff(a, b, b)
    ended = a.requests.loc[a.requests["outcome"] == "finished", "id"]
    assert d.alignment["matched"] == len(ended) > 0
    assert "Partial run" in verdict(d)[0]
    assert isinstance(d.requests, pd.DataFrame)
