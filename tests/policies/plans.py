"""Reading plans, for scenarios made by hand on the real engine core."""

from __future__ import annotations

from lab.control.core import EngineCore
from lab.control.plan import StepPlan
from lab.control.request import Request

SECOND = 10**9


def work(plan: StepPlan) -> list[tuple[str, int]]:
    return [(item.request, item.tokens) for item in plan.work]


def names(plan: StepPlan) -> list[str]:
    return [item.request for item in plan.work]


def add(core: EngineCore, *requests: Request, now: int = 0) -> None:
    for one in requests:
        core.add(one, now)
