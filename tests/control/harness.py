"""A data plane with no model and no clock, and ways to drive an engine core through whole workloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.fleet import Fleet, FleetSpec
from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.control.plan import StepPlan, StepResult, StepTiming
from lab.control.request import Prompt, Request, Segment, stream_of
from lab.control.step import Limits
from lab.policy import EvictionPolicy, SchedulingPolicy
from policies.eviction.lru import Lru
from policies.scaling.fixed import Fixed
from policies.scheduling.fcfs import Fcfs


class Notes(Observer):
    """Keeps everything."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.requests: dict[str, RequestRecord] = {}

    def on_step(self, step: StepRecord) -> None:
        self.steps.append(step)

    def on_request(self, record: RequestRecord) -> None:
        assert record.request.id not in self.requests, "a request ended twice"
        self.requests[record.request.id] = record


def request(name: str, prompt: int | Sequence[int], output: int = 4, **options: object) -> Request:
    """A request with a private prompt of some length, or of literal tokens."""
    content = Prompt((Segment(stream_of(name), 0, prompt),)) if isinstance(prompt, int) else Prompt.of(prompt)
    return Request(id=name, prompt=content, output_len=output, **options)  # type: ignore[arg-type]


def engine(
    policy: SchedulingPolicy | None = None,
    eviction: EvictionPolicy | None = None,
    *,
    blocks: int = 1000,
    block_size: int = 16,
    token_budget: int = 1024,
    max_seqs: int = 16,
    chunk: int | None = None,
    capacity: dict[str, Any] | None = None,
    **options: object,
) -> tuple[EngineCore, Notes]:
    notes = Notes()
    core = EngineCore(
        policy or Fcfs(),
        eviction or Lru(),
        capacity=Capacity(blocks, block_size, **(capacity or {})),
        limits=Limits(token_budget, max_seqs, chunk),
        observer=notes,
        **options,  # type: ignore[arg-type]
    )
    return core, notes


def fleet_of(core: EngineCore) -> Fleet:
    """The core as a fleet of one, for a gateway to stand before."""
    return Fleet(lambda index, slot: core, Fixed(), FleetSpec(), observer=core._observer)


def commit(core: EngineCore, plan: StepPlan, now: int, token: int = 0) -> None:
    """Answer a plan with the same token for everybody, and report the step."""
    core.commit(plan, StepResult((token,) * sum(work.samples for work in plan.work)), now)
    core.observe(StepTiming(0, 0, now - plan.now, 0, 0))


def step(core: EngineCore, now: int = 0, took: int = 10) -> StepPlan:
    """Plan and commit one step."""
    plan = core.plan(now)
    if plan:
        commit(core, plan, now + took)
    return plan


def drain(
    core: EngineCore, now: int = 0, check: Callable[[], None] | None = None, limit: int = 10_000
) -> list[StepPlan]:
    """Step until nothing is left; fails if that takes more than `limit` steps."""
    plans = []
    while core.has_work:
        plan = core.plan(now)
        assert plan, "requests are left, but nothing was planned"
        if check:
            check()
        commit(core, plan, now + 10)
        if check:
            check()
        now += 10
        plans.append(plan)
        assert len(plans) <= limit, f"{limit} steps and no end"
    return plans


def tokens(plan: StepPlan) -> list[int]:
    return [work.tokens for work in plan.work]
