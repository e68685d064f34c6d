"""The step loop that both drivers run. Control plane; observation path where it reports the step.

A generator that does everything but let time pass: it yields how many nanoseconds should, and the driver
(a SimPy process, or a loop that keeps a virtual or a wall clock) sees to that, and to arrivals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from lab.control.clock import ControlTimer
from lab.control.executor import Executor
from lab.control.plan import StepPlan, StepResult, StepTiming

IDLE = -1
"""Yielded when there is nothing to do until something arrives."""


class Planner(Protocol):
    """Who decides: an engine core, or a log of what one decided before."""

    def plan(self, now: int) -> StepPlan: ...
    def commit(self, plan: StepPlan, result: StepResult, now: int) -> object: ...
    def observe(self, timing: StepTiming) -> None: ...


def serve(
    core: Planner,
    executor: Executor,
    timer: ControlTimer,
    now: Callable[[], int],
    coast: Callable[[int], int] | None = None,
) -> Iterator[int]:
    """Steps, forever. Arrivals due at `now()` must be in the core before each resumption.

    A step takes plan + execute before its result is committed, and the commit's own time after that. `coast` is
    asked between two steps whether the time is known to pass until a later one (`EngineCore.coast`).
    """
    while True:
        timer.start()
        plan = core.plan(now())
        plan_ns = timer.plan_ns(plan)
        if not plan:
            yield IDLE
            continue
        result = executor.execute(plan)
        yield plan_ns + result.duration_ns
        timer.start()
        core.commit(plan, result, now())
        commit_ns = timer.commit_ns(plan)
        core.observe(
            StepTiming(
                plan_ns,
                result.prepare_ns,
                result.forward_ns,
                result.sample_ns,
                commit_ns,
                result.transfer_ns,
                result.compact_ns,
                result.terms,
            )
        )
        yield commit_ns
        if coast is not None:
            began = now()
            after = coast(began)
            if after > began:
                yield after - began
