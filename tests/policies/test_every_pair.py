"""Every scheduling policy over every eviction policy, on the simulator, with too little KV and all invariants on."""

from __future__ import annotations

import random

import pytest

from lab import plugins
from lab.assembly import EngineSpec, assemble
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from sim.driver import Simulation
from sim.executor import SimExecutor

MS = 1_000_000


class Affine:
    """A step takes 5 ms, and 50 us a token."""

    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(100_000, 100_000, 5 * MS + 50_000 * plan.tokens, 50_000, 50_000)


def workload(seed: int = 1, count: int = 24) -> list[Request]:
    """Two bursts of sessions with shared heads, tenants, priorities and tight objectives."""
    rng = random.Random(seed)
    found = []
    for n in range(count):
        head = Segment(n % 3, 0, 8 * rng.randint(0, 4))
        own = Segment(100 + n, 0, rng.randint(1, 30))
        found.append(
            Request(
                id=f"r{n:02}",
                prompt=Prompt((head, own) if len(head) else (own,)),
                arrival=(n // 12) * 150 * MS + (n % 12) * (n % 3) * MS,
                output_len=rng.randint(1, 20),
                tenant=f"t{n % 3}",
                session=f"s{n % 5}",
                priority=n % 3,
                ttft_slo=80 * MS,
                tpot_slo=9 * MS,
            )
        )
    return sorted(found, key=lambda request: request.arrival)


@pytest.mark.parametrize("eviction", plugins.names("eviction"))
@pytest.mark.parametrize("policy", plugins.names("policy"))
def test_a_pair_serves_everybody_and_keeps_the_books_straight(policy: str, eviction: str) -> None:
    requests, recorder, capacity = (
        workload(),
        Recorder(),
        Capacity(24, 4, host_blocks=10, block_bytes=1 << 14),
    )
    spec = EngineSpec(
        {
            "policy": {"name": policy},
            "eviction": {"name": eviction},
            "preemption": {"name": "cost_benefit"},
        },
        Limits(40, 5, 16),
        True,
        seed=3,
    )
    control = assemble(spec, capacity, recorder, requests)

    def check(core: EngineCore, now: int) -> None:
        core.check()

    Simulation(control, SimExecutor(Affine(), capacity), requests, check).run()
    assert len(recorder.requests) == len(requests)
    for record in recorder.requests:
        assert record.outcome in ("finished", "rejected")
        if record.outcome == "finished":
            assert len(record.token_times) == record.request.output_limit
    finished = sum(record.outcome == "finished" for record in recorder.requests)
    assert finished == len(requests) or policy in REJECTS, f"only {finished} of {len(requests)} finished"
    core = control.core
    assert core.pool.held == 0
    core.host.settle()
    assert core.host.free == core.host.total


REJECTS: set[str] = set()
"""Policies whose rule gives up on requests."""
