"""The fleet and its gateway: what views say and when, who gets requests, and what a policy may not answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.fleet import Fleet, FleetSpec
from lab.control.gateway import Gateway
from lab.control.observer import FleetEvent, Observer, RequestRecord
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.errors import PolicyError
from lab.policy import (
    AdmissionPolicy,
    Ended,
    FleetView,
    ReplicaView,
    RoutingPolicy,
    ScalingPolicy,
    Verdict,
)
from policies.admission.always import Always
from policies.eviction.lru import Lru
from policies.routing.round_robin import RoundRobin
from policies.routing.single import Single
from policies.scaling.fixed import Fixed
from policies.scheduling.fcfs import Fcfs
from tests.control.harness import drain, request, step

MS = 1_000_000


class Told(Observer):
    def __init__(self) -> None:
        self.events: list[FleetEvent] = []
        self.requests: list[RequestRecord] = []

    def on_fleet(self, event: FleetEvent) -> None:
        self.events.append(event)

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    @property
    def short(self) -> list[tuple[int, int, str]]:
        return [(event.at, event.replica, event.event) for event in self.events]


class Wants(ScalingPolicy):
    """As many as it was last told to."""

    def __init__(self, replicas: Any = 1) -> None:
        self.replicas = replicas
        self.seen: list[FleetView] = []

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        self.seen.append(fleet)
        return (self.replicas, "told to") if isinstance(self.replicas, int) else self.replicas


def a_fleet(scaling: ScalingPolicy | None = None, **spec: Any) -> tuple[Fleet, Told]:
    told = Told()

    def make(index: int, slot: int) -> EngineCore:
        return EngineCore(
            Fcfs(), Lru(), capacity=Capacity(20, 4), limits=Limits(64, 4), observer=told, replica=index
        )

    chosen = FleetSpec(**{"most": spec.get("replicas", 1)} | spec)
    return Fleet(make, scaling or Fixed(), chosen, rng=random.Random(3), observer=told), told


def shared(name: str, own: int = 4) -> Request:
    """16 tokens that all have in common, and some of its own."""
    return Request(id=name, prompt=Prompt((Segment(1, 0, 16), Segment(hash_of(name), 0, own))), output_len=2)


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "big")


# -- views ---------------------------------------------------------------------------------------------------


def test_current_views_say_what_is_there_now() -> None:
    fleet, _ = a_fleet(replicas=2)
    fleet.cores[1].add(request("a", 10, 5), 7)
    idle, busy = fleet.views(9)
    assert (idle.index, idle.requests, idle.tokens_to_compute, idle.as_of) == (0, 0, 0, 9)
    assert (busy.index, busy.waiting, busy.running, busy.max_seqs) == (1, 1, 0, 4)
    assert (busy.tokens_to_compute, busy.tokens_expected, busy.context_tokens) == (10, 5, 0)
    step(fleet.cores[1], 9, 10)
    busy = fleet.views(19)[1]
    assert (busy.waiting, busy.running, busy.as_of) == (0, 1, 19)
    assert (busy.tokens_to_compute, busy.tokens_expected, busy.context_tokens) == (1, 4, 10)
    assert (busy.blocks_free, busy.blocks_total) == (17, 20)
    assert busy.estimate(10, 0, 10) == pytest.approx(10, abs=2)


def test_stale_views_are_taken_anew_only_when_older_than_the_refresh() -> None:
    fleet, _ = a_fleet(replicas=2, refresh=100)
    assert [view.as_of for view in fleet.views(50)] == [50, 50]
    fleet.cores[0].add(request("a", 10), 60)
    old = fleet.views(149)[0]
    assert (old.as_of, old.waiting, old.tokens_to_compute) == (50, 0, 0)
    new = fleet.views(150)[0]
    assert (new.as_of, new.waiting, new.tokens_to_compute) == (150, 1, 10)


def test_the_cache_of_a_stale_view_is_the_cache_of_then() -> None:
    fleet, _ = a_fleet(refresh=100)
    core = fleet.core
    before = fleet.views(0)[0]
    core.add(shared("a"), 0)
    drain(core, 0)
    assert core.cached(shared("b")) == 16
    assert before.cached(shared("b")) == 0
    assert fleet.views(99)[0].cached(shared("b")) == 0
    after = fleet.views(100)[0]
    assert after.cached(shared("b")) == 16
    # Something else takes every block: the cache forgets, the view of before doesn't.
    core.add(request("big", 79, 1), 110)
    drain(core, 110)
    assert core.cached(shared("b")) == 0
    assert after.cached(shared("b")) == 16
    assert fleet.views(300)[0].cached(shared("b")) == 0


def test_looking_into_the_cache_changes_nothing() -> None:
    fleet, _ = a_fleet()
    core = fleet.core
    core.add(shared("a"), 0)
    drain(core, 0)
    free, held = core.pool.available, core.pool.held
    for _ in range(3):
        assert fleet.views(50)[0].cached(shared("b")) == 16
    assert (core.pool.available, core.pool.held) == (free, held)
    core.check()


def test_noise_blurs_counts_around_the_truth_and_repeats_with_its_seed() -> None:
    def waiting(noise: float) -> list[int]:
        fleet, _ = a_fleet(noise=noise)
        for i in range(400):
            fleet.core.add(request(f"r{i}", 1, 1), 0)
        return [fleet.views(now)[0].waiting for now in range(300)]

    assert set(waiting(0.0)) == {400}
    blurred = waiting(0.3)
    assert blurred == waiting(0.3)
    below = sum(count < 400 for count in blurred)
    assert 110 < below < 190  # the median is the truth
    within = sum(400 * 0.74 < count < 400 * 1.35 for count in blurred) / 300
    assert within == pytest.approx(0.68, abs=0.08)  # one standard deviation


def test_blurred_free_blocks_never_exceed_the_pool() -> None:
    fleet, _ = a_fleet(noise=2.0)
    free = [fleet.views(now)[0].blocks_free for now in range(100)]
    assert max(free) == 20
    assert len(set(free)) > 5


# -- coming and going ------------------------------------------------------------------------------------------


def test_a_new_replica_is_ready_after_its_cold_start_and_seen_at_once() -> None:
    scaling = Wants(2)
    fleet, told = a_fleet(scaling, replicas=1, most=3, cold_start=50, refresh=1000)
    assert fleet.look(10) == [(1, 60)]
    assert [view.index for view in fleet.views(59)] == [0]
    assert fleet.ready(1) is None
    assert fleet.look(20) == []  # it counts what is starting
    assert scaling.seen[-1].starting == 1
    core = fleet.started(1, 60)
    assert core is not None
    assert core.replica == 1
    assert [view.index for view in fleet.views(60)] == [0, 1]  # however stale the rest
    assert told.short == [(0, 0, "ready"), (10, 1, "start"), (60, 1, "ready")]


def test_the_target_is_cut_to_the_bounds() -> None:
    scaling = Wants(99)
    fleet, _ = a_fleet(scaling, replicas=2, most=4)
    assert [index for index, _ in fleet.look(1)] == [2, 3]
    scaling.replicas = -5
    fleet.look(2)
    assert len(fleet.views(2)) == 2
    assert fleet.started(2, 3) is None  # called off


def test_the_emptiest_drains_gets_nothing_and_goes_when_empty() -> None:
    scaling = Wants(2)
    fleet, told = a_fleet(scaling, replicas=1, most=2)
    fleet.look(0)
    other = fleet.started(1, 0)
    assert other is not None
    for i in range(3):
        fleet.cores[0].add(request(f"a{i}", 4), 0)
    other.add(request("b", 4), 0)
    scaling.replicas = 1
    fleet.look(1)
    assert fleet.draining(1)
    assert fleet.ready(1) is None
    assert [view.index for view in fleet.views(1)] == [0]
    assert other in fleet.cores  # it still works
    drain(other, 1)
    fleet.left(1, 99)
    assert fleet.cores == [fleet.core]
    fleet.look(100)
    assert scaling.seen[-1].draining == 0
    assert told.short[-2:] == [(1, 1, "drain"), (99, 1, "gone")]


def test_a_draining_replica_is_recalled_first_and_a_start_called_off_first() -> None:
    scaling = Wants(3)
    fleet, told = a_fleet(scaling, replicas=1, most=4, cold_start=10)
    fleet.look(0)
    fleet.started(1, 10)
    fleet.started(2, 10)
    scaling.replicas = 1
    fleet.look(20)
    scaling.replicas = 4
    assert fleet.look(30) == [(3, 40)]  # two recalled, one started
    scaling.replicas = 3
    fleet.look(35)
    assert fleet.started(3, 40) is None
    assert told.short[5:] == [
        (20, 2, "drain"), (20, 1, "drain"), (30, 2, "recall"), (30, 1, "recall"), (30, 3, "start"), (35, 3, "gone"),
    ]  # fmt: skip
    scaling.replicas = 4
    assert fleet.look(50) == [(4, 60)]  # an index is never used again


def test_a_look_tells_what_came_and_ended_since_the_last() -> None:
    scaling = Wants(1)
    fleet, _ = a_fleet(scaling, most=2)
    for met in (True, True, False):
        fleet.arrived()
        fleet.ended(met)
    fleet.arrived()
    fleet.look(1)
    fleet.look(2)
    counts = [(seen.arrived, seen.finished, seen.met) for seen in scaling.seen]
    assert counts == [(4, 3, 2), (0, 0, 0)]


def test_everything_that_is_up_goes_with_the_run() -> None:
    scaling = Wants(3)
    fleet, told = a_fleet(scaling, replicas=2, most=3, cold_start=10)
    fleet.look(5)
    fleet.close(9)
    assert told.short[-3:] == [(9, 0, "gone"), (9, 1, "gone"), (9, 2, "gone")]


# -- the gateway -------------------------------------------------------------------------------------------------


class Listens(AdmissionPolicy):
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ended: list[tuple[str, Ended]] = []

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        self.asked.append(request.id)
        return Verdict(not request.id.startswith("no"), "by its name")

    def on_finish(self, request: Request, ended: Ended, now: int) -> None:
        self.ended.append((request.id, ended))


def test_every_request_that_admission_let_in_is_told_once_when_it_ends() -> None:
    fleet, told = a_fleet(replicas=2)
    admission = Listens()
    gateway = Gateway(admission, RoundRobin(), fleet, told)
    for core in fleet.cores:
        core.on_ended = gateway.ended
    for name, size in (("a", 8), ("no", 8), ("giant", 999), ("b", 8), ("c", 8)):
        gateway.submit(request(name, size, 3), 0)
    fleet.cores[0].abort("b", 5)
    for core in fleet.cores:
        drain(core, 5)
    assert admission.asked == ["a", "no", "giant", "b", "c"]
    assert dict(admission.ended) == {
        "giant": Ended("rejected", 1, None, 0, 0),  # let in, and then it could never fit
        "b": Ended("aborted", 0, None, 5, 0),
        "a": Ended("finished", 0, 15, 35, 3),
        "c": Ended("finished", 1, 15, 35, 3),
    }
    assert len(admission.ended) == 4
    assert [record.request.id for record in told.requests if record.outcome == "rejected"] == ["no", "giant"]


def test_without_replicas_to_spare_a_draining_one_gets_nothing() -> None:
    scaling = Wants(2)
    fleet, told = a_fleet(scaling, replicas=1, most=2)
    fleet.look(0)
    fleet.started(1, 0)
    gateway = Gateway(Always(), RoundRobin(), fleet, told)
    homes = [gateway.submit(request(f"r{i}", 4), 0).replica for i in range(4)]
    scaling.replicas = 1
    fleet.look(1)
    homes += [gateway.submit(request(f"s{i}", 4), 2).replica for i in range(3)]
    assert homes == [0, 1, 0, 1, 0, 0, 0]


class Answers(RoutingPolicy, AdmissionPolicy):
    """Whatever it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Any:
        return self.answer

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Any:
        return self.answer

    def on_finish(self, request: Request, ended: Ended, now: int) -> None:
        raise KeyError("who?")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((7, "far away"), "routing policy 'Answers' sent request 'a' to replica 7; expected one of: 0, 1"),
        (1, "routing policy 'Answers' answered 1 for request 'a'; expected (replica index, reason)"),
        (("0", "text"), "routing policy 'Answers' answered ('0', 'text') for request 'a'; expected (replica"),
        (None, "routing policy 'Answers' answered None for request 'a'; expected (replica index, reason)"),
    ],
)
def test_a_router_that_answers_nonsense_is_named(answer: Any, said: str) -> None:
    fleet, told = a_fleet(replicas=2)
    with pytest.raises(PolicyError) as caught:
        Gateway(Always(), Answers(answer), fleet, told).submit(request("a", 4), 0)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_admission_that_answers_nonsense_is_named() -> None:
    fleet, told = a_fleet()
    with pytest.raises(PolicyError) as caught:
        Gateway(Answers(True), Single(), fleet, told).submit(request("a", 4), 0)
    assert (
        str(caught.value)
        == "admission policy 'Answers' answered True for request 'a'; expected a Verdict(admit, reason)"
    )


def test_feedback_that_raises_names_the_policy_and_its_line() -> None:
    fleet, told = a_fleet()
    gateway = Gateway(Always(), Answers((0, "there")), fleet, told)
    fleet.core.on_ended = gateway.ended
    gateway.submit(request("a", 4, 1), 0)
    with pytest.raises(
        PolicyError, match=r"routing policy 'Answers'.*on_finish, request 'a'.*test_fleet\.py"
    ):
        drain(fleet.core, 0)


@pytest.mark.parametrize("answer", [None, (2,), ("3", "text"), (2.5, "half a replica"), "two"])
def test_scaling_that_answers_nonsense_is_named(answer: Any) -> None:
    fleet, _ = a_fleet(Wants(answer), most=4)
    with pytest.raises(PolicyError) as caught:
        fleet.look(1)
    assert str(caught.value) == (
        f"scaling policy 'Wants': target() returned {answer!r}; expected (replicas, reason)"
    )


def test_scaling_that_raises_is_named_with_its_line() -> None:
    class Fails(ScalingPolicy):
        def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
            raise ZeroDivisionError("no replicas")

    fleet, _ = a_fleet(Fails(), most=2)
    with pytest.raises(
        PolicyError, match=r"scaling policy 'Fails'.*no replicas.*at 0\.005 s.*test_fleet\.py"
    ):
        fleet.look(5 * MS)


@pytest.mark.parametrize("interval", [0, -1, 0.5, None])
def test_an_interval_at_which_time_would_stand_still_is_refused(interval: Any) -> None:
    scaling = Wants()
    scaling.interval = interval
    with pytest.raises(PolicyError, match=r"scaling policy 'Wants': interval is .*; expected nanoseconds"):
        a_fleet(scaling)
