"""Laws that hold in every step of any workload, under every policy: nothing is lost, nothing is over budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab import plugins
from lab.control.plan import GENESIS, StepPlan, chain
from lab.control.request import Prompt, Request, Segment
from lab.errors import RequestRefused
from lab.policy import EvictionPolicy, SchedulingPolicy
from policies.eviction.fifo import Fifo
from policies.eviction.lfu import Lfu
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from tests.control.harness import Notes, commit, engine

SCHEDULERS = [plugins.load("policy", name) for name in plugins.names("policy") if name != "vllm_v0"]
"""All that ship; vllm_v0 is prefill_first under another name."""


class LeafLru(Lru):
    """lru through the leaf-only path of the pool."""

    leaf_only = True


EVICTORS = [Lru, Fifo, Lfu, LeafLru]


@dataclass
class Case:
    arrivals: list[Request]
    aborts: dict[int, list[str]]
    blocks: int
    block_size: int
    token_budget: int
    max_seqs: int
    chunk: int | None
    prefix_cache: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 14))
    requests = []
    for i in range(count):
        shared = draw(st.integers(0, 40))
        own = draw(st.integers(1, 40))
        head = (Segment(draw(st.integers(0, 1)), 0, shared),) if shared else ()
        requests.append(
            Request(
                id=f"r{i}",
                prompt=Prompt((*head, Segment(100 + i, 0, own))),
                arrival=draw(st.integers(0, 200)),
                output_len=draw(st.integers(1, 25)),
                priority=draw(st.integers(0, 2)),
                ttft_slo=draw(st.sampled_from([None, 30, 300])),
                tpot_slo=draw(st.sampled_from([None, 10])),
            )
        )
    requests.sort(key=lambda r: r.arrival)
    names = st.lists(st.sampled_from([r.id for r in requests]), max_size=2)
    return Case(
        arrivals=requests,
        aborts=draw(st.dictionaries(st.integers(0, 40), names, max_size=4)),
        blocks=draw(st.integers(4, 40)),
        block_size=draw(st.sampled_from([1, 3, 4, 16])),
        token_budget=draw(st.integers(1, 60)),
        max_seqs=draw(st.integers(1, 8)),
        chunk=draw(st.sampled_from([None, 1, 7])),
        prefix_cache=draw(st.booleans()),
    )


def play(
    case: Case, policy: SchedulingPolicy, eviction: EvictionPolicy
) -> tuple[Notes, list[StepPlan], set[str]]:
    """Run a case to its end, checking every law after every move. Returns the refused ids too."""
    core, notes = engine(
        policy,
        eviction,
        blocks=case.blocks,
        block_size=case.block_size,
        token_budget=case.token_budget,
        max_seqs=case.max_seqs,
        chunk=case.chunk,
        prefix_cache=case.prefix_cache,
    )
    now, due, plans, refused = 0, list(case.arrivals), [], set()
    while due or core.has_work:
        while due and due[0].arrival <= now:
            try:
                core.add(due[0], due[0].arrival)
            except RequestRefused as refusal:
                if refusal.needed <= refusal.available:
                    raise
                refused.add(due[0].id)
            due.pop(0)
        plan = core.plan(now)
        core.check()
        if not plan:
            assert not core.has_work, f"stalled: {core.stalled()}"
            now = due[0].arrival if due else now
            continue
        names = [work.request for work in plan.work]
        assert len(set(names)) == len(names)
        assert plan.tokens <= case.token_budget
        assert len(plan.work) <= case.max_seqs
        for name in case.aborts.get(plan.index, ()):
            core.abort(name, now)
            core.check()
        commit(core, plan, now + 10)
        core.check()
        plans.append(plan)
        now += 10
        assert len(plans) < 20_000, "no end in sight"
    return notes, plans, refused


@pytest.mark.parametrize("eviction", EVICTORS)
@pytest.mark.parametrize("policy", SCHEDULERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_everything_ends_and_everything_is_given_back(
    policy: type[SchedulingPolicy], eviction: type[EvictionPolicy], case: Case
) -> None:
    notes, plans, refused = play(case, policy(), eviction())
    assert set(notes.requests) | refused == {r.id for r in case.arrivals}
    for record in notes.requests.values():
        request = record.request
        times = record.token_times
        assert record.intervals[0].start == request.arrival
        assert record.intervals[-1].end == record.end
        for left, right in itertools.pairwise(record.intervals):
            assert left.end == right.start
        assert all(i.start <= i.end for i in record.intervals)
        assert list(times) == sorted(times)
        if record.outcome == "finished":
            assert len(times) == request.output_len
            assert record.end == times[-1]
            # TTFT + the sum of inter-token latencies is the end-to-end latency, to the nanosecond.
            gaps = sum(b - a for a, b in itertools.pairwise(times))
            assert (times[0] - request.arrival) + gaps == record.end - request.arrival
            work = sum(w.tokens for plan in plans for w in plan.work if w.request == request.id)
            assert work == record.computed_tokens
            if record.preemptions == 0:
                assert work + record.cached_tokens == len(request.prompt) + len(times) - 1


@pytest.mark.parametrize("policy", SCHEDULERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_the_same_case_gives_the_same_chain_of_digests(policy: type[SchedulingPolicy], case: Case) -> None:
    first, again = (play(case, policy(), Lru())[1] for _ in range(2))
    assert [plan.digest for plan in first] == [plan.digest for plan in again]
    digest = GENESIS
    for plan in first:
        digest = chain(digest, plan.index, plan.work, plan.preempted, plan.rejected)
        assert plan.digest == digest


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_prefix_cache_never_adds_work_when_nobody_is_preempted(case: Case) -> None:
    case.aborts = {}
    totals = {}
    for cache in (True, False):
        case.prefix_cache = cache
        notes, plans, _ = play(case, Fcfs(), Lru())
        totals[cache] = sum(plan.tokens for plan in plans)
        if any(record.preemptions for record in notes.requests.values()):
            return
    assert totals[True] <= totals[False]
