"""Alignment, attribution, distributions, residuals and noise, held against brute force and made-up truth."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.analysis.aligned import align, heaviest_chain
from lab.analysis.diff import diff
from lab.analysis.distances import order_distance
from lab.analysis.frames import PARTS
from lab.analysis.residuals import FACTS, residual_map
from lab.analysis.verdict import verdict
from lab.errors import ConfigError, RunError
from tests.analysis.toy import ToyRun, linear, noisy, pair, toy_run

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


@given(st.dictionaries(st.tuples(st.integers(0, 6), st.integers(0, 6)), st.integers(1, 9), max_size=10))
def test_the_chain_is_as_heavy_as_the_heaviest_of_all_subsets(entries: dict[tuple[int, int], int]) -> None:
    cells = list(entries)
    m, n = (np.array([cell[i] for cell in cells], dtype=np.int64) for i in (0, 1))
    weight = np.array(list(entries.values()), dtype=float)
    chosen = heaviest_chain(m, n, weight)
    assert all(m[x] < m[y] and n[x] < n[y] for x, y in itertools.pairwise(chosen))
    best = 0.0
    for size in range(len(cells) + 1):
        for subset in itertools.combinations(sorted(range(len(cells)), key=lambda i: cells[i]), size):
            if all(m[x] < m[y] and n[x] < n[y] for x, y in itertools.pairwise(subset)):
                best = max(best, float(weight[list(subset)].sum()))
    assert weight[chosen].sum() == pytest.approx(best)


def tokens_of(run: ToyRun) -> list[set[tuple[str, int]]]:
    rows: list[Any] = list(run.plans.itertuples())
    return [
        {(r, s + i) for r, s, t in zip(row.request, row.start, row.tokens, strict=True) for i in range(t)}
        | {(r, -1) for r in row.preempted}
        for row in rows
    ]


@few
@given(seeds, st.integers(5, 25))
def test_alignment_is_that_of_needleman_and_wunsch(seed: int, count: int) -> None:
    real, sim, _ = pair(seed, count=count, blocks=60)
    found = align(real, sim)
    left, right = tokens_of(real), tokens_of(sim)
    equal = int((found.pairs["plan"] == "equal").sum())
    left_rest, right_rest = left[equal:], right[equal:]
    table = np.zeros((len(left_rest) + 1, len(right_rest) + 1))
    for i, x in enumerate(left_rest):
        for j, y in enumerate(right_rest):
            alike = len(x & y) / len(x | y) if x | y else 0.0
            table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j], table[i, j] + alike)
    total = equal + table[-1, -1]
    steps = len(left) + len(right)
    assert found.edit_distance == pytest.approx(
        1 - 2 * total / steps, abs=2e-3
    )  # 8 candidates a step, not all
    rows: list[Any] = list(found.pairs.itertuples())
    for row in rows:
        x, y = left[row.step_a], right[row.step_b]
        assert row.similarity == pytest.approx(len(x & y) / len(x | y) if x | y else 1.0)
    for column in ("step_a", "step_b"):
        assert found.pairs[column].is_monotonic_increasing
        assert found.pairs[column].is_unique


@few
@given(seeds, st.integers(2, 20))
def test_a_run_is_aligned_with_itself_step_by_step(seed: int, count: int) -> None:
    run = toy_run(seed, count, blocks=40)
    found = align(run, run)
    assert (found.pairs["step_a"] == found.pairs["step_b"]).all()
    assert (found.alone, found.edit_distance) == ((0, 0), 0.0)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=12))
def test_order_distance_counts_the_pairs_that_come_in_the_other_order(times: list[tuple[int, int]]) -> None:
    a, b = (np.array([t[i] for t in times]) for i in (0, 1))
    pairs = list(itertools.combinations(range(len(times)), 2))
    inverted = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in pairs)
    assert order_distance(a, b) == pytest.approx(inverted / len(pairs))


def shifted(run: ToyRun, request: str, by: int) -> ToyRun:
    """The run with one request's first wait longer and all that follows later by as much."""
    frame: Any = run.requests.copy(deep=True)
    row = frame.index[frame["id"] == request][0]
    pieces = [dict(piece) for piece in frame.at[row, "intervals"]]
    for i, piece in enumerate(pieces):
        piece["start_ns"] += by if i else 0
        piece["end_ns"] += by
    frame.at[row, "intervals"] = pieces
    for column in ("first_token_ns", "last_token_ns", "end_ns", "first_scheduled_ns"):
        frame.loc[row, column] += by
    return replace(run, requests=frame)


@pytest.mark.parametrize("by", [1, 7_000_000])
def test_a_wait_made_longer_is_all_that_is_found(by: int) -> None:
    run = toy_run(3, count=10, max_seqs=1)  # one at a time, so that the steps tell nothing of others
    last = str(run.requests["id"].iloc[-1])  # nothing runs after it, and time between steps is the host's
    d = diff(run, shifted(run, last, by))
    deltas = [c for c in d.requests if str(c).endswith("delta_ns")]
    own: Any = d.requests.loc[last]
    moved = d.waits[d.waits["delta_ns"].fillna(0) != 0]
    assert moved[["id", "stage", "visit", "delta_ns"]].to_numpy().tolist() == [[last, "queue", 0, by]]
    assert own["e2e_delta_ns"] == by
    assert own["e2e_queue_delta_ns"] == by
    assert not d.requests.drop(index=last)[deltas].to_numpy().any()
    assert sum(own[f"e2e_{part}_delta_ns"] for part in PARTS) == by


@few
@given(seeds, st.integers(3, 25), st.integers(100_000, 3_000_000))
def test_host_time_is_told_from_model_time(seed: int, count: int, more: int) -> None:
    """Preparing takes longer in every step: one request alone in the engine pays once for each of its steps."""
    run = toy_run(seed, count, max_seqs=1)
    slow = toy_run(seed, count, max_seqs=1, cost=lambda step, *shape: linear()(step, *shape) + more)
    steps = slow.steps.assign(
        prepare_ns=slow.steps["prepare_ns"] + more, forward_ns=slow.steps["forward_ns"] - more
    )
    d = diff(run, replace(slow, steps=steps))
    own = slow.plans["request"].map(len).eq(1)
    served = slow.plans.loc[own, "request"].map(lambda names: names[0]).value_counts()
    if not own.all():
        return
    assert (d.requests["e2e_host_delta_ns"] == served.reindex(d.requests.index) * more).all()
    assert not d.requests[["e2e_prefill_delta_ns", "e2e_decode_delta_ns"]].to_numpy().any()


@pytest.mark.parametrize(("fact", "factor"), [("context_tokens", 0.15), ("tokens", 3.0), ("step", 1.25)])
def test_a_cost_that_is_off_by_a_factor_is_found_by_its_shape(fact: str, factor: float) -> None:
    terms = {"step": "base", "tokens": "token", "context_tokens": "context"}
    was = {"base": 2_000_000, "token": 30_000, "context": 200}
    name = terms[fact]
    a = toy_run(2, 40, cost=linear(**was))
    b = toy_run(2, 40, cost=linear(**{**was, name: int(was[name] * factor)}))
    d = diff(a, b)
    term = d.terms.iloc[0]
    assert (term["phase"], term["fact"]) == ("forward", fact)
    assert term["explained"] > 0.999
    assert term["delta_ns"] == pytest.approx(was[name] * (factor - 1), rel=1e-3)
    assert term["factor"] == pytest.approx(factor, rel=0.02)
    assert FACTS[fact] in verdict(d)[0]
    bins = residual_map(d.residuals)
    assert bins["steps"].sum() == len(d.residuals)
    assert bins["total_ms"].sum() == pytest.approx(d.residuals["residual_ns"].sum() / 1e6)


@few
@given(seeds, st.integers(3, 15))
def test_two_orders_give_each_factor_the_mean_of_what_it_does(seed: int, count: int) -> None:
    runs = [toy_run(seed + i, count, cost=linear(base=2_000_000 + 500_000 * i)) for i in range(4)]
    # Four unlike runs stand for the four corners: only their metrics matter to the split.
    a, b, ab, ba = (replace(run, requests=runs[0].requests, config=runs[0].config) for run in runs)
    d = diff(a, b, ab, exchanged=ba)
    assert d.counterfactual is not None
    m = [run.metrics["e2e_ms"]["mean"] for run in (a, b, ab, ba)]
    cell = d.counterfactual["e2e_ms.mean"]
    assert cell["duration"] == pytest.approx(((m[1] - m[2]) + (m[3] - m[0])) / 2)
    assert cell["total"] == pytest.approx(cell["duration"] + cell["decision"])


def test_bands_over_seeds_hold_the_truth_and_identical_pairs_have_no_width() -> None:
    a = [toy_run(seed, 30, cost=noisy(linear(), seed)) for seed in range(4)]
    b = [toy_run(seed, 30, cost=noisy(linear(token=60_000), seed)) for seed in range(4)]
    d = diff(a, b)
    table = d.percentiles
    assert set(table["basis"]) == {"seeds"}
    assert (table["low_pct"] <= table["error_pct"] + 1e-9).all()
    median = table[(table["latency"] == "e2e") & (table["percentile"] == 50)].iloc[0]
    by_hand = [np.median((y.requests["end_ns"] - y.requests["arrival_ns"]) / 1e6) for y in b]
    assert median["b_ms"] == pytest.approx(np.mean(by_hand))
    assert d.spread["e2e_ms.mean"]["low"] > 0
    same = diff(a, a)
    assert not same.percentiles[["error_pct", "low_pct", "high_pct"]].to_numpy().any()
    with pytest.raises(ConfigError, match="4 runs are to be compared with 3"):
        diff(a, b[:3])


def test_every_distance_stands_beside_the_noise_of_repeats() -> None:
    real, sim, _ = pair(4, count=40)
    repeats = [toy_run(4, 40, backend="real", cost=noisy(linear(), seed)) for seed in (50, 51)]
    plain, judged = diff(real, sim), diff(real, sim, noise=repeats)
    assert plain.noise is None
    assert any("no noise floor" in sentence for sentence in verdict(plain))
    assert judged.noise is not None
    assert (judged.noise["runs"], judged.noise["pairs"]) == (3, 3)
    for cell in judged.noise["distances"].values():
        assert cell["ratio"] is None or cell["ratio"] == pytest.approx(cell["distance"] / cell["floor"])
    [said] = [sentence for sentence in verdict(judged) if "Noise floor of 3 repeats" in sentence]
    ratio = judged.noise["distances"]["e2e.w1_over_mean"]["ratio"]
    assert said.startswith("No finding in E2E: chance alone does as much.") == (ratio <= 2)
    itself = diff(real, real, noise=[real])
    assert itself.noise is not None
    assert all(c["distance"] == c["floor"] == 0 for c in itself.noise["distances"].values())
    with pytest.raises(RunError, match="no repeat of"):
        diff(real, sim, noise=[toy_run(5, 40, backend="real")])


def test_swapped_admissions_are_explained_on_both_sides() -> None:
    options: dict[str, Any] = {"count": 60, "rate_per_s": 2000.0, "max_seqs": 4}
    d = diff(toy_run(5, **options), toy_run(5, swap_order_from_step=20, **options))
    found = d.decisions["first_divergence"]
    first, other = (found["difference"]["admitted"][key][0] for key in ("a", "b"))
    why = {(r["request"], r["side"]): r["why"] for r in found["reasons"]}
    assert why[first, "b"] == why[other, "a"] == "every slot was taken (4 of 4)"
    waiting = toy_run(5, **options).requests
    now = found["a"]["now_ns"]
    queued = waiting[(waiting["arrival_ns"] <= now) & (waiting["first_scheduled_ns"] >= now)]
    assert found["a"]["queue"] == found["b"]["queue"] == queued["id"].tolist()
    assert found["a"]["queue"].index(first) < found["a"]["queue"].index(other)
    assert "who goes first" in verdict(d)[0]


def test_runs_without_plans_are_aligned_while_digests_agree_and_say_so() -> None:
    options: dict[str, Any] = {"count": 60, "rate_per_s": 2000.0, "max_seqs": 4}
    a, b = toy_run(5, **options), toy_run(5, swap_order_from_step=20, **options)
    d = diff(replace(a, plans=a.plans.iloc[:0]), b)
    assert set(d.aligned.pairs["plan"]) == {"equal"}
    assert any("kept no plans" in sentence for sentence in verdict(d))


def test_percentile_table_has_a_row_for_each_latency_and_rank() -> None:
    real, sim, _ = pair(1, count=30)
    table = diff(real, sim).percentiles
    assert table.groupby("latency").size().to_dict() == dict.fromkeys(("ttft", "e2e", "tpot", "itl"), 100)
    assert isinstance(table, pd.DataFrame)
    at_half = table[(table["latency"] == "ttft") & (table["percentile"] == 50)]
    own = (sim.requests["first_token_ns"] - sim.requests["arrival_ns"]).median() / 1e6
    assert at_half["b_ms"].iloc[0] == pytest.approx(own)
