"""What sets apart the policies that look at deadlines and readers: least_slack, andes."""

from __future__ import annotations

import random

from lab.control.core import EngineCore
from lab.control.plan import StepPlan
from policies.scheduling.andes import Andes
from policies.scheduling.least_slack import LeastSlack
from tests.control.harness import commit, drain, engine, request, step
from tests.policies.plans import SECOND, add, names

PREFILL, DECODE, BASE = 1000, 2000, 50_000


def run_linear(core: EngineCore, now: int) -> tuple[StepPlan, int]:
    """A step whose duration is linear in what it computes; returns the plan and the time after it."""
    plan = core.plan(now)
    decodes = sum(item.tokens == 1 for item in plan.work)
    took = BASE + DECODE * decodes + PREFILL * (plan.tokens - decodes)
    commit(core, plan, now + took)
    return plan, now + took


def test_least_slack_chunks_are_as_large_as_the_decodes_deadlines_allow() -> None:
    core, notes = engine(LeastSlack(floor=1), token_budget=2000, blocks=9000, max_seqs=32)
    rng = random.Random(3)
    now = 0
    for i in range(40):  # teach the estimate
        core.add(request(f"t{i}", rng.randint(1, 500), output=rng.randint(1, 5)), now)
        _, now = run_linear(core, now)
    while core.has_work:
        _, now = run_linear(core, now)
    tpot = 400_000
    core.add(request("reader", 10, output=200, arrival=now, ttft_slo=100_000, tpot_slo=tpot), now)
    _, now = run_linear(core, now)
    for i in range(12):
        core.add(request(f"p{i}", 3000, output=1, arrival=now), now)
    chunks = []
    while core.has_work:
        plan, now = run_linear(core, now)
        chunks.append(plan.tokens - 1)
    times = notes.requests["reader"].token_times
    start = notes.requests["reader"].request.arrival + 100_000
    late = [t - (start + k * tpot) for k, t in enumerate(times)]
    assert max(late[5:]) < 0.02 * tpot  # up to what a token of prompt takes and the estimate errs
    steady = chunks[20:60]
    room = (tpot - BASE - DECODE) // PREFILL
    assert all(0.9 * room <= chunk <= 1.1 * room for chunk in steady), steady


def test_least_slack_serves_the_prompt_that_can_least_afford_to_wait() -> None:
    core, _ = engine(LeastSlack(), token_budget=64)
    add(
        core,
        request("relaxed", 64, ttft_slo=10**9),
        request("tight", 64, ttft_slo=10**3),
        request("none", 64),
    )
    order = [
        item.request for plan in (step(core, n) for n in range(4)) for item in plan.work if item.tokens > 1
    ]
    assert list(dict.fromkeys(order)) == ["tight", "relaxed", "none"]


def test_andes_lends_the_memory_of_a_reader_who_is_behind_to_one_who_waits() -> None:
    core, notes = engine(Andes(horizon_s=1.0), max_seqs=1)
    core.add(request("ahead", 4, output=60, ttft_slo=0, tpot_slo=SECOND), 0)
    for n in range(30):
        step(core, n * 1000)  # 30 tokens at once, a minute's reading
    core.add(request("waits", 4, output=3, arrival=30_000, ttft_slo=0, tpot_slo=SECOND // 10), 30_000)
    plan = step(core, 30_000)
    assert [name for name, _ in plan.preempted] == ["ahead"]
    assert names(plan) == ["waits"]
    drain(core, 40_000)
    assert notes.requests["ahead"].preemptions == 1


def test_andes_displaces_nobody_whose_reader_waits_for_the_next_token() -> None:
    core, _ = engine(Andes(horizon_s=1.0), max_seqs=1)
    core.add(request("behind", 4, output=60, ttft_slo=0, tpot_slo=SECOND), 0)
    step(core)
    core.add(
        request("waits", 4, output=3, arrival=20 * SECOND, ttft_slo=0, tpot_slo=SECOND // 10), 20 * SECOND
    )
    assert not step(core, 20 * SECOND).preempted
