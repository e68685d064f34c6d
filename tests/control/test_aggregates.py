"""Decodes kept as sums take the same decisions, at the same times, as touching every request."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest

from lab import plugins
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.control.plan import GENESIS, StepPlan, StepResult, StepTiming, chain
from lab.control.request import Prompt, Request, SamplingParams, Segment, stream_of
from lab.control.step import Limits, StepBuilder
from lab.errors import RequestRefused
from lab.policy import EvictionPolicy, Step
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from tests.control.harness import Notes, drain, engine, request, step

SCHEDULERS = plugins.names("policy")
PREEMPTION = plugins.names("preemption")


class HookedLru(Lru):
    """lru through its own hooks, not through the order that the pool keeps."""


def workload(rng: random.Random) -> list[Request]:
    found: list[Request] = []
    now = 0
    for number in range(rng.randint(5, 40)):
        now += rng.choice((0, 0, 5, 40, 900))
        pieces = [Segment(stream_of("own", number), 0, rng.randint(1, 50))]
        if rng.random() < 0.4:
            pieces.insert(0, Segment(rng.randrange(2), 0, rng.randint(1, 40)))
        if found and rng.random() < 0.2:  # a later turn, which quotes an earlier one's output
            before = rng.choice(found)
            quoted = Segment(before.output_stream, 0, before.output_limit)
            pieces = [*before.prompt.pieces, quoted, *pieces]
        output = rng.randint(1, 60)
        forced = rng.random() < 0.85
        found.append(
            Request(
                id=f"r{number}",
                prompt=Prompt(tuple(pieces)),
                arrival=now,
                output_len=output if forced else None,
                max_tokens=output,
                sampling=SamplingParams(logprobs=1 if rng.random() < 0.1 else None),
                tenant=f"t{rng.randrange(3)}",
                priority=rng.randrange(3),
                ttft_slo=rng.choice((None, 300)),
                tpot_slo=rng.choice((None, 20)),
            )
        )
    return found


def play(
    seed: int,
    policy: str,
    *,
    aggregate: bool,
    eviction: EvictionPolicy | None = None,
) -> tuple[Notes, list[StepPlan], list[tuple[Any, ...]]]:
    """One random workload in a small engine, with clients that go away; every law checked at every move."""
    rng = random.Random(seed)
    requests = workload(rng)
    size = rng.choice((1, 3, 4, 16))
    core, notes = engine(
        plugins.create("policy", policy),
        eviction or Lru(),
        blocks=rng.choice((12, 30, 80, 600)) * 16 // size // rng.choice((1, 2)),
        block_size=size,
        token_budget=rng.choice((6, 20, 64)),
        max_seqs=rng.choice((2, 6, 12)),
        chunk=rng.choice((None, None, 5)),
        capacity={"host_blocks": rng.choice((0, 40)), "block_bytes": 100},
        prefix_cache=rng.random() < 0.8,
        preemption=plugins.create("preemption", rng.choice(PREEMPTION)),
        predictor=plugins.create("predictor", rng.choice(("oracle", "noisy"))),
        aggregate=aggregate,
    )
    for part in (core.policy, core._preemption, core._predictor):
        part.rng = random.Random(seed)  # type: ignore[union-attr]
    gone = {rng.randrange(300): (rng.choice(requests).id, rng.random() < 0.5) for _ in range(6)}
    looks = rng.random() < 0.3
    now, plans, seen = 0, [], []
    while requests or core.has_work:
        while requests and requests[0].arrival <= now:
            with contextlib.suppress(RequestRefused):
                core.add(requests[0], now)
            del requests[0]
        plan = core.plan(now)
        core.check()
        if not plan:
            if not (requests or core.has_work):  # the last one was refused
                break
            assert requests, core.stalled()
            now = requests[0].arrival
            continue
        listed = replace(plan, work=tuple(plan.work))
        holders = Counter(block.id for live in core._requests.values() for block in live.blocks)
        assert plan.reread == size * sum(count - 1 for count in holders.values())
        if plan.index in gone and gone[plan.index][1]:
            core.abort(gone[plan.index][0], now)
        now += 3 + plan.tokens
        core.commit(plan, StepResult((0,) * plan.samples), now)
        core.observe(StepTiming(0, 0, now - plan.now, 0, 0))
        if plan.index in gone and not gone[plan.index][1]:
            core.abort(gone[plan.index][0], now)
        core.check()
        plans.append(listed)
        view = core.view(now)
        seen.append((view.tokens_to_compute, view.tokens_expected, view.context_tokens, view.blocks_free))
        if looks:
            seen += [
                (live.view.known, live.view.computed, live.view.blocks) for live in core._requests.values()
            ]
    return notes, plans, seen


def told(records: dict[str, RequestRecord]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records.values()]


NOTHING = StepPlan(0, 0, (), GENESIS)


def steps(records: list[StepRecord]) -> list[dict[str, Any]]:
    return [asdict(replace(record, plan=NOTHING)) for record in records]


def together(policy: str, seeds: range) -> int:
    """Play both ways and compare all there is; returns how many decodes were granted all together.

    Promises (`Step.repeat`) are kept in all but the first play, which asks the policy in every step.
    """
    count = 0
    for seed in seeds:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepBuilder, "repeat", lambda *args, **options: None)
            notes, plans, seen = play(seed, policy, aggregate=False)
        promised = play(seed, policy, aggregate=False)[1]
        assert promised == plans
        other, others, looked = play(seed, policy, aggregate=True)
        for one, two in zip(plans, others, strict=True):
            assert replace(two, decodes=one.decodes) == one
            count += two.decodes.seqs
        assert seen == looked
        assert list(notes.requests) == list(other.requests), "they ended in another order"
        assert told(notes.requests) == told(other.requests)
        assert steps(notes.steps) == steps(other.steps)
    return count


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_sums_and_touching_every_request_are_the_same(policy: str) -> None:
    count = together(policy, range(4))
    assert count > 1_000 or policy not in ("fcfs", "vllm_v1", "sjf")


@pytest.mark.slow
@pytest.mark.parametrize("policy", SCHEDULERS)
def test_they_are_the_same_over_many_workloads(policy: str) -> None:
    together(policy, range(100, 220))


def test_the_digest_of_sums_is_that_of_the_list() -> None:
    for seed in range(6):
        _, plans, _ = play(seed, "fcfs", aggregate=True)
        digest = GENESIS
        for plan in plans:
            moves = (plan.swap_out, plan.swap_in)
            digest = chain(digest, plan.index, plan.work, plan.preempted, plan.rejected, *moves)
            assert plan.digest == digest


def test_the_pools_own_order_of_release_is_lru() -> None:
    for seed in range(12):
        _, plans, _ = play(seed, "fcfs", aggregate=True)
        _, others, _ = play(seed, "fcfs", aggregate=True, eviction=HookedLru())
        assert [plan.work for plan in plans] == [plan.work for plan in others]


def test_a_step_of_decodes_is_not_listed_unless_somebody_asks() -> None:
    observer = Observer()
    observer.wants_work = False
    policy, limits = plugins.create("policy", "fcfs"), Limits(64, 8)
    core = EngineCore(policy, Lru(), capacity=Capacity(100), limits=limits, observer=observer, aggregate=True)
    core.add(request("a", 20, 5), 0)
    core.add(request("b", 20, 7), 0)
    plan = core.plan(0)
    core.commit(plan, StepResult((0,) * plan.samples), 10)
    core.observe(StepTiming(0, 0, 10, 0, 0))
    plan = core.plan(10)
    assert (len(plan.work), plan.tokens, plan.samples, plan.items) == (2, 2, 2, ())
    assert (plan.decodes.seqs, plan.decodes.context, plan.decodes.longest) == (2, 42, 21)
    core.commit(plan, StepResult((0, 0)), 20)
    with pytest.raises(RuntimeError, match="while it is in flight"):
        list(plan.work)


@pytest.mark.parametrize("aggregate", [False, True])
def test_a_policy_is_not_asked_again_for_steps_that_it_promised(aggregate: bool) -> None:
    asked: list[int] = []

    class Counting(Fcfs):
        def schedule(self, step: Step) -> None:
            asked.append(step.index)
            super().schedule(step)

    core, _notes = engine(Counting(), Lru(), blocks=40, token_budget=64, aggregate=aggregate)
    core.add(request("early", 8, output=20), 0)
    indices = [step(core, now).index for now in range(0, 100, 10)]
    core.add(request("late", 8, output=5), 100)
    indices += [step(core, now).index for now in range(100, 130, 10)]
    assert indices == list(range(13))
    assert {0, 10} <= set(asked)  # a prompt to compute, and somebody who came
    assert len(asked) <= 6


@pytest.mark.parametrize("aggregate", [False, True])
def test_a_block_may_be_as_large_as_it_likes(aggregate: bool) -> None:
    core, notes = engine(
        blocks=3, block_size=1 << 40, token_budget=64, aggregate=aggregate, prefix_cache=False
    )
    core.add(request("a", 8, output=3), 0)
    core.add(request("b", 8, output=5), 0)
    drain(core)
    assert [len(record.output) for record in notes.requests.values()] == [3, 5]
