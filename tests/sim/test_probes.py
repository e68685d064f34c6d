"""Probes: what they cost nobody, and that a machine of another speed is told from another model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.analysis.machine import machine
from lab.analysis.runs import Run
from lab.control.executor import Capacity
from lab.control.plan import GENESIS, StepPlan, StepResult
from lab.control.step import Limits
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from sim.calibrate import Measured, fit, measure
from sim.cost.linear import LinearCost
from sim.cost.model import Batch
from sim.executor import SimExecutor
from sim.fitted import REFERENCE
from sim.probes import SHAPES, Pace, Paced, Probed, Watch, mean, speed_of

TRUTH = LinearCost.load(REFERENCE)
SLOW = Pace((1, 4, 16, 128), (1.5, 1.3, 1.1, 0.9))
ROOM = Capacity(2048, 16, 8192)


class Drifting(SimExecutor):
    """An engine whose machine changes its pace while nobody looks."""

    def __init__(self, paces: list[Pace], every: int) -> None:
        super().__init__(TRUTH, ROOM)
        self._paces = itertools.cycle(pace for pace in paces for _ in range(every))
        self.seen: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.seen.append(plan)
        pace = next(self._paces)
        timing = pace.applied(TRUTH.step_time(plan), max(1, plan.tokens))
        return replace(super().execute(plan), forward_ns=timing.forward_ns)


def batches() -> list[Batch]:
    found = [Batch(n, n, n, n * c, n * c, 0, 0) for n in (1, 2, 6, 16) for c in (40, 500)]
    return found + [Batch(n, 1, 1, 0, 0, n * (n + 1) // 2, n) for n in (30, 128, 400)]


@given(st.integers(1, 600))
def test_a_pace_meets_its_probes_lies_between_them_and_turns_round(rows: int) -> None:
    then, now = {1: 2e6, 8: 3e6, 128: 9e6}, {1: 3e6, 8: 3.6e6, 128: 8.1e6}
    pace, back = Pace.of(now, then), Pace.of(then, now)
    assert [pace.at(n) for n in (1, 8, 128)] == pytest.approx([1.5, 1.2, 0.9])
    assert 0.9 <= pace.at(rows) <= 1.5
    assert pace.at(rows) * back.at(rows) == pytest.approx(1, rel=0.03)
    assert pace.at(rows) >= pace.at(rows + 1)
    assert Pace.of({}, then).at(rows) == 1


def test_probes_come_between_steps_when_it_is_time_on_blocks_of_their_own() -> None:
    engine, now = Drifting([Pace()], 1), [0.0]
    probed = Probed(engine, every_s=1.0, clock=lambda: now[0])
    assert probed.capacity.blocks < ROOM.blocks
    for step in range(10):
        now[0] = 0.4 * step
        probed.execute(StepPlan(step, 0, (), GENESIS))
    assert len(probed.taken) == 4  # at 0, 1.2, 2.4 and 3.6
    assert set(probed.taken[0]) == {shape.tokens for shape in SHAPES}
    used = {block for plan in engine.seen for work in plan.work for block in work.blocks}
    assert used
    assert min(used) >= probed.capacity.blocks
    known = {request.id for plan in engine.seen for request in plan.new}
    assert known == {name for plan in engine.seen for name in plan.released}  # nobody stays


def test_the_probes_of_a_slower_machine_tell_its_pace() -> None:
    then, now = Probed(Drifting([Pace()], 1)), Probed(Drifting([SLOW], 1))
    then.probe()
    now.probe()
    pace = Pace.of(mean(now.taken), mean(then.taken))
    assert pace.times == pytest.approx(SLOW.times, rel=1e-3)
    told = Paced(TRUTH, pace)
    for batch in batches():
        assert told.price(batch).forward_ns == pytest.approx(
            TRUTH.price(batch).forward_ns * SLOW.at(batch.rows), rel=1e-3
        )
        assert told.price(batch).prepare_ns == TRUTH.price(batch).prepare_ns


def measured(engine: Drifting) -> Measured:
    return measure(engine, Fcfs(), Lru(), Limits(512, 32), every_s=0.0)


def test_a_calibration_on_a_machine_that_changes_is_that_of_a_steady_one() -> None:
    """What was measured while it was slow is put beside what was measured while it wasn't: one speed for all."""
    steady, slow, changing = (
        measured(Drifting(paces, every))
        for paces, every in (([Pace()], 1), ([SLOW], 1), ([Pace(), SLOW], 900))
    )
    for batch in batches():
        expected = fit(steady, {}).price(batch).forward_ns
        for found in (slow, changing):
            cost = fit(found, {})
            level = Paced(cost, Pace.of(steady.speed, speed_of(cost)))
            assert level.price(batch).forward_ns == pytest.approx(expected, rel=0.04)
    together = Measured.together([steady, slow])
    assert together.speed == pytest.approx(mean([steady.speed, slow.speed]))
    cost = fit(together, {})
    assert speed_of(cost) == pytest.approx(together.speed)
    assert cost.measured_on["quality"]["repeat_spread_pct"] < 2
    assert Measured.from_json(together.to_json()) == together


def test_the_machine_around_a_run_is_said_in_a_sentence(tmp_path: Path) -> None:
    watch = Watch(Drifting([Pace()], 1), {1: 1.0, 8: 2.0, 128: 4.0})
    path = tmp_path / "cost.json"
    run = Run(tmp_path, None)
    rows = [1, 2, 8, 128]
    run.steps = pd.DataFrame(
        {
            "prefill_tokens": [0, 0, 0, 128],
            "decode_tokens": [1, 2, 8, 0],
            "forward_ns": [100] * 4,
            "start_ns": [0] * 4,
            "end_ns": [125] * 4,
        }
    )
    assert machine(run) == ""
    for damaged in ("", "[1]"):
        path.write_text(damaged)
        assert machine(run).endswith("cost.json can't be read.")
    path.write_text(json.dumps({"machine_ns": watch.account()}))
    assert machine(run) == ""  # the run is still going on
    watch.ended()
    told = watch.account()
    told["before"], told["after"] = {"1": 1.2, "8": 2.0, "128": 3.6}, {"1": 1.0, "8": 2.0, "128": 4.0}
    path.write_text(json.dumps({"machine_ns": told}))
    assert "rows 1 +10 %, 8 +0 %, 128 -5 %; before and after lie up to 20 % apart" in machine(run)
    paces = [Pace((1, 8, 128), (1.1, 1.0, 0.95)).at(n) for n in rows]
    assert f"would change by {100 * 100 * (sum(paces) - 4) / 500:+.1f} %:" in machine(run)
