"""Steps crossed at once have the times, digests and records of steps taken one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from lab.assembly import EngineSpec, assemble
from lab.control import decodes
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.fleet import FleetSpec
from lab.control.observer import Observer, StepRow, StepTotals, row_of
from lab.control.plan import GENESIS, Decoding, StepTiming
from lab.control.request import Request
from lab.control.step import Limits
from sim.cost.model import Batch
from sim.driver import Simulation
from sim.executor import SimExecutor
from tests.control.harness import Notes
from tests.control.test_aggregates import workload


class Cost:
    """Every phase takes its time. Counts how often it was asked by sums alone."""

    def __init__(self, still: bool) -> None:
        self.by_sums = 0
        self.still = still

    def step_time(self, plan: Any) -> StepTiming:
        return self._price(Batch.of(plan))

    def decode_time(self, decodes: Decoding) -> StepTiming:
        self.by_sums += 1
        return self._price(Batch.of_decodes(decodes))

    def _price(self, batch: Batch) -> StepTiming:
        control = (0, 0) if self.still else (2 + batch.seqs, 3)
        forward = 20 + batch.rows + batch.decode_context // 16 + batch.decode_padded // 64 + batch.reread
        return StepTiming(control[0], 1, forward, batch.samples, control[1])


class Watching(Notes):
    """Keeps every step, but not its list of work."""

    wants_work = False


class Summing(Observer):
    """Keeps sums of the steps."""

    wants_steps = False

    def __init__(self) -> None:
        self.sums: dict[int, StepTotals] = {}

    def totals(self, replica: int) -> StepTotals:
        return self.sums.setdefault(replica, StepTotals())


def simulate(seed: int, policy: str, observer: Observer, *, aggregate: bool) -> Cost:
    rng = random.Random(seed)
    requests: list[Request] = []
    for number, request in enumerate(workload(rng) + workload(rng)):
        at = request.arrival * rng.choice((1, 10, 10, 30))
        requests.append(replace(request, id=f"n{number}", arrival=at))
    requests.sort(key=lambda request: request.arrival)
    replicas = rng.choice((1, 1, 2))
    names = {"policy": policy, "routing": "round_robin", "preemption": rng.choice(("last", "largest_kv"))}
    limits = Limits(rng.choice((12, 64)), rng.choice((4, 12)))
    fleet = FleetSpec(replicas=replicas, most=replicas)
    spec = EngineSpec({seam: {"name": name} for seam, name in names.items()}, limits, True, 0, fleet)
    capacity = Capacity(rng.choice((30, 60, 400)), 4)
    cost = Cost(rng.random() < 0.5)
    control = assemble(spec, capacity, observer, requests, aggregate=aggregate)
    Simulation(control, SimExecutor(cost, capacity), requests).run()
    for core in control.fleet.cores:
        core.check()
    return cost


@pytest.mark.parametrize("policy", ["fcfs", "vllm_v1", "sjf", "sarathi", "mlfq", "vtc"])
def test_crossing_steps_changes_nothing(policy: str) -> None:
    by_sums = shared = 0
    for seed in range(4):
        one, two = Watching(), Watching()
        simulate(seed, policy, one, aggregate=False)
        by_sums += simulate(seed, policy, two, aggregate=True).by_sums
        assert [step.plan.digest for step in one.steps] == [step.plan.digest for step in two.steps]
        for left, right in zip(one.steps, two.steps, strict=True):
            assert asdict(replace(left, plan=GENESIS)) == asdict(replace(right, plan=GENESIS))  # type: ignore[arg-type]
            assert (left.plan.now, left.plan.index) == (right.plan.now, right.plan.index)
            assert (left.plan.tokens, left.plan.samples) == (right.plan.tokens, right.plan.samples)
            assert len(left.plan.work) == len(right.plan.work)
            assert (left.plan.released, left.plan.reread) == (right.plan.released, right.plan.reread)
            shared += bool(right.plan.reread) and not right.plan.admitted
        assert [asdict(r) for r in one.requests.values()] == [asdict(r) for r in two.requests.values()]
    assert by_sums > 150 or policy not in ("fcfs", "vllm_v1", "sjf")
    assert shared > 50


def test_times_that_a_clock_no_longer_holds_are_still_those_of_their_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(4):
        one, two = Watching(), Watching()
        simulate(seed, "fcfs", one, aggregate=True)
        with monkeypatch.context() as patched:
            patched.setattr(decodes, "_FORGET", 5)
            simulate(seed, "fcfs", two, aggregate=True)
        assert [asdict(r) for r in one.requests.values()] == [asdict(r) for r in two.requests.values()]


class Rowed(Watching):
    """Is told of steps as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[StepRow] = []

    def step_rows(self) -> Callable[[StepRow], object] | None:
        return self.rows.append


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_rows_of_steps_are_those_of_the_records_crossed_or_not(policy: str) -> None:
    by_sums = 0
    for seed in range(4):
        one, two = Watching(), Rowed()
        simulate(seed, policy, one, aggregate=False)
        by_sums += simulate(seed, policy, two, aggregate=True).by_sums
        assert not two.steps
        for step, row in zip(one.steps, two.rows, strict=True):
            expected = row_of(step)
            assert row[:4] == expected[:4]
            assert row[5] == expected[5]
            assert (row[4] is None) == (not (step.plan.admitted or step.plan.preempted or step.plan.rejected))
    assert by_sums > 100


def test_sums_of_steps_are_those_of_the_steps() -> None:
    for seed in range(4):
        notes, sums = Notes(), Summing()
        simulate(seed, "fcfs", notes, aggregate=False)
        simulate(seed, "fcfs", sums, aggregate=True)
        for replica, total in sums.sums.items():
            steps = [step for step in notes.steps if step.replica == replica]
            if not steps:
                assert total.steps == 0
                continue
            assert (total.steps, total.start, total.end) == (len(steps), steps[0].start, steps[-1].end)
            assert total.held_ns == sum(step.blocks_held * step.timing.total_ns for step in steps)
            assert total.peak_held == max(step.blocks_held for step in steps)
            assert total.evicted == sum(step.evicted for step in steps)
            assert total.preempted == sum(len(step.plan.preempted) for step in steps)
            assert total.digest == steps[-1].plan.digest


def test_a_promise_ends_with_an_arrival_and_an_abort() -> None:
    """A core that nobody drives through a clock forgets the promise itself."""
    from tests.control.harness import engine, request

    core, _ = engine(aggregate=True)
    core._wants_work = False

    def price(decodes: Decoding) -> StepTiming:
        return StepTiming(0, 0, 10, 0, 0)

    def ready(core: EngineCore) -> None:
        for now in (0, 10):
            plan = core.plan(now)
            core.commit(plan, _answer(plan), now + 10)
            core.observe(StepTiming(0, 0, 10, 0, 0))

    core.add(request("a", 3, 50), 0)
    ready(core)
    assert core.coast(price, 20, 60) == 50  # the next would end at 60, when something may happen
    core.add(request("b", 3, 50), 55)
    assert core.coast(price, 60, 1000) == 60
    ready(core)
    assert core.coast(price, 80, 95) == 90
    core.abort("b", 92)
    assert core.coast(price, 95, 1000) == 95


def _answer(plan: Any) -> Any:
    from lab.control.plan import StepResult

    return StepResult((0,) * plan.samples)
