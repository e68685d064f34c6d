"""The fitted linear model: it finds what was planted, never rewards more work, reads what it wrote."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.control.executor import Capacity, Executor
from lab.control.plan import GENESIS, StepPlan, StepResult, StepTiming, Work
from lab.control.request import Prompt, Request, Segment
from lab.errors import ConfigError
from sim.bench import Bench, Shape
from sim.calibrate import _by_shape, describe, levelled
from sim.cost.layout import share_scattered
from sim.cost.linear import FEATURES, FORMAT, PHASES, RAMPS, LinearCost, features
from sim.cost.model import Batch
from sim.fitted import REFERENCE


def plan(items: list[tuple[int, int]]) -> StepPlan:
    """A plan of (start, tokens) items, all of which sample."""
    work = tuple(Work(f"r{i}", start, tokens, True) for i, (start, tokens) in enumerate(items))
    return StepPlan(0, 0, work, GENESIS)


items = st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 200)), min_size=1, max_size=20)


@given(items)
def test_batch_numbers_equal_a_count_token_by_token(work: list[tuple[int, int]]) -> None:
    batch = Batch.of(plan(work))
    decodes = [(s, n) for s, n in work if n == 1]
    chunks = [(s, n) for s, n in work if n > 1]
    assert batch.rows == sum(n for _, n in work)
    assert batch.prefill_pairs == sum(s + i + 1 for s, n in chunks for i in range(n))
    assert batch.decode_context == sum(s + 1 for s, _ in decodes)
    assert batch.decode_padded == len(decodes) * max((s + 1 for s, _ in decodes), default=0)


PLANTED = {"step": 2e6, **dict.fromkeys(RAMPS, 30_000.0), "decode_context": 150.0, "prefill_pairs": 20.0}


def test_planted_coefficients_are_found_again() -> None:
    planted = PLANTED
    plans = [plan([(c, 1)] * b) for b in (1, 2, 4, 8, 16) for c in (16, 100, 700)]
    plans += [plan([(s, n)]) for s in (0, 100, 400) for n in (7, 50, 300)]
    plans += [plan([(c, 1)] * b + [(0, n)]) for b in (2, 9) for c in (50, 500) for n in (20, 90)]
    batches = [Batch.of(p) for p in plans]
    times = [round(sum(v * FEATURES[k](b) for k, v in planted.items())) for b in batches]
    flat = [1000] * len(batches)
    samples = {
        phase: list(zip(batches, times if phase == "forward_ns" else flat, strict=True)) for phase in PHASES
    }
    fit = LinearCost.fit(samples, {})
    for p, expected in zip(plans, times, strict=True):
        assert fit.step_time(p).forward_ns == pytest.approx(expected, rel=1e-3)
        assert fit.step_time(p).plan_ns == pytest.approx(1000, rel=1e-3)
    for name in ("step", "rows_2_to_4", "rows_over_128", "decode_context", "prefill_pairs"):
        assert fit.coefficients["forward_ns"][name] == pytest.approx(planted[name], rel=0.05)


def test_context_that_costs_more_where_decodes_are_few_is_found_again(tmp_path: Path) -> None:
    about = {"heads_apart_below": 8}
    known = features(about)
    planted = {**PLANTED, "few_context": 1500.0}
    plans = [plan([(c, 1)] * b) for b in (1, 2, 4, 7, 8, 16, 32) for c in (16, 100, 700)]
    plans += [plan([(s, n)]) for s in (0, 100, 400) for n in (7, 50, 300)]
    plans += [plan([(c, 1)] * b + [(0, n)]) for b in (2, 9) for c in (50, 500) for n in (20, 90)]
    batches = [Batch.of(p) for p in plans]
    took = [round(sum(v * known[k](b) for k, v in planted.items())) for b in batches]
    told = {phase: list(zip(batches, took, strict=True)) for phase in PHASES}
    path = tmp_path / "fit.json"
    path.write_text(LinearCost.fit(told, about).to_json())
    cost = LinearCost.load(path)
    for p, expected in zip(plans, took, strict=True):
        assert cost.step_time(p).forward_ns == pytest.approx(expected, rel=2e-3)
    slopes = [
        cost.step_time(plan([(1000, 1)] * n)).forward_ns - cost.step_time(plan([(0, 1)] * n)).forward_ns
        for n in (7, 8)
    ]
    assert slopes[0] / 7000 == pytest.approx(1650, rel=0.02)
    assert slopes[1] / 8000 == pytest.approx(150, rel=0.1)


def test_what_is_read_again_costs_as_much_less_as_measured_and_never_more_than_the_first_reading() -> None:
    about = {"heads_apart_below": 8}
    known = features(about)
    planted = {**PLANTED, "decode_context": 100.0, "first_context": 250.0, "few_first_context": 900.0}

    def shared(decodes: int, context: int, common: int) -> Batch:
        whole = replace(plan([(context - 1, 1)] * decodes), reread=(decodes - 1) * common)
        return Batch.of(whole)

    sizes = [(n, c) for n in (1, 2, 4, 7, 8, 16, 32) for c in (16, 100, 700)]
    batches = [shared(n, c, c * part // 8) for n, c in sizes for part in (0, 4, 7)]
    batches += [Batch.of(plan([(s, n)])) for s in (0, 100, 400) for n in (7, 50, 300)]
    took = [round(sum(v * known[k](b) for k, v in planted.items())) for b in batches]
    cost = LinearCost.fit({phase: list(zip(batches, took, strict=True)) for phase in PHASES}, about)
    for name in ("decode_context", "first_context", "few_first_context"):
        assert cost.coefficients["forward_ns"][name] == pytest.approx(planted[name], rel=0.05)
    apart, together = (cost.price(shared(16, 700, common)).forward_ns for common in (0, 640))
    assert apart - together == pytest.approx(250 * 15 * 640, rel=0.05)

    faster = [
        (b, took - 200 * b.reread) for b, took in zip(batches, took, strict=True)
    ]  # it can't be that cheap
    steep = LinearCost.fit(dict.fromkeys(PHASES, faster), about)
    for n, c in sizes:
        assert steep.price(shared(n, c + 1, c)).forward_ns >= steep.price(shared(n, c, c)).forward_ns
    assert "decode_padded" not in known
    assert "decode_padded" in features({})


def test_rows_of_one_tile_cost_more_than_those_of_two_where_the_engine_computes_in_tiles() -> None:
    about = {"tile_rows": 12}
    known = features(about)
    planted = {**PLANTED, "rows_alone": 250_000.0}
    batches = [Batch.of(plan([(c, 1)] * n)) for n in (*range(1, 21), 24, 32) for c in (16, 300)]
    batches += [Batch.of(plan([(s, n)])) for s in (0, 100, 400) for n in (9, 50, 300)]
    took = [round(sum(v * known[k](b) for k, v in planted.items())) for b in batches]
    cost = LinearCost.fit({phase: list(zip(batches, took, strict=True)) for phase in PHASES}, about)
    for batch, expected in zip(batches, took, strict=True):
        assert cost.price(batch).forward_ns == pytest.approx(expected, rel=2e-3)
    one, two = (cost.price(Batch.of(plan([(0, 1)] * n))).forward_ns for n in (12, 13))
    assert one - two == pytest.approx(6 * 250_000 - 30_000, rel=0.05)
    assert features({})["rows_alone"](batches[20]) == 0


def test_scattered_context_costs_what_was_measured_and_only_in_a_pool_that_comes_round() -> None:
    known = features({})
    planted = {**PLANTED, "scattered_context": 300.0}
    batches = [Batch.of(plan([(c, 1)] * n)) for n in (1, 4, 8, 16) for c in (16, 100, 700)]
    apart = [replace(b, scattered=b.decode_context) for b in batches]
    told = [*batches, *apart, *(Batch.of(plan([(s, n)])) for s in (0, 100) for n in (7, 300))]
    took = [round(sum(v * known[k](b) for k, v in planted.items())) for b in told]
    cost = LinearCost.fit({phase: list(zip(told, took, strict=True)) for phase in PHASES}, {})
    batch, whole = batches[5], 300 * batches[5].decode_context
    beside = cost.price(batch).forward_ns
    assert cost.price(apart[5]).forward_ns - beside == pytest.approx(whole, rel=0.03)
    requests = [Request(id=f"r{i}", prompt=Prompt((Segment(i, 0, 90),)), output_len=10) for i in range(40)]
    for blocks, share in ((1000, 0.0), (250, 0.0), (125, 0.5), (25, 0.9), (1, 1.0)):
        cost.expects(requests, Capacity(blocks, 16, 8192))
        assert cost.price(batch).forward_ns - beside == pytest.approx(share * whole, rel=0.03)
        assert cost.price(apart[5]).forward_ns - beside == pytest.approx(whole, rel=0.03)  # measured as such
    cost.expects(requests, Capacity(125, 16, 8192), pools=2)
    assert cost.price(batch).forward_ns == beside


def test_what_many_ask_alike_is_written_once() -> None:
    room = Capacity(10, 16, 8192)  # 160 tokens
    alike = [Request(id=f"r{i}", prompt=Prompt((Segment(1, 0, 150),)), output_len=1) for i in range(10)]
    assert share_scattered(alike, room) == 0
    turns = [
        Request(id=f"r{i}", prompt=Prompt((Segment(1, 0, 32 * i + 32),)), output_len=1) for i in range(9)
    ]
    assert share_scattered(turns, room) == pytest.approx(1 - 160 / (9 * 32 + 9))
    own = [Request(id=f"r{i}", prompt=Prompt.of([i] * 31), output_len=1) for i in range(10)]
    assert share_scattered(own, room) == pytest.approx(0.5)
    assert share_scattered([], room) == 0


def test_of_scattered_context_what_is_read_again_costs_nothing_more() -> None:
    measured = features({})["scattered_context"]
    batch = Batch.of(StepPlan(0, 0, (), GENESIS))
    told = [
        measured(replace(batch, decode_context=90, scattered=s, reread=r))
        for s, r in ((90, 0), (90, 40), (0, 40))
    ]
    assert told == [90, 50, 0]


def test_newcomers_are_counted_and_their_plans_take_longer() -> None:
    newcomers = plan([(0, 20)] * 3)
    request = Request(id="r0", prompt=Prompt((Segment(1, 0, 20),)), output_len=1)
    batch = Batch.of(replace(newcomers, new=(request,) * 3))
    assert (batch.new, batch.decodes) == (3, 0)
    assert Batch.of(plan([(9, 1), (5, 1), (0, 4)])).decodes == 2
    cost = LinearCost({**{phase: {} for phase in PHASES}, "plan_ns": {"step": 1.0, "new": 10.0}})
    assert cost.price(batch).plan_ns == 31


def noisy(seed: int, outliers: int) -> tuple[dict[str, float], dict[str, list[tuple[Batch, int]]]]:
    """(planted coefficients, measurements with 2 % noise of which some took three times as long, or a quarter)."""
    rng = random.Random(seed)
    planted = PLANTED
    plans = [plan([(c, 1)] * b) for b in (1, 2, 4, 8, 16) for c in (16, 100, 700)]
    plans += [plan([(s, n)]) for s in (0, 100, 400) for n in (7, 50, 300)]
    plans += [plan([(c, 1)] * b + [(0, n)]) for b in (2, 9) for c in (50, 500) for n in (20, 90)]
    batches = [Batch.of(p) for p in plans * 3]
    times = [sum(v * FEATURES[k](b) for k, v in planted.items()) * rng.gauss(1, 0.02) for b in batches]
    for i in rng.sample(range(len(times)), outliers):
        times[i] *= 3 if i % 3 else 0.25
    told = list(zip(batches, map(round, times), strict=True))
    flat = [(b, 1000) for b in batches]
    return planted, {phase: told if phase == "forward_ns" else flat for phase in PHASES}


def test_a_few_wild_measurements_do_not_move_the_fit() -> None:
    """A tenth of them interrupted, or mistimed, and it stays near."""
    planted, clean = noisy(1, 0)
    _, stalled = noisy(1, 9)
    for samples, near in ((clean, 0.03), (stalled, 0.06)):
        fit = LinearCost.fit(samples, {})
        for batch, _ in clean["forward_ns"]:
            expected = sum(v * FEATURES[k](batch) for k, v in planted.items())
            assert fit.price(batch).forward_ns == pytest.approx(expected, rel=near)


def test_intervals_hold_what_was_planted_as_often_as_they_say() -> None:
    """Where features can be told apart: of 2 coefficients in each of 60 fits, 95 %, less what a small sample costs."""
    batches = [Batch.of(plan([(100, 1)] * n)) for n in range(1, 33)]
    held, widths = 0, {0.02: 0.0, 0.08: 0.0}
    for seed in range(60):
        rng = random.Random(seed)
        for noise in widths:
            took = [round((80_000 + 6_000 * b.samples) * rng.gauss(1, noise)) for b in batches]
            told = {phase: list(zip(batches, took, strict=True)) for phase in PHASES}
            found = LinearCost.fit(told, {}).intervals["sample_ns"]
            widths[noise] += found["samples"][1] - found["samples"][0]
            if noise == 0.08:
                for name, value in (("step", 80_000), ("samples", 6_000)):
                    held += found[name][0] <= value <= found[name][1]
    assert 0.88 * 120 <= held <= 119
    assert 3 < widths[0.08] / widths[0.02] < 5


def test_intervals_of_features_that_resemble_one_another_repeat_and_hold_the_fit() -> None:
    for seed in range(3):
        fit = LinearCost.fit(noisy(seed, 2)[1], {})
        for name, (low, high) in fit.intervals["forward_ns"].items():
            assert low * 0.9 <= fit.coefficients["forward_ns"][name] <= high * 1.1
    assert fit.intervals == LinearCost.fit(noisy(2, 2)[1], {}).intervals


def test_batches_beyond_the_measured_ones_are_counted_and_said() -> None:
    fit = LinearCost.fit(noisy(0, 0)[1], {})
    assert fit.measured_on["most"]["seqs"] == 16
    fit.step_time(plan([(100, 1)] * 16))
    assert fit.warnings() == []
    for _ in range(3):
        fit.step_time(plan([(100, 1)] * 17))
    fit.step_time(plan([(0, 400)]))
    assert fit.account() == {
        "steps": 5,
        "outside": {"rows": 1, "seqs": 3, "decode_context": 0, "prefill_pairs": 0},
    }
    (sentence,) = fit.warnings()
    assert "Of 5 simulated steps" in sentence
    assert "seqs over 16 in 3" in sentence


def test_errors_by_kind_come_from_fits_that_did_not_see_it() -> None:
    _, samples = noisy(5, 0)
    found = _by_shape(samples, {})
    assert set(found) == {"up to 4 decodes", "more decodes", "prompts", "mixed"}
    assert sum(kind["batches"] for kind in found.values()) == len(samples["forward_ns"])
    assert all(0.2 < kind["mean_abs"] < 6 for kind in found.values())
    text = "\n".join(describe(LinearCost.fit(samples, {"quality": {"holdout_by_shape_pct": found}})))
    assert "95 %:" in text
    assert "left out, mixed" in text


@cache
def fits() -> list[LinearCost]:
    """Another machine's, one to noisy measurements, and one with every feature there is."""
    every = {phase: {name: 1000.0 + i for i, name in enumerate(names)} for phase, names in PHASES.items()}
    return [LinearCost.load(REFERENCE), LinearCost.fit(noisy(4, 3)[1], {}), LinearCost(every)]


@given(st.integers(0, 2), items, st.integers(0, 19), st.integers(0, 100), st.integers(0, 50))
def test_more_tokens_or_context_never_take_less_time(
    which_fit: int, work: list[tuple[int, int]], which: int, context: int, more: int
) -> None:
    cost = fits()[which_fit]
    index = which % len(work)
    start, tokens = work[index]
    if tokens == 1:
        more = 0  # a decode that becomes a chunk is another kernel, and may be cheaper
    grown = [*work[:index], (start + context, tokens + more), *work[index + 1 :]]
    assert cost.step_time(plan(grown)).total_ns >= cost.step_time(plan(work)).total_ns
    assert cost.step_time(plan([*work, (start, tokens)])).total_ns >= cost.step_time(plan(work)).total_ns


@given(st.integers(0, 2), items, st.integers(2, 400), st.integers(0, 2000))
def test_a_token_more_of_a_chunk_takes_no_more_than_a_tokens_coefficients(
    which_fit: int, others: list[tuple[int, int]], tokens: int, start: int
) -> None:
    """Nothing jumps where a chunk ends, nor at any knot of the rows."""
    cost = fits()[which_fit]
    less, more = (cost.step_time(plan([*others, (start, n)])) for n in (tokens, tokens + 1))
    terms = cost.coefficients["forward_ns"]
    steepest = (
        max((terms.get(name, 0.0) for name in (*RAMPS, "rows")), default=0.0)
        + terms.get("rows_over_8", 0.0)
        + terms.get("rows_over_32", 0.0)
    )
    pairs = (start + tokens + 1) * terms.get("prefill_pairs", 0.0) + terms.get("prefill_context", 0.0)
    assert 0 <= more.forward_ns - less.forward_ns <= steepest + pairs + 1


def test_ramps_are_the_rows_in_pieces() -> None:
    for rows in (1, 2, 3, 8, 11, 12, 100, 128, 129, 5000):
        batch = Batch(rows, 1, 1, 0, 0, 0, 0)
        assert sum(FEATURES[name](batch) for name in RAMPS) == rows - 1


def test_a_robust_fit_is_levelled_to_the_average_step() -> None:
    """A third of the steps take half as long again: the usual step is met by the fit, the average after levelling."""
    truth = LinearCost.load(REFERENCE)
    batches = [Batch.of(plan([(c, 1)] * n)) for n in range(1, 31) for c in (50, 300)]

    def took(batch: Batch, share: float) -> StepTiming:
        timing = truth.price(batch)
        return StepTiming(*(round(share * getattr(timing, phase)) for phase in PHASES))

    steps = [(b, took(b, 1.5 if i % 3 == 0 else 1.0)) for i, b in enumerate(batches)]
    level = levelled(truth, steps)
    for phase in PHASES:
        for name, value in truth.coefficients[phase].items():
            assert level.coefficients[phase][name] == pytest.approx(value * 3.5 / 3, rel=1e-3)
    stalled = [(batches[0], took(batches[0], 1000.0))] + [(b, took(b, 1.0)) for b in batches[1:]]
    bound = levelled(truth, stalled).price(batches[5]).total_ns
    assert bound == pytest.approx(truth.price(batches[5]).total_ns * 61 / 60, rel=1e-3)
    assert levelled(truth, []).coefficients == truth.coefficients


def test_decodes_are_measured_in_a_row_on_blocks_that_lie_apart() -> None:
    seen: list[StepPlan] = []

    class Counts:
        capacity = Capacity(400, 16, 8192)

        def execute(self, given: StepPlan) -> StepResult:
            seen.append(given)
            return StepResult((0,) * given.samples, 1, 10 * len(seen), 3)

    bench = Bench(cast("Executor", Counts()))
    bench.write()
    assert {to for move in seen[0].copies for _, to in move.pairs} == set(range(1, 400))
    found = bench.measure(Shape(4, 100))
    introduced, *row = seen[1:]
    assert len(introduced.new) == 4
    assert [item.start for item in row[2].work] == [item.start + 2 for item in row[0].work]
    blocks = [block for item in row[0].work for block in item.blocks]
    assert len(set(blocks)) == len(blocks)
    assert sum(b == a + 1 for a, b in pairwise(blocks)) < len(blocks) / 4
    assert [timing.forward_ns for _, timing in found] == [40, 50]  # the first of the row isn't counted
    assert [batch.decode_context for batch, _ in found] == [
        sum(item.context for item in step.work) for step in row[1:]
    ]
    assert all(batch.scattered == batch.decode_context for batch, _ in found)
    assert len(bench.measure(Shape(2, 50, ((0, 30),)))) == 1
    seen.clear()
    assert all(batch.scattered == 0 for batch, _ in bench.measure(Shape(4, 300, side_by_side=True)))
    beside = [b == a + 1 for item in seen[1].work for a, b in pairwise(item.blocks)]
    assert 0.6 < sum(beside) / len(beside) < 0.9
    seen.clear()
    [batch, _] = [batch for batch, _ in bench.measure(Shape(4, 100, shared=48))]
    tables = [item.blocks for item in seen[1].work]
    assert len({table[:3] for table in tables}) == 1
    assert len({block for table in tables for block in table[3:]}) == sum(len(table) - 3 for table in tables)
    assert batch.reread == 3 * 48
    assert all(item.start > 48 for item in seen[1].work)


def test_a_calibration_survives_the_round_trip(tmp_path: Path) -> None:
    cost = LinearCost.load(REFERENCE)
    (tmp_path / "fit.json").write_text(cost.to_json())
    again = LinearCost.load(tmp_path / "fit.json")
    assert again == cost
    assert isinstance(again.step_time(plan([(0, 5)])), StepTiming)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "malformed"),
        ("[]", "malformed"),
        ("{}", "malformed"),
        (json.dumps({"format": 99}), "format 99"),
        (json.dumps({"format": FORMAT, "coefficients_ns": {}, "measured_on": {}}), "malformed"),
        (
            json.dumps(
                {"format": FORMAT, "coefficients_ns": {p: {"magic": 1} for p in PHASES}, "measured_on": {}}
            ),
            "unknown features",
        ),
    ],
)
def test_a_bad_calibration_file_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        LinearCost.load(tmp_path / "fit.json")
    with pytest.raises(ConfigError, match="can't be read"):
        LinearCost.load(tmp_path / "nothing.json")
