"""What sets apart the policies that differ in how a batch is made: fcfs, orca, vllm_v1, sarathi, mc_sf."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from lab.control.plan import StepResult, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.policy import LengthPredictor, PreemptionPolicy, RequestView, Step
from policies.scheduling.fcfs import Fcfs
from policies.scheduling.mc_sf import MemoryConstrainedShortest
from policies.scheduling.orca import Orca
from policies.scheduling.priority import Priority
from policies.scheduling.sarathi import Sarathi
from policies.scheduling.vllm_v1 import VllmV1
from tests.control.harness import commit, drain, engine, request, step, tokens
from tests.policies.plans import add, names, work


def test_backfill_passes_over_a_head_that_lacks_blocks_and_plain_fcfs_waits() -> None:
    for backfill, expected in ((False, ["first"]), (True, ["first", "small"])):
        core, _ = engine(Fcfs(backfill=backfill), blocks=10)
        add(core, request("first", 96, output=40), request("large", 90, output=40), request("small", 20))
        assert names(step(core)) == expected


def test_orca_never_preempts_where_fcfs_does() -> None:
    lost = {}
    for policy in (Fcfs(), Orca(), Orca("pow2"), Orca("max", ceiling=60)):
        core, notes = engine(policy, blocks=12, block_size=4, max_seqs=8)
        for i in range(8):
            core.add(request(f"r{i}", 5 + i, output=20 + i), 0)
        plans = drain(core, check=core.check)
        lost[policy] = sum(record.preemptions for record in notes.requests.values())
        together = max(len(plan.work) for plan in plans)
        if isinstance(policy, Orca):
            assert lost[policy] == 0
            # 12 blocks hold 48 tokens: one request with its output and no other, but for the smallest.
            assert together == 1
    assert next(iter(lost.values())) > 0


def test_orca_counts_what_running_requests_have_still_to_grow() -> None:
    core, _ = engine(Orca(), blocks=4, block_size=4, prefix_cache=False)
    add(core, request("a", 4, output=5), request("b", 4, output=5), request("c", 1, output=1))
    assert names(step(core)) == [
        "a",
        "b",
    ]  # 2 blocks each when they end; one is free now, and c may not have it
    assert names(step(core, 10)) == ["a", "b"]


def test_orca_computes_prompts_whole() -> None:
    core, _ = engine(Orca(), token_budget=100)
    add(core, request("a", 60), request("b", 60), request("giant", 130))
    assert [work(step(core, n)) for n in range(4)] == [
        [("a", 60)],
        [("a", 1), ("b", 60), ("giant", 39)],
        [("a", 1), ("b", 1), ("giant", 91)],
        [("a", 1), ("b", 1), ("giant", 1)],
    ]


def test_vllm_v1_caps_what_a_long_prompt_takes_so_that_a_short_one_gets_in() -> None:
    core, _ = engine(VllmV1(long_prefill_threshold=30), token_budget=64)
    add(core, request("long", 100), request("short", 20))
    assert work(step(core)) == [("long", 30), ("short", 20)]
    assert sorted(work(step(core, 10))) == [("long", 30), ("short", 1)]  # decodes go first


def test_vllm_v1_admits_nobody_in_a_step_that_preempts_and_the_preempted_comes_back_first() -> None:
    core, notes = engine(VllmV1(), blocks=4, block_size=4, max_seqs=3, prefix_cache=False)
    add(core, request("a", 8, output=8), request("b", 7, output=6))
    step(core)
    core.add(request("c", 1, output=1), 10)
    while not (plan := step(core, 10)).preempted:
        pass
    assert [name for name, _ in plan.preempted] == ["b"]
    assert plan.admitted == ()
    drain(core, 100)
    assert notes.requests["b"].preemptions >= 1


def test_vllm_v1_waits_for_room_for_the_whole_prompt_and_the_watermark_where_it_is_told_to() -> None:
    for options, gets in (
        ({}, 12),
        ({"whole_prompt": True}, 0),
        ({"watermark": 0.3}, 0),
        ({"watermark": 0.2}, 12),
    ):
        core, _ = engine(VllmV1(**options), blocks=10, block_size=4, token_budget=32, prefix_cache=False)
        add(core, request("first", 20, output=8), request("second", 24, output=8))  # 5 and 6 of 10 blocks
        assert dict(work(step(core))).get("second", 0) == gets, options


def test_vllm_v1_counts_what_the_cache_supplies_as_room_for_a_prompt() -> None:
    core, _ = engine(VllmV1(whole_prompt=True), blocks=10, block_size=4, token_budget=64)
    shared = list(range(24))
    add(core, request("first", shared, output=8), request("second", [*shared, *range(50, 58)], output=2))
    assert names(step(core)) == ["first", "second"]  # 6 blocks, and 2 of its own


def test_vllm_v1_by_priority_preempts_the_least_important_of_the_running() -> None:
    core, _ = engine(VllmV1(order="priority"), blocks=6, block_size=4, prefix_cache=False)
    add(
        core,
        request("humble", 8, output=9, priority=5),
        request("middle", 8, output=9, priority=3),
        request("high", 8, output=9, priority=1),
    )
    step(core)
    assert [name for name, _ in step(core, 10).preempted] == ["humble"]


def test_sarathi_gives_every_decode_its_token_in_every_step_and_prompts_only_what_is_left_of_the_chunk() -> (
    None
):
    rng = random.Random(1)
    core, _ = engine(Sarathi(chunk=16), token_budget=512, max_seqs=8, blocks=4000)
    now, decoding, mixed = 0, set(), 0
    for i in range(30):
        core.add(request(f"r{i}", rng.randint(1, 90), output=rng.randint(2, 20)), 0)
    while core.has_work:
        plan = core.plan(now)
        served = {item.request: item.tokens for item in plan.work}
        assert decoding <= set(served), "a decode was left out"
        assert all(served[name] == 1 for name in decoding)
        assert plan.tokens <= 16
        mixed += bool(decoding) and plan.tokens > len(decoding)
        samples = {item.request for item in plan.work if item.samples}
        ended = {
            e.request for e in core.commit(plan, StepResult((0,) * len(samples)), now + 10) if e.finished
        }
        core.observe(StepTiming(0, 0, 10, 0, 0))
        decoding = (decoding | samples) - ended
        now += 10
    assert mixed > 20


def test_sarathi_takes_in_no_more_than_a_chunk_can_serve_in_every_step() -> None:
    core, _ = engine(Sarathi(chunk=2))
    add(core, *(request(name, 1, output=9) for name in "abcd"))
    assert [names(step(core, n)) for n in range(4)] == [["a", "b"]] * 4


def test_sarathi_takes_no_prompt_in_that_would_lack_blocks_beside_an_unfinished_one() -> None:
    core, _ = engine(Sarathi(), blocks=6, block_size=4, chunk=4, prefix_cache=False)
    add(core, request("first", 20), request("second", 8))
    assert work(step(core)) == [("first", 4)]  # 5 blocks free, of which it has still to take 4


def test_sarathi_preempts_unfinished_prompts_before_decodes() -> None:
    core, _ = engine(Sarathi(chunk=8), blocks=6, block_size=4, prefix_cache=False)
    add(core, request("decode", 7, output=12))
    step(core)
    core.add(request("prompt", 14, output=2), 10)
    lost = next(plan.preempted for plan in drain(core, 10) if plan.preempted)
    assert [name for name, _ in lost] == ["prompt"]


def test_the_first_in_order_keeps_its_blocks_whomever_the_preemption_policy_would_take() -> None:
    class First(PreemptionPolicy):
        def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
            return candidates[0]

    for policy in (Fcfs(), VllmV1(), Priority()):
        core, notes = engine(policy, blocks=7, block_size=4, preemption=First(), prefix_cache=False)
        add(core, *(request(name, 6, output=14) for name in "abc"))
        drain(core)
        assert notes.requests["a"].preemptions == 0
        assert notes.requests["b"].preemptions + notes.requests["c"].preemptions > 0


@pytest.mark.parametrize("size", [1, 4, 16])
def test_mc_sf_never_preempts_when_lengths_are_known(size: int) -> None:
    rng = random.Random(size)
    for _ in range(15):
        core, notes = engine(
            MemoryConstrainedShortest(by_arrival=rng.random() < 0.3),
            blocks=-(-120 // size) + rng.randint(0, 6),
            block_size=size,
            token_budget=rng.choice([20, 200]),
            max_seqs=rng.randint(1, 12),
            chunk=rng.choice([None, 5]),
            prefix_cache=rng.random() < 0.5,
        )
        due, now = [(rng.randint(0, 300), i) for i in range(25)], 0
        due.sort()
        while due or core.has_work:
            while due and due[0][0] <= now:
                at, i = due.pop(0)
                prompt = Prompt((Segment(rng.randint(0, 1), 0, 9), Segment(10 + i, 0, rng.randint(1, 50))))
                core.add(Request(id=f"{i}", prompt=prompt, arrival=at, output_len=rng.randint(1, 60)), now)
            plan = core.plan(now)
            assert not plan.preempted
            if plan:
                commit(core, plan, now + 10)
            now += 10
        assert len(notes.requests) == 25


def test_mc_sf_takes_in_no_one_whose_end_would_not_fit_beside_the_others() -> None:
    core, _ = engine(MemoryConstrainedShortest(), blocks=12, block_size=1, prefix_cache=False)
    add(core, request("a", 3, output=4), request("b", 3, output=5), request("c", 1, output=6))
    # a ends with 6 tokens when b has 6: 12. With c there would be 4 more.
    assert names(step(core)) == ["a", "b"]
    assert [tokens(step(core, n)) for n in range(1, 4)] == [[1, 1]] * 3
    assert names(step(core, 9)) == ["b", "c"]


def test_a_low_forecast_leads_mc_sf_to_preempt_not_to_fail() -> None:
    class One(LengthPredictor):
        def predict(self, request: Request, now: int) -> int:
            return 1

    core, notes = engine(
        MemoryConstrainedShortest(), blocks=12, block_size=1, predictor=One(), prefix_cache=False
    )
    add(core, request("a", 3, output=9), request("b", 3, output=9), request("c", 3, output=9))
    drain(core, check=core.check)
    assert sum(record.preemptions for record in notes.requests.values()) > 0
