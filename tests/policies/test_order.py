"""What sets apart the policies that differ in whom they take first: by size, score, ratio, level, age."""

from __future__ import annotations

import random

from lab.control.request import Request
from lab.policy import LengthPredictor
from policies.scheduling.hrrn import HighestResponseRatio
from policies.scheduling.ltr import LearningToRank
from policies.scheduling.mlfq import Mlfq
from policies.scheduling.priority import Priority
from policies.scheduling.psjf import PreemptiveShortestJob
from policies.scheduling.spf import ShortestPromptFirst
from policies.scheduling.srpt import ShortestRemaining
from tests.control.harness import commit, drain, engine, request, step
from tests.policies.plans import SECOND, add, names


def test_srpt_displaces_by_what_remains_and_psjf_by_the_whole() -> None:
    for policy, expected in ((ShortestRemaining(), []), (PreemptiveShortestJob(), ["old"])):
        core, _ = engine(policy, max_seqs=1)
        core.add(request("old", 8, output=20), 0)
        for n in range(15):
            step(core, n)
        core.add(request("new", 8, output=9), 20)  # old has 5 to go, of 20
        assert [name for name, _ in step(core, 20).preempted] == expected


def test_srpt_counts_uncomputed_prompt_tokens_at_their_cost() -> None:
    for cost, first in ((0.0, "wordy"), (1.0, "brief")):
        core, _ = engine(ShortestRemaining(prefill_cost=cost), max_seqs=1)
        add(core, request("wordy", 50, output=5), request("brief", 5, output=9))
        assert names(step(core)) == [first]


def test_srpt_displaces_only_if_that_saves_more_than_it_loses() -> None:
    for prompt, expected in ((20, ["old"]), (200, [])):
        core, _ = engine(ShortestRemaining(prefill_cost=0.1), max_seqs=1)
        core.add(request("old", prompt, output=20), 0)
        step(core)
        core.add(request("new", 10, output=9), 10)  # 10 in all, against 19, and 2 or 20 lost
        assert [name for name, _ in step(core, 10).preempted] == expected


def test_srpt_who_displaced_another_is_never_displaced_back_by_it() -> None:
    rng = random.Random(7)
    core, notes = engine(ShortestRemaining(), max_seqs=3, blocks=60, block_size=4, token_budget=32, chunk=5)
    now, due = 0, [request(f"r{i}", rng.randint(1, 60), output=rng.randint(1, 30)) for i in range(40)]
    pairs: set[tuple[str, str]] = set()
    while due or core.has_work:
        if due and rng.random() < 0.3:
            core.add(due.pop(), now)
        plan = core.plan(now)
        if plan:
            for lost, _ in plan.preempted:
                for came in plan.admitted:
                    pairs.add((came, lost))
                    assert (lost, came) not in pairs
            commit(core, plan, now + 10)
        now += 10
    assert pairs
    assert len(notes.requests) == 40


def test_shortest_prompt_first_looks_at_uncached_tokens() -> None:
    text = list(range(64))
    core, notes = engine(ShortestPromptFirst(), max_seqs=1)
    core.add(request("warm", [*text, 1], output=1), 0)
    step(core)
    add(core, request("long", [9] * 60, output=1), request("cached", [*text, 2, 3], output=1), now=10)
    add(core, request("short", [8] * 20, output=1), now=10)
    drain(core, 10)
    assert list(notes.requests) == ["warm", "cached", "short", "long"]


def test_shortest_prompt_first_notices_at_the_head_what_was_cached_since() -> None:
    text = list(range(64))
    core, notes = engine(ShortestPromptFirst(), max_seqs=1)
    core.add(request("first", [7] * 30, output=1), 0)
    add(core, request("other", [5] * 40, output=1), request("maker", text[:33], output=1))
    add(core, request("reuser", [*text[:32], *range(100, 132)], output=1))
    drain(core)
    # maker (33) comes before other (40); then reuser needs 32 of its 64 tokens, but stands behind other.
    assert list(notes.requests) == ["first", "maker", "other", "reuser"]


def test_shortest_prompt_first_notices_at_the_head_what_was_evicted_since() -> None:
    text = list(range(64))
    core, notes = engine(ShortestPromptFirst(), max_seqs=1, blocks=10, token_budget=64)
    core.add(request("warm", [*text, 1], output=1), 0)
    step(core), step(core)
    core.add(request("filler", [9] * 150, output=1), 10)
    step(core, 10)
    add(core, request("cached", [*text, 2, 3], output=1), request("short", [8] * 20, output=1), now=20)
    drain(core, 20)  # cached lacks 2 tokens when it comes, and all once the filler has its 10 blocks
    assert list(notes.requests) == ["warm", "filler", "short", "cached"]


def test_hrrn_is_short_first_among_those_that_came_together_but_newcomers_do_not_pass_the_long_one() -> None:
    for policy, expected in (
        (HighestResponseRatio(), ["busy", "short", "short2", "long", "new"]),
        (ShortestPromptFirst(), ["busy", "short", "short2", "new", "long"]),
    ):
        core, notes = engine(policy, max_seqs=1, token_budget=4096, prefix_cache=False)
        core.add(request("busy", 100, output=2), 0)
        step(core)
        add(core, request("long", 1000, output=1), request("short", 50, output=1))
        add(core, request("short2", 50, output=1))
        for n in range(3):
            step(core, n)
        core.add(request("new", 50, output=1), 10)
        drain(core, 10)
        assert list(notes.requests) == expected


def test_hrrn_compares_true_ratios_between_groups() -> None:
    core, _ = engine(HighestResponseRatio(), max_seqs=1, token_budget=4096, prefix_cache=False)
    core.add(request("busy", 300, output=1), 0)
    add(core, request("a", 400, output=1))
    step(core)
    add(core, request("b", 100, output=1), now=10)
    core.add(request("more", 40, output=1), 10)
    assert names(step(core, 10)) == ["a"]  # 1 + 300/400; b and more have just come
    assert names(step(core, 20)) == ["more"]  # 1 + 400/40 against 1 + 400/100


def test_ltr_orders_by_score_and_puts_forward_whoever_waited_too_long() -> None:
    core, notes = engine(LearningToRank(starve=6, period=3), max_seqs=1)
    core.add(request("long", 4, output=50), 0)
    now, first = 0, -1
    for n in range(40):
        core.add(request(f"s{n}", 4, output=2), now)
        plan = step(core, now)
        if names(plan) == ["long"] and first < 0:
            first = n
            served = [names(step(core, now + 10 * (k + 1)))[0] for k in range(3)]
            assert served == ["long", "long", "s0"] or served[:2] == ["long", "long"]
            break
        now += 10
    assert 5 <= first <= 7
    assert "long" not in notes.requests


def test_ltr_never_corrects_a_score() -> None:
    class Fixed(LengthPredictor):
        def predict(self, request: Request, now: int) -> int:
            return {"under": 2, "fair": 5}[request.id]

    core, notes = engine(LearningToRank(starve=0), max_seqs=1, predictor=Fixed())
    add(core, request("fair", 4, output=5), request("under", 4, output=30))
    drain(core)
    assert list(notes.requests) == ["under", "fair"]


def test_mlfq_sinks_by_tokens_generated_and_the_short_newcomer_displaces() -> None:
    core, notes = engine(Mlfq(quantum=4, growth=2.0, prefill_cost=0.0), max_seqs=1)
    core.add(request("long", 4, output=40), 0)
    for n in range(3):
        step(core, n)
    core.add(request("short", 4, output=3), 5)
    assert names(step(core, 5)) == ["long"]  # its fourth token: both are on the top level, and it came first
    assert names(step(core, 6)) == ["short"]
    drain(core, 10)
    assert list(notes.requests) == ["short", "long"]


def test_mlfq_lets_long_prompts_join_further_down() -> None:
    policy = Mlfq(quantum=16, growth=2.0, prefill_cost=0.1)
    core, _ = engine(policy, max_seqs=1)
    for name, prompt, level in (("a", 10, 0), ("b", 160, 0), ("c", 161, 1), ("d", 700, 3)):
        core.add(request(name, prompt), 0)
        assert policy.level[name] == level
    assert policy.worth(3) == 128


def test_mlfq_shares_as_least_attained_service_when_every_level_is_one_token() -> None:
    core, _ = engine(Mlfq(quantum=1, growth=1.0, prefill_cost=0.0, promote_s=0.0), max_seqs=1)
    for name in "abc":
        core.add(request(name, 1, output=30), 0)
    done = dict.fromkeys("abc", 0)
    for n in range(60):
        (name,) = names(step(core, n))
        done[name] += 1
        assert max(done.values()) - min(done.values()) <= 2
    core.add(request("new", 1, output=30), 100)
    served = [names(step(core, 100 + n))[0] for n in range(20)]
    assert served == ["new"] * 20  # it has attained less than all others until it has 20 tokens


def test_mlfq_brings_back_who_waited_too_long() -> None:
    policy = Mlfq(quantum=4, prefill_cost=0.0, promote_s=1.0)
    core, _ = engine(policy, max_seqs=1)
    core.add(request("long", 4, output=400), 0)
    for n in range(20):
        step(core, n)
    assert policy.level["long"] == 2
    now, waited = 20, 0
    for n in range(100):  # newcomers keep the top level busy, 0.1 s a step
        if n % 2 == 0:
            core.add(request(f"s{n}", 4, output=2), now)
        if names(step(core, now)) == ["long"]:
            break
        waited += 1
        now += SECOND // 10
    assert 10 <= waited <= 12


def test_age_wins_over_importance_after_the_difference_over_the_rate() -> None:
    for age_s, first in ((3, "important"), (5, "old")):
        core, _ = engine(Priority(ageing_per_s=2.0), max_seqs=1)
        core.add(request("runs", 4, output=2, priority=0), 0)
        step(core)
        core.add(request("old", 4, priority=8, arrival=0), 0)
        core.add(request("important", 4, priority=0, arrival=age_s * SECOND), age_s * SECOND)
        step(core, age_s * SECOND)
        assert names(step(core, age_s * SECOND + 10)) == [first]


def test_age_alone_displaces_nobody() -> None:
    core, _ = engine(Priority(ageing_per_s=1.0), max_seqs=1)
    core.add(request("runs", 4, output=9, priority=2, arrival=50 * SECOND), 50 * SECOND)
    step(core, 50 * SECOND)
    core.add(request("older", 4, priority=2, arrival=1), 50 * SECOND)
    assert not step(core, 51 * SECOND).preempted
    core.abort("older", 51 * SECOND)
    core.add(request("important", 4, priority=1, arrival=50 * SECOND), 51 * SECOND)
    assert step(core, 52 * SECOND).preempted
