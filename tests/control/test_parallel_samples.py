"""Several outputs of one request: one prompt computed, its blocks shared, copied when written to, all given back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab import plugins
from lab.control.core import EngineCore
from lab.control.gateway import Gateway
from lab.control.plan import GENESIS, StepPlan, digest_of
from lab.control.request import Prompt, Request, Segment
from lab.errors import RequestRefused
from lab.policy import Ended, Step
from policies.admission.always import Always
from policies.eviction.lru import Lru
from policies.routing.single import Single
from policies.scheduling.fcfs import Fcfs
from tests.control.harness import Notes, commit, drain, engine, fleet_of, request

SCHEDULERS = plugins.names("policy")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("prompt", "copies"), [(16, 1), (17, 0), (20, 1), (40, 1)])
def test_a_prompt_is_computed_once_and_its_last_block_copied(cache: bool, prompt: int, copies: int) -> None:
    core, notes = engine(prefix_cache=cache)
    core.add(request("a", prompt, 4, n=3), 0)
    plans = drain(core, check=core.check)
    assert sorted(notes.requests) == ["a#1", "a#2", "a#3"]
    computed = {name: record.computed_tokens for name, record in notes.requests.items()}
    assert computed == {"a#1": prompt + 3, "a#2": 4, "a#3": 4}
    assert sum(plan.copied_blocks for plan in plans) == 2 * copies
    assert core.pool.held == 0


def test_full_blocks_are_shared_and_nobody_writes_into_a_block_of_two() -> None:
    core, _ = engine(prefix_cache=False, block_size=4)
    core.add(request("a", 10, 3, n=2), 0)
    commit(core, core.plan(0), 10)
    plan = core.plan(10)
    one, two = core._requests["a#1"], core._requests["a#2"]
    assert [b.id for b in one.blocks[:2]] == [b.id for b in two.blocks[:2]]
    assert plan.copies[0].pairs == ((one.blocks[2].id, two.blocks[2].id),)
    assert one.blocks[2] is not two.blocks[2]
    assert [(w.request, w.start, w.tokens) for w in plan.work] == [("a#1", 10, 1), ("a#2", 9, 1)]


@pytest.mark.parametrize("end", ["a#1", "a#2", "a"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_parent_and_sequences_end_in_any_state(end: str, after: int) -> None:
    core, notes = engine(chunk=12, prefix_cache=False)
    core.add(request("a", 30, 5, n=3), 0)
    now = 0
    for _ in range(after):
        commit(core, core.plan(now), now + 10)
        now += 10
    assert core.abort(end, now)
    core.check()
    drain(core, now, check=core.check)
    outcomes = {name: record.outcome for name, record in notes.requests.items()}
    gone = ("a#1", "a#2", "a#3") if end == "a" else (end,)
    assert outcomes == {f"a#{i}": "aborted" if f"a#{i}" in gone else "finished" for i in (1, 2, 3)}
    assert core.pool.held == 0
    assert not core.abort("a", now)


def test_the_others_stay_held_when_one_of_them_goes() -> None:
    core, notes = engine(chunk=12, prefix_cache=False)
    core.add(request("a", 30, 5, n=3), 0)
    commit(core, core.plan(0), 10)
    core.abort("a#2", 10)
    drain(core, 10, check=core.check)
    assert {name: record.computed_tokens for name, record in notes.requests.items()} == {
        "a#1": 34,
        "a#2": 0,
        "a#3": 5,
    }


def test_nothing_is_copied_from_blocks_that_are_swapped_in_by_the_same_step() -> None:
    class Scripted(Fcfs):
        def schedule(self, step: Step) -> None:
            if step.index == 3:
                assert step.preempt("a#1", "swap") == "swap"
                step.preempt("a#2", "recompute")
            else:
                for name in ("a#1", "a#2"):
                    if name in step.running or name in step.waiting:
                        step.run(name)

    core, _ = engine(
        Scripted(), prefix_cache=False, block_size=4, capacity={"host_blocks": 9, "block_bytes": 1}
    )
    core.add(request("a", 10, 9, n=2), 0)
    plans = drain(core, check=core.check)
    assert [bool(plan.copies) for plan in plans[:5]] == [False, True, False, False, False]
    assert plans[4].swap_in
    assert [(work.start, work.tokens) for work in plans[4].work] == [(12, 1), (0, 12)]


def test_names_of_a_group_are_taken() -> None:
    core, _ = engine()
    core.add(request("a", 5, 2, n=2), 0)
    for taken in ("a", "a#2"):
        with pytest.raises(RequestRefused, match="is being served"):
            core.add(request(taken, 5), 0)
    core.add(request("b#1", 5), 0)
    with pytest.raises(RequestRefused, match="is being served"):
        core.add(request("b", 5, n=2), 0)


def test_policies_before_the_engine_decide_once_and_hear_once() -> None:
    told: list[tuple[str, Ended]] = []

    class Listening(Always):
        def on_finish(self, request: Request, ended: Ended, now: int) -> None:
            told.append((request.id, ended))

    core, notes = engine()
    gateway = Gateway(Listening(), Single(), fleet_of(core))
    core.on_ended = gateway.ended
    gateway.submit(request("a", 5, 3, n=4), 0)
    drain(core)
    assert len(notes.requests) == 4
    ((name, ended),) = told
    assert (name, ended.outcome, ended.tokens) == ("a", "finished", 12)


def workload(rng: random.Random) -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            prompt=Prompt(
                (Segment(rng.randrange(2), 0, rng.randint(0, 20)), Segment(100 + i, 0, rng.randint(1, 30)))
            ),
            arrival=rng.randint(0, 150),
            output_len=rng.randint(1, 20),
            n=rng.choice((1, 2, 3, 5)),
            priority=rng.randrange(3),
        )
        for i in range(rng.randint(1, 8))
    ]


def play(
    seed: int, policy: str, aggregate: bool = False
) -> tuple[Notes, list[StepPlan], EngineCore, set[str]]:
    """A random workload with aborts of parents and sequences; every law at every move."""
    rng = random.Random(seed)
    due = sorted(workload(rng), key=lambda r: r.arrival)
    size = rng.choice((1, 3, 4, 16))
    core, notes = engine(
        plugins.create("policy", policy),
        Lru(),
        blocks=rng.choice((50, 60, 90, 400)) // size + 2,
        block_size=size,
        token_budget=rng.choice((5, 20, 64)),
        max_seqs=rng.choice((1, 3, 8)),
        chunk=rng.choice((None, 1, 7)),
        capacity={"host_blocks": rng.choice((0, 30)), "block_bytes": 10},
        prefix_cache=rng.random() < 0.5,
        preemption=plugins.create("preemption", rng.choice(plugins.names("preemption"))),
        aggregate=aggregate,
    )
    for part in (core.policy, core._preemption):
        part.rng = random.Random(seed)
    names = [known.id for r in due for known in (r, *r.sequences())]
    gone = {rng.randrange(60): rng.choice(names) for _ in range(4)}
    now, plans, refused = 0, [], set()
    while due or core.has_work:
        while due and due[0].arrival <= now:
            try:
                core.add(due[0], now)
            except RequestRefused:
                refused.add(due[0].id)
            del due[0]
        plan = core.plan(now)
        core.check()
        if not plan:
            assert due or not core.has_work, core.stalled()
            now = due[0].arrival if due else now
            continue
        _no_shared_writes(core, plan)
        plans.append(replace(plan, work=tuple(plan.work)))
        if plan.index in gone and plan.index % 2:
            core.abort(gone[plan.index], now)
        now += 10
        commit(core, plan, now)
        if plan.index in gone and not plan.index % 2:
            core.abort(gone[plan.index], now)
        core.check()
        assert len(plans) < 5_000, "no end in sight"
    return notes, plans, core, refused


def _no_shared_writes(core: EngineCore, plan: StepPlan) -> None:
    """A block that two hold is written by nobody, unless all of them put the same content there."""
    if core.pool.prefix_cache:
        return
    for work in plan.work:
        live = core._requests[work.request]
        size = core.pool.block_size
        for block in core.pool.opened(live.table)[
            work.start // size : -(-(work.start + work.tokens) // size)
        ]:
            assert block.refs == 1, f"{live.view!r} writes into {block}"


@pytest.mark.parametrize("policy", SCHEDULERS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 20))
def test_every_sequence_ends_and_every_block_is_given_back(policy: str, seed: int) -> None:
    notes, plans, core, refused = play(seed, policy)
    requests = workload(random.Random(seed))
    wanted = {sequence.id for r in requests if r.id not in refused for sequence in r.sequences()}
    assert set(notes.requests) == wanted
    assert core.pool.held == 0
    for record in notes.requests.values():
        assert record.intervals[0].start == record.request.arrival
        if record.outcome == "finished":
            assert len(record.token_times) == record.request.output_len
    digest = GENESIS
    for plan in plans:
        assert plan.digest == digest_of(digest, plan)
        digest = plan.digest


def test_decodes_kept_as_sums_take_the_same_decisions() -> None:
    for seed in range(20):
        one, two = (play(seed, "fcfs", aggregate)[1] for aggregate in (False, True))
        assert [plan.digest for plan in one] == [plan.digest for plan in two]


def test_seeds_of_sequences_differ_and_repeat() -> None:
    one, again = (request("a", 5, n=3).sequences() for _ in range(2))
    assert one == again
    assert len({sequence.sampling.seed for sequence in one}) == 3
    assert [(s.id, s.parent, s.sample, s.n) for s in one] == [(f"a#{i}", "a", i, 1) for i in (1, 2, 3)]
