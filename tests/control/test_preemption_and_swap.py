"""Who is preempted and what becomes of its KV: dropped and computed again, or parked in host memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.control.core import EngineCore
from lab.control.plan import StepPlan
from lab.errors import PolicyError
from lab.policy import How, PreemptionPolicy, RequestView, SchedulingPolicy, Step
from policies.preemption.cost_benefit import CostBenefit
from policies.preemption.largest_kv import LargestKv
from policies.preemption.last import Last
from policies.preemption.least_progress import LeastProgress
from policies.preemption.lowest_priority import LowestPriority
from policies.scheduling.common import QueueingPolicy
from policies.scheduling.fcfs import Fcfs
from policies.scheduling.priority import Priority
from tests.control.harness import commit, drain, engine, request, step

HOST = {"host_blocks": 64, "block_bytes": 1 << 16}


class Randomly(PreemptionPolicy):
    """Any victim, any mode."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def victim(self, candidates: list[RequestView], step: Step) -> RequestView:  # type: ignore[override]
        return self.rng.choice(candidates)

    def how(self, victim: RequestView, step: Step) -> How:
        return self.rng.choice(["recompute", "swap"])


def moves(plans: list[StepPlan]) -> tuple[int, int]:
    out = sum(len(move.pairs) for plan in plans for move in plan.swap_out)
    back = sum(len(move.pairs) for plan in plans for move in plan.swap_in)
    return out, back


def timed(core: EngineCore) -> Iterator[StepPlan]:
    """As `drain`, but a step takes as long as its tokens are many."""
    now = 0
    while core.has_work:
        plan = core.plan(now)
        now += 1000 + 1000 * plan.tokens
        commit(core, plan, now)
        yield plan


def test_a_swapped_request_goes_on_where_it_was() -> None:
    core, notes = engine(blocks=6, preemption=Last("swap"), capacity=HOST, prefix_cache=False)
    core.add(request("first", 30, output=30), 0)
    core.add(request("second", 30, output=30), 0)
    plans = drain(core, check=core.check)
    assert any(plan.swap_out for plan in plans)
    for name, record in notes.requests.items():
        assert record.computed_tokens == 59, f"{name} computed something twice"
    causes = [part.cause for part in notes.requests["second"].intervals if part.phase == "queue"]
    assert "swapped" in causes
    assert "preempted" not in causes
    assert moves(plans)[0] == moves(plans)[1]


def test_what_comes_back_is_what_was_parked_block_by_block() -> None:
    core, _ = engine(blocks=6, preemption=Last("swap"), capacity=HOST, prefix_cache=False)
    core.add(request("first", 30, output=30), 0)
    core.add(request("second", 30, output=30), 0)
    device: dict[int, object] = {}
    host: dict[int, object] = {}
    tables: dict[str, list[int]] = {}
    for plan in drain(core):
        for name, _ in plan.preempted:
            kept = tables.pop(name)
            out = {move.request: move.pairs for move in plan.swap_out}[name]
            assert [block for block, _ in out] == kept[: len(out)], "out goes the table's own beginning"
        for move in plan.swap_out:
            host.update({there: device[here] for here, there in move.pairs})
        for name in plan.admitted:
            tables[name] = []
        for work in plan.work:
            tables[work.request] += work.blocks
        for move in plan.swap_in:
            device.update({here: host.pop(there) for here, there in move.pairs})
        for work in plan.work:
            for position in range(work.start):
                assert device[tables[work.request][position // 16]] == (work.request, position // 16)
            for position in range(work.start, work.start + work.tokens):
                device[tables[work.request][position // 16]] = (work.request, position // 16)
        for name in plan.released:
            tables.pop(name, None)


class Scripted(SchedulingPolicy):
    """Does what the test says next."""

    def __init__(self) -> None:
        self.then: Callable[[Step], object] = lambda step: None

    def schedule(self, step: Step) -> None:
        self.then(step)


def test_what_comes_back_never_overwrites_the_end_of_a_block_that_others_can_find() -> None:
    script = Scripted()
    core, _ = engine(script, blocks=16, block_size=4, token_budget=16, capacity={"host_blocks": 8})
    text = list(range(9))

    def play(then: Callable[[Step], object]) -> StepPlan:
        script.then = then
        return step(core)

    core.add(request("a", text[:8], output=2), 0)
    play(lambda s: s.run("a", 5))
    play(lambda s: s.preempt("a", "swap"))  # its second block holds one token of four
    core.add(request("b", text[:8], output=1), 0)
    play(lambda s: s.run("b"))  # leaves all of that block's content in the cache
    core.add(request("c", text, output=1), 0)
    plan = play(lambda s: (s.run("a", 1), s.run("c")))
    back = {device for move in plan.swap_in for device, _ in move.pairs}
    used = next(work.blocks for work in plan.work if work.request == "c")
    assert back
    assert not back & set(used)
    core.check()


def test_without_room_in_host_memory_swapping_becomes_recomputing() -> None:
    core, _ = engine(blocks=6, preemption=Last("swap"), capacity=HOST | {"host_blocks": 1})
    core.add(request("first", 30, output=30), 0)
    core.add(request("second", 30, output=30), 0)
    plans = drain(core, check=core.check)
    assert [how for plan in plans for _, how in plan.preempted] == ["recompute"]
    assert moves(plans) == (0, 0)


def test_a_swapped_request_that_is_aborted_gives_its_host_blocks_back() -> None:
    core, notes = engine(blocks=6, preemption=Last("swap"), capacity=HOST)
    core.add(request("first", 30, output=30), 0)
    core.add(request("second", 30, output=30), 0)
    while core.host.free == core.host.total:
        assert step(core)
    core.abort("second", 5)
    assert notes.requests["second"].outcome == "aborted"
    core.check()
    drain(core, check=core.check)
    core.host.settle()
    assert core.host.free == core.host.total


def test_host_blocks_left_behind_by_a_swap_in_are_not_written_in_the_same_step() -> None:
    core, _ = engine(blocks=9, preemption=Randomly(1), capacity=HOST | {"host_blocks": 5}, max_seqs=8)
    for n in range(12):
        core.add(request(f"r{n}", 20 + n, output=25), 0)
    for plan in drain(core, check=core.check):
        read = {there for move in plan.swap_in for _, there in move.pairs}
        written = {there for move in plan.swap_out for _, there in move.pairs}
        assert not read & written


@given(
    seed=st.integers(0, 10_000),
    blocks=st.integers(8, 24),
    host=st.integers(0, 20),
    cache=st.booleans(),
    policy=st.sampled_from([Fcfs, Priority]),
)
def test_any_victims_in_any_mode_leave_the_books_straight(
    seed: int, blocks: int, host: int, cache: bool, policy: type[QueueingPolicy]
) -> None:
    rng = random.Random(seed)
    core, notes = engine(
        policy(),
        blocks=blocks,
        block_size=4,
        token_budget=24,
        max_seqs=6,
        chunk=10,
        preemption=Randomly(seed),
        capacity={"host_blocks": host, "block_bytes": 100},
        prefix_cache=cache,
    )
    head = [7] * rng.randint(0, 9)
    for n in range(10):
        text = [*head, *(100 * n + i for i in range(rng.randint(1, 12)))]
        core.add(request(f"r{n}", text, output=rng.randint(1, 10), priority=rng.randint(0, 2)), 0)
    drain(core, check=core.check)
    assert core.pool.held == 0
    core.host.settle()
    assert core.host.free == host
    for record in notes.requests.values():
        assert record.outcome == "finished"
        assert len(record.token_times) == record.request.output_limit


@pytest.mark.parametrize(
    ("chooser", "loses"),
    [
        (Last(), "late"),
        (LargestKv(), "big"),
        (LeastProgress(), "late"),
        (LowestPriority(), "humble"),
        (CostBenefit("recompute"), "late"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_each_choice_takes_its_own_victim(chooser: PreemptionPolicy, loses: str) -> None:
    core, _ = engine(blocks=13, preemption=chooser, token_budget=4096, prefix_cache=False)
    core.add(request("first", 40, output=60), 0)  # 3 blocks, and never a candidate: it is first in line
    core.add(request("big", 70, output=60), 0)  # 5 blocks
    core.add(request("humble", 40, output=60, priority=5), 0)  # 3 blocks
    core.add(request("late", 20, output=60), 0)  # 2 blocks, fewest tokens for a block
    lost = next(plan.preempted for plan in timed(core) if plan.preempted)
    assert lost[0][0] == loses


def test_break_even_swaps_when_that_is_quicker_and_recomputes_when_not() -> None:
    for nanoseconds_per_block, expected in ((1, "swap"), (10**12, "recompute")):
        link = {"host_blocks": 64, "block_bytes": nanoseconds_per_block, "transfer_gb_s": 1.0}
        core, _ = engine(blocks=6, preemption=Last("break_even"), capacity=link)
        for name in ("first", "second"):
            core.add(request(name, 30, output=30), 0)
        assert {how for plan in timed(core) for _, how in plan.preempted} == {expected}


class Elsewhere(PreemptionPolicy):
    def victim(self, candidates, step):  # type: ignore[no-untyped-def]
        return next(iter(step.waiting.values()), None)


class Undecided(PreemptionPolicy):
    def how(self, victim: RequestView, step: Step) -> How:
        return "perhaps"  # type: ignore[return-value]


class Broken(PreemptionPolicy):
    def how(self, victim: RequestView, step: Step) -> How:
        raise KeyError("oops")


@pytest.mark.parametrize(
    ("chooser", "words"),
    [
        (Elsewhere(), r"preemption policy 'Elsewhere', step \d+: victim\(\) returned .*; expected one of"),
        (Undecided(), r"preemption policy 'Undecided', step \d+: how\(\) returned 'perhaps'"),
        (Broken(), r"preemption policy 'Broken' raised KeyError.*in how, step \d+.*test_preemption_and_swap"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_preemption_policy_that_errs_is_named(chooser: PreemptionPolicy, words: str) -> None:
    core, _ = engine(blocks=6, preemption=chooser, capacity=HOST)
    for name in ("first", "second"):
        core.add(request(name, 30, output=30), 0)
    with pytest.raises(PolicyError, match=words):
        drain(core)
