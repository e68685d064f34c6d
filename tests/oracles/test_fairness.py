"""VTC on a trace of 27 tenants: its fairness against order of arrival, and the bound that its authors prove.

The setting is that of the VTC paper (OSDI'24): ten minutes, a KV cache of 10,000 tokens, a server that can't
quite keep up (777 of 980 tokens a second). Service is one unit a prompt token and two an output token.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from lab import plugins
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.policy import SchedulingPolicy
from tests.oracles.queueing import SECOND, Floats, drive
from traces.registry import build

SHARED = Path(os.environ.get("DIPTYCH_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TRACE = SHARED / "traces" / "vtc_arena27.csv"
traced = pytest.mark.skipif(not TRACE.exists(), reason=f"the public trace is not at {TRACE}")

LENGTH, WARM_UP, WINDOW, TICKS = 600.0, 30.0, 60.0, 19
MEMORY = 10_000
"""Tokens of KV."""


@dataclass(frozen=True)
class SmallGpu:
    """About a 7B model on an A10G: milliseconds a step, a prompt token, a decode."""

    step: float = 22.0
    prompt: float = 0.25
    decode: float = 0.8

    def step_time(self, plan: StepPlan) -> StepTiming:
        decodes = sum(work.tokens == 1 for work in plan.work)
        prompts = plan.tokens - decodes
        ms = self.step + self.prompt * prompts + self.decode * decodes
        return StepTiming(0, 0, round(ms * 1e6), 0, 0)


class Lives(Observer):
    def __init__(self) -> None:
        self.all: list[RequestRecord] = []

    def on_request(self, record: RequestRecord) -> None:
        assert record.outcome == "finished", record
        self.all.append(record)


def policy(name: str) -> SchedulingPolicy:
    return cast(SchedulingPolicy, plugins.create("policy", name, {}))


def serve(name: str, requests: tuple[Request, ...]) -> list[RequestRecord]:
    lives = Lives()
    drive(policy(name), SmallGpu(), requests, lives, Capacity(MEMORY // 10, block_size=10), Limits(2048, 256))
    return sorted(lives.all, key=lambda record: record.seq)


@functools.cache
def arena(name: str) -> list[RequestRecord]:
    return serve(name, build("tenants", {"path": str(TRACE)}).requests)


def worth(record: RequestRecord) -> int:
    return len(record.request.prompt) + 2 * record.request.output_limit


def differences(records: list[RequestRecord]) -> Floats:
    """D at each tick: sum over tenants of min(most service - own service, |demand - own service|), per second.

    A request's service is spread evenly from its first token to its end; a tick looks at 60 s around it.
    """
    tenants = sorted({record.request.tenant for record in records})
    row = {tenant: index for index, tenant in enumerate(tenants)}
    answer = []
    for k in range(TICKS):
        lo = k * 28.5
        hi = lo + WINDOW
        service, demand = np.zeros(len(tenants)), np.zeros(len(tenants))
        for record in records:
            who, amount = row[record.request.tenant], worth(record)
            first, end = record.token_times[0] / SECOND, record.end / SECOND
            overlap = max(0.0, min(hi, end) - max(lo, first))
            if end > first:
                service[who] += amount * overlap / (end - first)
            elif lo <= first < hi:
                service[who] += amount
            demand[who] += amount * (lo <= record.request.arrival / SECOND < hi)
        service, demand = service / WINDOW, demand / WINDOW
        answer.append(np.minimum(service.max() - service, np.abs(demand - service)).sum())
    return np.array(answer)


def throughput(records: list[RequestRecord]) -> float:
    """Tokens a second within the trace's ten minutes: prompts when their first token comes, and output tokens."""
    until = LENGTH * SECOND
    prompts = sum(len(r.request.prompt) for r in records if r.token_times[0] <= until)
    return (prompts + sum(sum(t <= until for t in r.token_times) for r in records)) / LENGTH


def largest_gap(records: list[RequestRecord]) -> int:
    """The most that two tenants' service ever parted while both had requests waiting all the time."""
    moments: list[tuple[int, int, str, int, int]] = []  # time, order, tenant, change of waiting, service
    for record in records:
        tenant = record.request.tenant
        for interval in record.intervals:
            if interval.phase == "queue" and interval.end > interval.start:
                moments += [(interval.start, 0, tenant, 1, 0), (interval.end, 2, tenant, -1, 0)]
        for index, when in enumerate(record.token_times):
            moments.append((when, 1, tenant, 0, 2 + (len(record.request.prompt) if index == 0 else 0)))
    waiting: dict[str, int] = {}
    served: dict[str, int] = {}
    since: dict[tuple[str, str], list[int]] = {}  # of a pair that waits: least and greatest difference so far
    worst = 0
    for _, _, tenant, change, service in sorted(moments):
        served[tenant] = served.get(tenant, 0) + service
        before = waiting.get(tenant, 0)
        waiting[tenant] = before + change
        if not before and not waiting[tenant]:
            continue
        for other, count in waiting.items():
            if other == tenant or not count:
                continue
            pair = (min(tenant, other), max(tenant, other))
            if waiting[tenant]:
                gap = served.get(pair[0], 0) - served.get(pair[1], 0)
                bounds = since.setdefault(pair, [gap, gap])
                bounds[0], bounds[1] = min(bounds[0], gap), max(bounds[1], gap)
                worst = max(worst, bounds[1] - bounds[0])
            else:
                since.pop(pair, None)
    return worst


def bound(records: list[RequestRecord]) -> int:
    return 2 * max(max(len(record.request.prompt) for record in records), 2 * MEMORY)


@traced
def test_vtc_halves_the_unfairness_of_fcfs_at_equal_throughput(
    record_property: Callable[[str, object], None],
) -> None:
    fair, plain = arena("vtc"), arena("fcfs")
    ratio = differences(fair).max() / differences(plain).max()
    rates = throughput(fair), throughput(plain)
    record_property(
        "row",
        f"VTC/FCFS max difference: published 0.49; {differences(fair).max():.0f} / {differences(plain).max():.0f} = "
        f"{ratio:.3f}; means {differences(fair).mean():.0f} / {differences(plain).mean():.0f}; tokens/s {rates}",
    )
    assert rates[1] == pytest.approx(777, rel=0.03), "not the paper's regime"
    assert ratio == pytest.approx(0.49, abs=0.15)
    assert rates[0] == pytest.approx(rates[1], rel=0.02)


@traced
def test_vtc_keeps_its_bound_on_the_trace(record_property: Callable[[str, object], None]) -> None:
    gap = largest_gap(arena("vtc"))
    record_property("row", f"VTC largest gap on the trace: {gap} of {bound(arena('vtc'))}")
    assert gap <= bound(arena("vtc"))


@pytest.mark.parametrize("shape", ["alike", "long prompts against long outputs"])
def test_vtc_keeps_its_bound_between_tenants_that_always_wait(
    shape: str, record_property: Callable[[str, object], None]
) -> None:
    """One tenant asks three times as often as the other; order of arrival would serve it three times as much."""
    requests: list[Request] = []
    for i, tenant in itertools.product(range(400), ("eager", "calm")):
        if tenant == "calm" and i % 3:
            continue
        prompt, output = (100, 100) if shape == "alike" else (600, 20) if tenant == "eager" else (20, 300)
        requests.append(
            Request(
                id=f"{tenant}{i}",
                prompt=Prompt((Segment(i, 0, prompt),)),
                arrival=i * SECOND // 20,
                output_len=output,
                tenant=tenant,
            )
        )
    records = serve("vtc", tuple(requests))
    gap = largest_gap(records)
    record_property(
        "row",
        f"VTC largest gap, {shape}: {gap} of {bound(records)}; FCFS {largest_gap(serve('fcfs', tuple(requests)))}",
    )
    assert gap <= bound(records)
