"""Many single servers behind one router, against closed forms: random is M/M/1 each, two choices the mean field.

E[T] of d choices in the limit of many servers (Vvedenskaya, Dobrushin, Karpelevich 1996; Mitzenmacher 1996):
sum over i >= 1 of rho^((d^i - d) / (d - 1)), in units of the mean service time; for d = 2 the exponent is 2^i - 2,
for d = 1 it is i - 1 and the sum 1 / (1 - rho).
"""

from __future__ import annotations

import random

import pytest

from lab.assembly import EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.fleet import FleetSpec
from lab.control.observer import Observer, RequestRecord
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from sim.driver import Simulation
from sim.executor import SimExecutor

MEAN = 10_000
"""Tokens of a mean job. A job is one prompt, computed in one step, one nanosecond a token."""


class PerToken:
    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(0, 0, plan.tokens, 0, 0)


class Sojourns(Observer):
    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.total, self.count = warm_up, 0, 0

    def on_request(self, record: RequestRecord) -> None:
        if int(record.request.id) >= self.warm_up:
            self.total += record.end - record.request.arrival
            self.count += 1


def mean_time(routing: str, rho: float, *, servers: int, jobs: int, d: int = 2, seed: int = 5) -> float:
    """Mean time in the system over mean service time; the first fifth of the jobs is not counted."""
    rng = random.Random(seed)
    at, requests = 0.0, []
    for i in range(jobs):
        at += rng.expovariate(rho * servers / MEAN)
        size = max(1, round(rng.expovariate(1 / MEAN)))
        requests.append(
            Request(id=str(i), prompt=Prompt((Segment(i, 0, size),)), arrival=round(at), output_len=1)
        )
    chosen = {"name": routing, **({"d": d} if routing == "power_of_two" else {})}
    spec = EngineSpec(
        {"policy": {"name": "fcfs"}, "routing": chosen},
        Limits(1 << 40, 1),
        False,
        seed,
        FleetSpec(servers, servers),
    )
    capacity = Capacity(2, block_size=1 << 40, max_context=1 << 40)
    told = Sojourns(jobs // 5)
    Simulation(assemble(spec, capacity, told), SimExecutor(PerToken(), capacity), requests).run()
    assert told.count == jobs - jobs // 5
    return told.total / told.count / MEAN


def mean_field(rho: float, d: int) -> float:
    return sum(rho ** sum(d**k for k in range(1, i)) for i in range(1, 2000 if d == 1 else 12))


def test_the_formula_gives_the_published_numbers() -> None:
    assert mean_field(0.7, 2) == pytest.approx(1.614, abs=5e-4)
    assert mean_field(0.9, 2) == pytest.approx(2.614, abs=5e-4)
    assert mean_field(0.95, 2) == pytest.approx(3.383, abs=5e-4)
    assert mean_field(0.9, 1) == pytest.approx(10)


def test_two_choices_reach_the_mean_field() -> None:
    assert mean_time("power_of_two", 0.7, servers=40, jobs=12_000) == pytest.approx(
        mean_field(0.7, 2), rel=0.04
    )


def test_random_routing_is_a_row_of_single_servers() -> None:
    assert mean_time("random", 0.5, servers=20, jobs=10_000) == pytest.approx(2, rel=0.08)
    # One choice is random routing, draw by draw or not.
    assert mean_time("power_of_two", 0.5, servers=20, jobs=10_000, d=1) == pytest.approx(2, rel=0.08)


def test_more_choices_are_better_and_all_of_them_the_best() -> None:
    times = [mean_time("power_of_two", 0.8, servers=20, jobs=2500, d=d) for d in (1, 2, 4, 20)]
    assert times == sorted(times, reverse=True)
    assert times[3] == mean_time("least_requests", 0.8, servers=20, jobs=2500)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rho", "d", "tolerance"),
    [(0.7, 2, 0.015), (0.9, 2, 0.03), (0.95, 2, 0.05), (0.9, 3, 0.03), (0.7, 1, 0.05)],
)
def test_the_mean_field_with_a_hundred_servers(rho: float, d: int, tolerance: float) -> None:
    found = mean_time("power_of_two", rho, servers=100, jobs=150_000, d=d)
    assert found == pytest.approx(mean_field(rho, d), rel=tolerance)
