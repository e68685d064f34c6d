"""Routing: every request is served once, by whom the rule says; caches, stale views and changing fleets."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import plugins
from lab.control.executor import Capacity
from lab.control.fleet import FleetSpec
from lab.control.request import Prompt, Request, Segment
from lab.policy import ReplicaView, RoutingPolicy
from policies.routing.common import beginning
from tests.policies.fleets import SECOND, Outcome, poisson, request, simulate, turns, view

NAMES = [
    "round_robin", "random", "least_requests", "least_tokens", "power_of_two", "session_affinity",
    "consistent_hash", "prefix_cost", "lmetric",
]  # fmt: skip


def routing(name: str, seed: int = 0, **parameters: object) -> RoutingPolicy:
    policy: RoutingPolicy = plugins.create("routing", name, parameters)
    policy.rng = random.Random(seed)
    return policy


def goes_to(policy: RoutingPolicy, asked: Request, replicas: list[ReplicaView]) -> int:
    return policy.route(asked, replicas, 0)[0]


loads = st.lists(st.integers(0, 6), min_size=1, max_size=7)
views = st.lists(
    st.tuples(*(st.integers(0, 5) for _ in range(5)), st.integers(0, 64)), min_size=1, max_size=6
).map(
    lambda rows: [
        view(
            3 * i + 1, running=row[0], waiting=row[1], tokens_to_compute=row[2], tokens_expected=row[3],
            context_tokens=row[4], cached=lambda asked, hit=row[5]: hit,
        )
        for i, row in enumerate(rows)
    ]
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_request_is_served_once_and_two_runs_are_alike(name: str) -> None:
    work = sorted(turns(12, 6) + poisson(100, 60), key=lambda asked: asked.arrival)
    first, second = (simulate(work, fleet=FleetSpec(4, 4), routing=name) for _ in range(2))
    assert [record.outcome for record in first.recorder.requests] == ["finished"] * len(work)
    assert first.digests == second.digests
    assert first.recorder.requests == second.recorder.requests
    served = Counter(record.decision.replica for record in first.recorder.requests)
    assert sorted(served) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["random", "power_of_two"])
def test_what_is_random_depends_on_the_seed(name: str) -> None:
    work = poisson(60, 30)
    assert (
        len({str(simulate(work, fleet=FleetSpec(4, 4), routing=name, seed=s).digests) for s in (0, 1)}) == 2
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_replica_is_as_good_as_single(name: str) -> None:
    work = poisson(40, 30)
    alone = simulate(work, fleet=FleetSpec(), routing="single")
    assert simulate(work, fleet=FleetSpec(), routing=name).digests == alone.digests


def test_single_takes_the_first_whatever_its_index() -> None:
    assert goes_to(routing("single"), request(), [view(4), view(7)]) == 4


def test_round_robin_gives_each_its_turn_while_replicas_come_and_go() -> None:
    policy = routing("round_robin")
    seen = [
        goes_to(policy, request(), [view(i) for i in indices])
        for indices in ([0, 1, 2], [0, 1, 2], [0, 2], [0, 2, 3], [0, 2, 3], [2, 3], [3, 2])
    ]
    assert seen == [0, 1, 2, 3, 0, 2, 3]


def test_random_is_uniform() -> None:
    policy = routing("random")
    counts = Counter(goes_to(policy, request(), [view(i) for i in (2, 3, 5, 7)]) for _ in range(4000))
    chi_squared = sum((counts[i] - 1000) ** 2 / 1000 for i in (2, 3, 5, 7))
    assert chi_squared < 16.3  # 0.1 % of chi-squared with 3 degrees of freedom


@settings(max_examples=60)
@given(views)
def test_the_least_by_each_rule_and_the_lowest_index_among_equals(replicas: list[ReplicaView]) -> None:
    asked = request(prompt=64)
    rules = {
        "least_requests": lambda r: r.running + r.waiting,
        "least_tokens": lambda r: r.tokens_to_compute + r.tokens_expected,
        "lmetric": lambda r: (r.tokens_to_compute + 64 - r.cached(asked)) * (r.running + r.waiting + 1),
        "prefix_cost": lambda r: 1.0 * (r.tokens_to_compute + 64 - r.cached(asked)) + r.context_tokens,
    }
    for name, rule in rules.items():
        expected = sorted((rule(r), r.index) for r in replicas)[0][1]
        assert goes_to(routing(name), asked, random.Random(1).sample(replicas, len(replicas))) == expected, (
            name
        )


def test_among_idle_replicas_the_one_that_has_the_prefix() -> None:
    replicas = [view(0), view(1, cached=lambda asked: 48), view(2, cached=lambda asked: 32)]
    assert {name: goes_to(routing(name), request(), replicas) for name in ("lmetric", "prefix_cost")} == {
        "lmetric": 1,
        "prefix_cost": 1,
    }
    # 16 tokens with two before, or 64 alone: 48 < 64; with three before, 64 is not more.
    for before, chosen in ((2, 1), (3, 0)):
        warm = view(1, running=before, cached=lambda asked: 48)
        assert goes_to(routing("lmetric"), request(), [view(0), warm]) == chosen


@given(loads, st.integers(1, 8), st.integers(0, 99))
def test_of_d_drawn_the_one_with_fewest_requests(counts: list[int], d: int, seed: int) -> None:
    replicas = [view(i, waiting=count) for i, count in enumerate(counts)]
    chosen = goes_to(routing("power_of_two", seed, d=d), request(), replicas)
    worse = sum((count, i) > (counts[chosen], chosen) for i, count in enumerate(counts))
    assert worse >= min(d, len(counts)) - 1  # the others drawn are all worse
    if d >= len(counts):
        assert chosen == goes_to(routing("least_requests"), request(), replicas)


def test_two_choices_are_two_different_replicas_each_pair_as_likely() -> None:
    policy = routing("power_of_two")
    replicas = [view(i, waiting=i) for i in range(4)]
    counts = Counter(goes_to(policy, request(), replicas) for _ in range(6000))
    assert counts[3] == 0
    for index, pairs in ((0, 3), (1, 2), (2, 1)):
        assert counts[index] == pytest.approx(1000 * pairs, rel=0.12)


@pytest.mark.parametrize("name", ["session_affinity", "consistent_hash"])
def test_a_session_stays_and_few_move_when_a_replica_comes_or_goes(name: str) -> None:
    sessions = [request(session=f"s{i}", stream=i) for i in range(2000)]

    def homes(indices: list[int]) -> list[int]:
        policy = routing(name)
        # Plenty of load, so that the cap of bounded loads never binds.
        return [goes_to(policy, asked, [view(i, waiting=99) for i in indices]) for asked in sessions]

    before, more, fewer = homes([0, 1, 2, 3]), homes([0, 1, 2, 3, 4]), homes([0, 1, 3])
    assert before == homes([0, 1, 2, 3])
    moved = [(a, b) for a, b in zip(before, more, strict=True) if a != b]
    assert {b for _, b in moved} == {4}
    assert 0.1 < len(moved) / 2000 < 0.3  # one fifth
    assert all(a == b for a, b in zip(before, fewer, strict=True) if a != 2)
    assert {b for a, b in zip(before, fewer, strict=True) if a == 2} == {0, 1, 3}
    assert min(Counter(before).values()) > 2000 / 4 * 0.6


def test_every_turn_of_a_session_is_served_by_the_same_replica() -> None:
    run = simulate(turns(20, 5), fleet=FleetSpec(4, 4), routing="session_affinity")
    homes: dict[str, set[int]] = {}
    for record in run.recorder.requests:
        homes.setdefault(record.request.session, set()).add(record.decision.replica)
    assert all(len(replicas) == 1 for replicas in homes.values())


def test_without_a_session_the_fewest_requests() -> None:
    replicas = [view(0, waiting=3), view(1, waiting=1), view(2, waiting=2)]
    assert goes_to(routing("session_affinity"), request(), replicas) == 1


@given(loads, st.integers(0, 40), st.sampled_from([1.0, 1.25, 2.0]))
def test_no_replica_is_sent_more_than_the_cap(counts: list[int], key: int, c: float) -> None:
    replicas = [view(2 * i, waiting=count) for i, count in enumerate(counts)]
    chosen = goes_to(routing("consistent_hash", c=c), request(session=f"s{key}"), replicas)
    assert counts[chosen // 2] + 1 <= math.ceil(c * (sum(counts) + 1) / len(counts))


def test_bounded_load_spills_one_hot_session_over_and_affinity_does_not() -> None:
    work = [request(f"r{i:03}", session="hot", stream=i, arrival=i * 1000) for i in range(80)]
    runs = {
        name: simulate(work, fleet=FleetSpec(4, 4), routing=name)
        for name in ("session_affinity", "consistent_hash")
    }
    most = {
        name: max(Counter(record.decision.replica for record in run.recorder.requests).values())
        for name, run in runs.items()
    }
    assert most == {"session_affinity": 80, "consistent_hash": math.ceil(1.25 * 80 / 4)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 30), st.booleans())
def test_a_beginning_is_the_same_however_the_prompt_is_cut(
    cuts: list[int], tokens: int, literal: bool
) -> None:
    def prompt(sizes: list[int]) -> Prompt:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        if literal:
            return Prompt(tuple(tuple(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)))
        return Prompt(tuple(Segment(5, a, n) for a, n in zip(starts, sizes, strict=True)))

    whole, pieces = (Request(id="r", prompt=prompt(sizes)) for sizes in ([sum(cuts)], cuts))
    assert beginning(whole, tokens) == beginning(pieces, tokens)
    other = Request(id="r", prompt=Prompt((Segment(6, 0, sum(cuts)),)))
    assert beginning(whole, tokens) != beginning(other, tokens)
    longer = Request(id="r", prompt=Prompt((*pieces.prompt.pieces, Segment(9, 0, 7))))
    assert (beginning(whole, tokens) == beginning(longer, tokens)) == (sum(cuts) >= tokens)


def test_equal_prompt_beginnings_meet_without_sessions() -> None:
    policy = routing("consistent_hash", prefix=32)
    replicas = [view(i, waiting=99) for i in range(8)]
    heads = [[Segment(s, 0, 40), Segment(1000 + i, 0, 20)] for s in range(30) for i in range(3)]
    homes = [goes_to(policy, Request(id="r", prompt=Prompt(tuple(head))), replicas) for head in heads]
    assert all(len(set(homes[i : i + 3])) == 1 for i in range(0, 90, 3))
    assert len(set(homes)) == 8


def test_softmax_draws_by_its_formula_and_a_low_temperature_is_the_least() -> None:
    replicas = [view(i, context_tokens=100 * i) for i in range(3)]
    policy = routing("prefix_cost", temperature=0.5)
    counts = Counter(goes_to(policy, request(), replicas) for _ in range(6000))
    weights = [math.exp(-x / 0.5) for x in (0, 0.5, 1)]
    for i in range(3):
        assert counts[i] / 6000 == pytest.approx(weights[i] / sum(weights), abs=0.03)
    assert {goes_to(routing("prefix_cost", s, temperature=0.01), request(), replicas) for s in range(50)} == {
        0
    }


def cached_run(name: str, fleet: FleetSpec | None = None) -> Outcome:
    # All sessions' prefixes together are about twice what one replica's cache holds, half of what four hold.
    return simulate(turns(40, 6), fleet=fleet or FleetSpec(4, 4), capacity=Capacity(800, 16), routing=name)


@pytest.mark.parametrize("name", ["prefix_cost", "lmetric", "session_affinity", "consistent_hash"])
def test_routing_by_prefix_hits_more_than_taking_turns(name: str) -> None:
    blind, aware = cached_run("round_robin"), cached_run(name)
    assert aware.hit_ratio > blind.hit_ratio + 0.15
    assert aware.mean("ttft") < blind.mean("ttft")


def test_caches_of_long_ago_help_less_than_current_ones() -> None:
    current, stale = (cached_run("lmetric", FleetSpec(4, 4, refresh=ns)) for ns in (0, 4 * SECOND))
    assert stale.hit_ratio < current.hit_ratio


def test_under_stale_views_everybody_runs_to_the_same_replica() -> None:
    work = poisson(700, 80, prompt=64, output=4)

    def run(name: str, refresh: int) -> float:
        return simulate(work, fleet=FleetSpec(6, 6, refresh=refresh), routing=name).mean()

    assert run("least_requests", 0) < run("power_of_two", 0) < run("random", 0)
    herd, two, blind = (run(name, 2 * SECOND) for name in ("least_requests", "power_of_two", "random"))
    assert herd > 2 * two
    assert herd > 2 * blind


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("power_of_two", {"d": 0}, "d is 0; expected at least 1"),
        ("consistent_hash", {"c": 0.9}, "c is 0.9; expected a finite number, at least 1"),
        ("consistent_hash", {"points": 0}, "points is 0; expected at least 1"),
        ("consistent_hash", {"prefix": 0}, "prefix is 0; expected at least 1"),
        ("prefix_cost", {"weight": -1.0}, "weight is -1.0; expected a finite number, at least 0"),
        (
            "prefix_cost",
            {"temperature": math.nan},
            "temperature is nan; expected a finite number, at least 0",
        ),
    ],
)
def test_bad_values_are_refused(name: str, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(Exception, match=said):
        plugins.create("routing", name, parameters)
