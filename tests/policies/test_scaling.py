"""Scaling: the rules one look at a time, and whole runs: bursts, cold starts, draining, and what it all costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import plugins
from lab.control.fleet import FleetSpec
from lab.control.observer import FleetEvent
from lab.control.request import Request
from lab.observe.metrics import summarise
from lab.policy import FleetView, ReplicaView, ScalingPolicy
from tests.policies.fleets import MS, SECOND, Cost, Outcome, poisson, request, simulate, view

COLD = SECOND // 2

QUICK: dict[str, dict[str, Any]] = {
    "queue_threshold": {"up_cooldown_s": 0.2, "down_cooldown_s": 0.5, "interval_s": 0.1},
    "concurrency": {"per_replica": 8.0, "down_s": 0.5, "interval_s": 0.1},
    "slo": {"ttft_ms": 100.0, "window_s": 0.5, "down_s": 0.5, "interval_s": 0.1},
}
"""Parameters for runs of a few seconds."""


def scaling(name: str, **parameters: Any) -> Any:
    return plugins.create("scaling", name, parameters)


def fleet(
    replicas: Sequence[ReplicaView],
    starting: int = 0,
    least: int = 1,
    most: int = 9,
    finished: int = 0,
    met: int = 0,
) -> FleetView:
    return FleetView(replicas, starting, 0, least, most, 0, finished, met)


# -- one look at a time ------------------------------------------------------------------------------------


def test_fixed_wants_what_there_was() -> None:
    assert scaling("fixed").target(fleet([view(0), view(1)], least=2), 0)[0] == 2


def test_long_queues_add_one_and_short_ones_take_one_after_their_cooldowns() -> None:
    policy = scaling("queue_threshold", up=4.0, down=1.0, up_cooldown_s=2.0, down_cooldown_s=5.0)
    full, calm, empty = view(0, running=8, waiting=9), view(0, running=2, waiting=2), view(0, running=2)

    def ask(seen: Sequence[ReplicaView], at: int, starting: int = 0) -> int:
        return int(policy.target(fleet(seen, starting), at * SECOND)[0])

    assert ask([full], 1) == 2
    assert ask([full], 2, starting=1) == 2  # 4.5 waiting a replica, but the cooldown
    assert ask([full], 3, starting=1) == 3
    assert ask([full, full, full], 4) == 3
    assert ask([calm, calm, calm], 20) == 3  # between the thresholds
    assert ask([empty, empty, empty], 21) == 2
    assert ask([empty, empty], 25) == 2
    assert ask([empty, empty], 26) == 1
    assert ask([empty], 60) == 1  # never below the least


def test_no_queue_is_no_reason_to_go_while_the_slots_are_needed() -> None:
    policy = scaling("queue_threshold", down_cooldown_s=0.0)
    busy, half = view(0, running=8, max_seqs=8), view(0, running=4, max_seqs=8)
    assert policy.target(fleet([busy, half]), SECOND)[0] == 2
    assert policy.target(fleet([half, half]), 2 * SECOND)[0] == 1


def test_at_the_bounds_no_cooldown_begins() -> None:
    policy = scaling("queue_threshold", up_cooldown_s=10.0)
    full = view(0, waiting=99)
    assert policy.target(fleet([full], most=1), 1 * SECOND)[0] == 1
    assert policy.target(fleet([full], most=2), 2 * SECOND)[0] == 2


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 3)), max_size=25),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_concurrency_is_the_autoscalers_formula_within_its_windows(
    looks: list[tuple[list[int], int]], up: int, down: int
) -> None:
    policy = scaling("concurrency", per_replica=10.0, tolerance=0.2, up_s=float(up), down_s=float(down))
    asked: list[int] = []
    for at, (counts, starting) in enumerate(looks):
        current, total = len(counts) + starting, sum(counts)
        mean = total / current
        wanted = current if 8 - 1e-9 <= mean <= 12 + 1e-9 else math.ceil(current * mean / 10 - 1e-9)
        asked.append(min(max(wanted, 1), 9))
        low, high = min(asked[-1 - up :]), max(asked[-1 - down :])
        expected = low if current < low else current
        expected = high if expected > high else expected
        seen = fleet([view(i, running=count) for i, count in enumerate(counts)], starting)
        assert policy.target(seen, at * SECOND)[0] == expected


def in_time(prefill: int, decodes: int, context: int) -> int:
    return prefill * MS


def test_missed_objectives_add_one_unless_one_is_starting() -> None:
    policy = scaling("slo", attainment=0.9, window_s=10.0)
    one = [view(0)]
    assert policy.target(fleet(one, finished=10, met=9), 1 * SECOND)[0] == 1
    assert policy.target(fleet(one, finished=10, met=8), 2 * SECOND)[0] == 2  # 17 of 20
    assert policy.target(fleet(one, starting=1, finished=10, met=0), 3 * SECOND)[0] == 2
    # Once it is there, what it could not have prevented is forgotten; what ended while it started isn't.
    assert policy.target(fleet([view(0), view(1)], finished=90, met=90), 4 * SECOND)[0] == 2
    # 10 s later what was missed before is out of the window.
    assert policy.target(fleet([view(0), view(1)], finished=10, met=10), 14 * SECOND)[0] == 2


def test_what_ended_before_a_change_says_nothing_about_the_larger_fleet() -> None:
    policy = scaling("slo", attainment=0.9, window_s=100.0)
    assert policy.target(fleet([view(0)], finished=10, met=0), 1 * SECOND)[0] == 2
    assert policy.target(fleet([view(0), view(1)], finished=10, met=10), 2 * SECOND)[0] == 2


def test_a_backlog_too_long_adds_in_proportion_before_anything_is_missed() -> None:
    policy = scaling("slo", ttft_ms=100.0)
    busy = [
        view(0, tokens_to_compute=250, estimate=in_time),
        view(1, tokens_to_compute=100, estimate=in_time),
    ]
    assert policy.target(fleet(busy), SECOND)[0] == 4  # 350 ms of backlog, 100 ms each
    fine = [view(0, tokens_to_compute=110, estimate=in_time), view(1, tokens_to_compute=90, estimate=in_time)]
    assert policy.target(fleet(fine), 2 * SECOND)[0] == 2


def test_ease_must_last_before_one_goes_and_strain_starts_it_anew() -> None:
    policy = scaling("slo", ttft_ms=100.0, down_s=5.0, window_s=1.0)

    def ask(backlog: int, at: int, replicas: int = 3, most: int = 3) -> int:
        seen = [view(i, tokens_to_compute=backlog // replicas, estimate=in_time) for i in range(replicas)]
        return int(policy.target(fleet(seen, most=most), at * SECOND)[0])

    assert [ask(30, at) for at in (1, 4)] == [3, 3]
    assert ask(120, 4) == 3  # more than half of the limit for two: not easy
    assert [ask(30, at) for at in (6, 8)] == [3, 3]
    assert ask(30, 9) == 2
    assert [ask(0, at, 2) for at in (10, 13)] == [2, 2]
    assert ask(0, 14, 2) == 1
    assert ask(0, 99, 1) == 1


# -- whole runs --------------------------------------------------------------------------------------------


def burst() -> list[Request]:
    """Quiet, a burst that needs several replicas, quiet again."""
    slo = {"ttft_slo": 200 * MS}
    calm, rush = poisson(40, 20, seed=1, **slo), poisson(600, 300, seed=2, start=2.0, **slo)
    after = poisson(120, 20, seed=3, start=rush[-1].arrival / 1e9, **slo)
    return [*calm, *rush, *after]


def run(how: Any, most: int = 5, work: Sequence[Request] | None = None, cold: int = COLD) -> Outcome:
    spec = FleetSpec(1, most, cold_start=cold)
    return simulate(work or burst(), fleet=spec, scaling=how, routing="least_requests")


def lives(outcome: Outcome) -> dict[int, list[FleetEvent]]:
    found: dict[int, list[FleetEvent]] = {}
    for event in outcome.recorder.fleet:
        found.setdefault(event.replica, []).append(event)
    return found


def check_lives(outcome: Outcome, cold: int, least: int, most: int) -> None:
    """What holds of every run: order of events, cold starts, draining, bounds, and the bill."""
    recorder, up, bill = outcome.recorder, 0, 0
    assert [e.at for e in recorder.fleet] == sorted(e.at for e in recorder.fleet)
    for event in recorder.fleet:
        before = up
        up += {"start": 1, "drain": -1, "recall": 1}.get(event.event, 0) + (event.reason == "initial")
        if event.event == "gone" and event.reason not in ("drained", "end of run"):
            up -= 1  # called off
        if event.reason != "end of run" and up != before and event.reason != "initial":
            assert least <= up <= most, event
    for replica, events in lives(outcome).items():
        names = [event.event for event in events]
        assert names[0] == ("ready" if events[0].reason == "initial" else "start")
        assert names[-1] == "gone"
        bill += events[-1].at - events[0].at
        if names[0] == "start" and "ready" in names:
            assert names[1] == "ready"
            assert events[1].at - events[0].at == cold
        served = [r for r in recorder.requests if r.decision.replica == replica and r.outcome == "finished"]
        assert "ready" in names or not served
        ready = events[names.index("ready")].at if "ready" in names else 0
        closed, away = [], 0
        for event in events:
            away = event.at if event.event == "drain" else away
            if event.event in ("recall", "gone") and away:
                closed.append((away, event.at))
                away = 0
        for record in served:
            assert ready <= record.request.arrival
            assert record.end <= events[-1].at
            assert not any(low < record.request.arrival < high for low, high in closed), (
                "sent to a draining one"
            )
        if events[-1].reason == "drained":
            # It goes when its last request's step is over, or at once if it had none.
            drained = events[-2].at
            assert events[-1].at == max([drained, *(s.end for s in recorder.steps if s.replica == replica)])
    fleet_metrics = summarise(recorder, block_size=16)["fleet"]
    assert fleet_metrics["replica_seconds"] == pytest.approx(bill / 1e9)
    assert fleet_metrics["cold_starts"] == sum(e.event == "start" for e in recorder.fleet)


@pytest.mark.parametrize("name", QUICK)
def test_a_burst_brings_replicas_and_quiet_sends_them_away(name: str) -> None:
    how = {"name": name, **QUICK[name]}
    outcome = run(how)
    assert all(record.outcome == "finished" for record in outcome.recorder.requests)
    check_lives(outcome, COLD, 1, 5)
    events = outcome.recorder.fleet
    starts = [event.at for event in events if event.event == "start"]
    drains = [event.at for event in events if event.event == "drain"]
    quiet = burst()[-120].arrival
    assert len(starts) >= 2
    assert any(2 * SECOND < at < quiet for at in starts)
    assert any(at > quiet for at in drains)
    assert sum(event.reason == "end of run" for event in events) < 4
    # More hands, less waiting; and cheaper than as many all the time.
    one, five = (
        run("fixed", most=1),
        simulate(burst(), fleet=FleetSpec(5, 5), scaling="fixed", routing="least_requests"),
    )
    bills = [summarise(o.recorder, block_size=16)["fleet"]["replica_seconds"] for o in (outcome, five)]
    assert outcome.mean("ttft") < one.mean("ttft") / 2
    assert bills[0] < bills[1]
    again = run(how)
    assert again.digests == outcome.digests
    assert again.recorder.fleet == outcome.recorder.fleet
    assert again.recorder.requests == outcome.recorder.requests


class Script(ScalingPolicy):
    """Says what it is told to, one number a look; the last for ever."""

    interval = SECOND // 10

    def __init__(self, wanted: tuple[int, ...] = (1,)) -> None:
        self._wanted = list(wanted)

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        return (self._wanted.pop(0) if len(self._wanted) > 1 else self._wanted[0]), "script"


SCRIPT = f"{__name__}:Script"


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(-1, 7), min_size=1, max_size=20), st.sampled_from([0, SECOND // 10, SECOND // 4]))
def test_whatever_a_policy_wants_nothing_is_lost_and_every_life_is_in_order(
    wanted: list[int], cold: int
) -> None:
    work = poisson(80, 40, prompt=128, output=12)
    outcome = run({"name": SCRIPT, "wanted": tuple(wanted)}, most=4, work=work, cold=cold)
    assert all(record.outcome == "finished" for record in outcome.recorder.requests)
    check_lives(outcome, cold, 1, 4)
    assert (
        run({"name": SCRIPT, "wanted": tuple(wanted)}, most=4, work=work, cold=cold).digests
        == outcome.digests
    )


def test_a_start_is_called_off_when_it_is_no_longer_wanted() -> None:
    outcome = run({"name": SCRIPT, "wanted": (3, 3, 2, 1)}, work=poisson(60, 30), cold=SECOND)
    told = [(e.replica, e.event) for e in outcome.recorder.fleet if e.replica]
    assert told == [(1, "start"), (2, "start"), (2, "gone"), (1, "gone")]
    assert {record.decision.replica for record in outcome.recorder.requests} == {0}


def test_a_replica_that_still_works_is_recalled_before_another_starts() -> None:
    tenths = [0, 0, 0, 1.5, 2.5, 3.5]
    work = [
        request(f"r{i}", output=400, stream=i, arrival=round(at * SECOND / 10)) for i, at in enumerate(tenths)
    ]
    outcome = run({"name": SCRIPT, "wanted": (2, 1, 2)}, work=work, cold=0)
    told = [(e.replica, e.event) for e in outcome.recorder.fleet if e.replica]
    assert told == [(1, "start"), (1, "ready"), (1, "drain"), (1, "recall"), (1, "gone")]
    homes = {record.request.id: record.decision.replica for record in outcome.recorder.requests}
    assert homes == {"r0": 0, "r1": 0, "r2": 0, "r3": 1, "r4": 0, "r5": 1}  # r4 came while it drained
    check_lives(outcome, 0, 1, 5)


def test_an_idle_replica_goes_though_nothing_arrives_any_more() -> None:
    # One long request keeps the run going after the last arrival; the other replica idles until it is drained.
    work = poisson(6, 20, output=4) + poisson(1, 20, output=4, start=1.0)
    work.append(Request(id="long", prompt=work[0].prompt, arrival=work[-1].arrival, output_len=900))
    outcome = run({"name": SCRIPT, "wanted": (2, *[2] * 14, 1)}, work=work, cold=0)
    drained = [event for event in outcome.recorder.fleet if event.reason == "drained"]
    assert len(drained) == 1
    assert drained[0].at == 16 * SECOND // 10


def test_a_replica_that_is_ready_at_the_very_end_of_the_run_does_no_harm() -> None:
    work = [request("only", output=1)]  # ends at 0.2 s, the time of the second look
    outcome = simulate(
        work, fleet=FleetSpec(1, 2), cost=Cost(SECOND // 5, 0), scaling={"name": SCRIPT, "wanted": (1, 2)}
    )
    assert outcome.recorder.requests[0].end == 2 * SECOND // 10
    assert [(e.at, e.replica, e.event) for e in outcome.recorder.fleet][1:3] == [
        (2 * SECOND // 10, 1, "start"),
        (2 * SECOND // 10, 1, "ready"),
    ]


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("queue_threshold", {"down": 5.0}, "down is 5.0; expected at least 0, and below up, 4.0"),
        ("queue_threshold", {"interval_s": 0.0}, "interval_s is 0.0; expected a time in seconds, above 0"),
        (
            "queue_threshold",
            {"up_cooldown_s": -1.0},
            "up_cooldown_s is -1.0; expected a time in seconds, at least 0",
        ),
        ("concurrency", {"per_replica": 0.0}, "per_replica is 0.0; expected a finite number above 0"),
        ("concurrency", {"tolerance": math.inf}, "tolerance is inf; expected a finite number, at least 0"),
        ("concurrency", {"down_s": math.nan}, "down_s is nan; expected a time in seconds, at least 0"),
        ("slo", {"attainment": 0.0}, "attainment is 0.0; expected a share above 0, at most 1"),
        ("slo", {"ttft_ms": 0.0}, "ttft_ms is 0.0; expected a finite number above 0"),
    ],
)
def test_bad_values_are_refused(name: str, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(Exception, match=said):
        plugins.create("scaling", name, parameters)
