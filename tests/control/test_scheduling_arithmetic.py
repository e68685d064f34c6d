"""How many tokens each request gets, step by step: the arithmetic that vLLM's own scheduler tests hold."""

from __future__ import annotations

import pytest

from lab.errors import ConfigError, PolicyError, RequestRefused
from lab.policy import SchedulingPolicy, Shortage, Step
from policies.scheduling.edf import EarliestDeadlineFirst
from policies.scheduling.fcfs import Fcfs
from policies.scheduling.prefill_first import PrefillFirst
from policies.scheduling.priority import Priority
from policies.scheduling.sjf import ShortestJobFirst
from tests.control.harness import drain, engine, request, step, tokens


def test_concurrent_long_prompts_share_the_budget_in_capped_chunks() -> None:
    core, _ = engine(token_budget=1024, chunk=400)
    for name in "abc":
        core.add(request(name, 800), 0)
    assert [tokens(step(core)) for _ in range(3)] == [[400, 400, 224], [400, 400, 224], [1, 1, 352]]


def test_a_prompt_longer_than_the_budget_is_computed_in_budget_sized_chunks() -> None:
    core, _ = engine(token_budget=100)
    core.add(request("a", 250, output=2), 0)
    assert [tokens(plan) for plan in drain(core)] == [[100], [100], [50], [1]]


def test_running_requests_decode_before_a_new_prompt_gets_the_rest_of_the_budget() -> None:
    core, _ = engine(token_budget=64)
    core.add(request("a", 10), 0)
    step(core)
    core.add(request("b", 200), 10)
    plan = step(core, 10)
    assert [(w.request, w.tokens) for w in plan.work] == [("a", 1), ("b", 63)]


def test_no_more_requests_run_than_there_are_slots() -> None:
    core, _ = engine(max_seqs=2)
    for name in "abc":
        core.add(request(name, 10, output=3), 0)
    assert [len(plan.work) for plan in drain(core)] == [2, 2, 2, 1, 1, 1]


def test_computed_tokens_for_m_outputs_are_prompt_plus_m_minus_one() -> None:
    core, notes = engine()
    core.add(request("a", 37, output=9), 0)
    drain(core)
    assert notes.requests["a"].computed_tokens == 37 + 9 - 1
    assert len(notes.requests["a"].token_times) == 9


def test_a_single_output_token_needs_the_prompt_alone() -> None:
    core, notes = engine()
    core.add(request("a", 20, output=1), 0)
    assert [tokens(plan) for plan in drain(core)] == [[20]]
    assert notes.requests["a"].reason == "length"


def test_shortest_job_is_admitted_first_and_not_interrupted() -> None:
    core, notes = engine(ShortestJobFirst(), max_seqs=1)
    for name, output in (("long", 9), ("short", 2), ("middle", 5)):
        core.add(request(name, 8, output=output), 0)
    drain(core)
    assert list(notes.requests) == ["short", "middle", "long"]


def test_an_important_arrival_takes_the_slot_of_the_least_important() -> None:
    core, notes = engine(Priority(), max_seqs=2)
    core.add(request("low", 8, priority=9), 0)
    core.add(request("middle", 8, priority=5), 0)
    step(core)
    core.add(request("high", 8, priority=1), 10)
    plan = step(core, 10)
    assert [w.request for w in plan.work] == ["high", "middle"]
    assert plan.preempted == (("low", "recompute"),)
    drain(core, 20)
    assert notes.requests["low"].preemptions == 1
    assert list(notes.requests)[-1] == "low"


def test_equal_priorities_never_preempt_each_other_for_a_slot() -> None:
    core, notes = engine(Priority(), max_seqs=1)
    core.add(request("first", 8), 0)
    step(core)
    core.add(request("second", 8), 10)
    drain(core, 10)
    assert list(notes.requests) == ["first", "second"]
    assert all(record.preemptions == 0 for record in notes.requests.values())


def test_priority_preempts_nobody_when_that_would_not_make_enough_room() -> None:
    core, _ = engine(Priority(), blocks=8, token_budget=512)
    core.add(request("kept", 64, output=30, priority=1), 0)
    core.add(request("low", 16, output=2, priority=9), 0)
    step(core)
    core.add(request("high", 100, output=2, priority=5), 10)
    plan = step(core, 10)
    assert plan.preempted == ()
    assert [w.request for w in plan.work] == ["kept", "low"]


def test_earliest_deadline_goes_first_whoever_came_first() -> None:
    core, _ = engine(EarliestDeadlineFirst(), token_budget=32)
    core.add(request("patient", 32, ttft_slo=1000), 0)
    core.add(request("urgent", 32, ttft_slo=50), 0)
    assert [w.request for w in step(core).work] == ["urgent"]


def test_requests_without_objectives_come_after_those_with() -> None:
    core, _ = engine(EarliestDeadlineFirst(), token_budget=32)
    core.add(request("none", 32), 0)
    core.add(request("some", 32, ttft_slo=10**12), 0)
    assert [w.request for w in step(core).work] == ["some"]


def test_prefill_first_runs_prompts_alone_and_stalls_decodes() -> None:
    core, _ = engine(PrefillFirst(), token_budget=100)
    core.add(request("a", 50), 0)
    step(core)
    core.add(request("b", 60), 10)
    core.add(request("c", 60), 10)
    second, third, fourth = step(core, 10), step(core, 20), step(core, 30)
    assert [w.request for w in second.work] == ["b"]  # b and c don't fit one budget, and prompts stay whole
    assert [w.request for w in third.work] == ["c"]
    assert [(w.request, w.tokens) for w in fourth.work] == [("a", 1), ("b", 1), ("c", 1)]


def test_prefill_first_cuts_only_a_prompt_longer_than_the_whole_budget() -> None:
    core, _ = engine(PrefillFirst(), token_budget=100)
    core.add(request("giant", 230, output=2), 0)
    assert [tokens(plan) for plan in drain(core)] == [[100], [100], [30], [1]]


def test_what_can_never_fit_is_refused_at_entry_with_needed_and_available() -> None:
    core, _ = engine(blocks=4, capacity={"max_context": 10_000})
    core.add(request("fits", 60, output=5), 0)  # 64 tokens are stored: the 65th is never fed back
    with pytest.raises(RequestRefused) as refusal:
        core.add(request("big", 60, output=6), 0)
    assert (refusal.value.needed, refusal.value.available) == (5, 4)
    with pytest.raises(RequestRefused, match="longest context"):
        engine(capacity={"max_context": 64})[0].add(request("long", 60, output=5), 0)


def test_a_paused_engine_says_so_and_resumes() -> None:
    seen = []

    class Asks(Fcfs):
        def schedule(self, step: Step) -> None:
            for view in [*step.running.values(), *step.waiting.values()]:
                seen.append(step.run(view).short)

    core, _ = engine(Asks())
    core.add(request("a", 8), 0)
    core.pause("admission")
    assert not core.plan(0)
    core.resume()
    assert tokens(step(core)) == [8]
    core.pause("admission")
    assert tokens(step(core, 10)) == [1]  # what runs goes on: a drain
    core.pause("all")
    assert not core.plan(20)
    assert seen == [Shortage.PAUSED, None, None, Shortage.PAUSED]


@pytest.mark.parametrize("field", ["token_budget", "max_seqs", "chunk"])
def test_limits_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is 0"):
        engine(**{field: 0})


def test_a_grant_says_what_ran_short() -> None:
    shortages = {}

    class Greedy(SchedulingPolicy):
        def schedule(self, step: Step) -> None:
            for name in list(step.waiting):
                shortages[name] = step.run(name, whole=name == "whole").short

    core, _ = engine(Greedy(), blocks=4, token_budget=70, max_seqs=2)
    for name, size in (("a", 32), ("blocks", 40), ("whole", 39), ("b", 16), ("slots", 5)):
        core.add(request(name, size, output=1), 0)
    step(core)
    assert shortages == {
        "a": None,
        "blocks": Shortage.BLOCKS,
        "whole": Shortage.TOKENS,
        "b": None,
        "slots": Shortage.SLOTS,
    }


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda step: [step.run("a"), step.run("a")], "granted 8 tokens in this step already"),
        (lambda step: [step.run("a"), step.preempt("a")], "granted 8 tokens in this step already"),
        (lambda step: step.preempt("a"), "isn't running"),
        (lambda step: step.run("nobody"), "'nobody'"),
        (lambda step: step.run("a", 0), "asked for 0 tokens"),
        (lambda step: [step.run("a"), step.reject("a", "why")], "only a waiting request"),
        (lambda step: 1 // 0, "ZeroDivisionError"),
    ],
)
def test_misuse_raises_with_policy_step_and_line(misuse: object, words: str) -> None:
    class Rogue(SchedulingPolicy):
        def schedule(self, step: Step) -> None:
            misuse(step)  # type: ignore[operator]

    core, _ = engine(Rogue())
    core.add(request("a", 8), 0)
    with pytest.raises(PolicyError) as error:
        core.plan(0)
    assert words in str(error.value)
    assert "policy 'Rogue'" in str(error.value)
    assert "step 0" in str(error.value)
    assert "test_scheduling_arithmetic.py:" in str(error.value)


def test_a_policy_that_preempts_in_circles_is_stopped() -> None:
    class Circles(SchedulingPolicy):
        def schedule(self, step: Step) -> None:
            if not step.running:
                step.run("a", 4)
            else:
                step.preempt("a")

    class Worse(Circles):
        def schedule(self, step: Step) -> None:
            for name in list(step.running):
                step.preempt(name)

    core, _ = engine(Circles())
    core.add(request("a", 8), 0)
    core.plan(0)
    core2, _ = engine(Worse())
    core2.add(request("a", 8), 0)
    assert not core2.plan(0)
    assert "scheduled nothing" in str(core2.stalled())


def test_priority_under_pause_preempts_nobody() -> None:
    core, _ = engine(Priority(), max_seqs=2)
    for name in "ab":
        core.add(request(name, 8, output=9, priority=5), 0)
    step(core)
    core.add(request("high", 8, priority=1), 10)
    core.pause("admission")
    plan = step(core, 10)
    assert plan.preempted == ()
    assert [w.request for w in plan.work] == ["a", "b"]
    core.pause("all")
    assert not core.plan(20)


def test_priority_takes_no_slot_that_would_not_get_the_blocks_too() -> None:
    core, _ = engine(Priority(), blocks=10, max_seqs=2)
    core.add(request("middle", 100, output=9, priority=2), 0)
    core.add(request("low", 16, output=9, priority=9), 0)
    step(core)
    core.add(request("head", 100, output=2, priority=5), 10)
    assert step(core, 10).preempted == ()


def test_blocks_that_a_victim_shares_are_not_counted_as_gain() -> None:
    core, _ = engine(Priority(), blocks=12)
    shared = list(range(64))
    core.add(request("middle", [*shared, *[7] * 20], output=9, priority=2), 0)
    core.add(request("low", [*shared, *[8] * 4], output=9, priority=9), 0)
    step(core)
    core.add(request("head", 120, output=2, priority=5), 10)
    plan = step(core, 10)
    assert plan.preempted == ()
    assert "head" not in [w.request for w in plan.work]


def test_a_prompt_one_token_over_the_budget_is_finished_before_later_prompts() -> None:
    core, _ = engine(PrefillFirst(), token_budget=32)
    core.add(request("first", 33), 0)
    step(core)
    core.add(request("later", 20), 10)
    assert step(core, 10).work[0].request == "first"


def test_rejecting_one_request_a_step_is_progress() -> None:
    class RejectOne(SchedulingPolicy):
        def schedule(self, step: Step) -> None:
            step.reject(next(iter(step.waiting)), "no")

    core, notes = engine(RejectOne())
    for i in range(1500):
        core.add(request(str(i), 8), 0)
    drain(core)
    assert {record.outcome for record in notes.requests.values()} == {"rejected"}


def test_a_policy_may_reject_and_go_on_with_the_rest() -> None:
    class Picky(Fcfs):
        def schedule(self, step: Step) -> None:
            if "b" in step.waiting:
                step.reject("b", "not you")
            super().schedule(step)

    core, notes = engine(Picky())
    for name in "abc":
        core.add(request(name, 8, output=1), 0)
    assert [w.request for w in step(core).work] == ["a", "c"]
    assert notes.requests["b"].reason == "not you"


@pytest.mark.parametrize("words", [{"leave_free": -5}, {"leave_free": 0.5}, {"tokens": 3.5}])
def test_amounts_that_are_no_amounts_are_misuse(words: dict[str, float]) -> None:
    class Rogue(SchedulingPolicy):
        def schedule(self, step: Step) -> None:
            step.run("a", **words)  # type: ignore[arg-type]

    core, _ = engine(Rogue())
    core.add(request("a", 8), 0)
    with pytest.raises(PolicyError, match="expected an integer"):
        core.plan(0)
