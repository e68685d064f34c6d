"""Groups of a topology that are scaled apart: each by a policy of its own, and nothing lost when a replica goes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import compose, validation
from lab.assembly import EngineSpec, assemble
from lab.config import Config
from lab.console import Console
from lab.control.executor import Capacity
from lab.control.fleet import FleetSpec
from lab.control.observer import FleetEvent
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.errors import ConfigError
from lab.observe.recorder import Recorder
from lab.policy import FleetView, ScalingPolicy
from lab.topology import Scaled
from sim.backend import open_backend
from sim.driver import Simulation
from sim.executor import SimExecutor
from sim.links import Link
from sim.moves import Failure
from tests.policies.fleets import MS, SECOND, Cost
from tests.sim.test_moves import BYTES, whole

QUICK = {"name": "concurrency", "per_replica": 4.0, "down_s": 0.3, "interval_s": 0.1}
BOTH = (Scaled("prefill", 0, 1, 3), Scaled("decode", 1, 1, 4))


def serve(
    requests: Sequence[Request],
    groups: tuple[Scaled, ...] = BOTH,
    scaling: dict[str, Any] | None = None,
    link: Link | None = None,
    blocks: int = 400,
    failures: Sequence[Failure] = (),
) -> tuple[Recorder, dict[int, int]]:
    """What was recorded, and by replica its place in the topology."""
    most = 2 + sum(group.most - group.least for group in groups)
    spec = EngineSpec(
        {"policy": {"name": "fcfs"}, "routing": {"name": "least_tokens"}, "scaling": scaling or QUICK},
        Limits(256, 16, None),
        True,
        0,
        FleetSpec(2, most, 50 * MS, roles=("prefill", "decode"), groups=groups),
    )
    capacity = Capacity(blocks, 16, block_bytes=16 * BYTES)
    recorder = Recorder()
    control = assemble(spec, capacity, recorder, requests, aggregate=True)
    executor = SimExecutor(Cost(), capacity)
    simulation = Simulation(control, executor, requests, link=link or Link(1e8), failures=failures)
    simulation.run()
    for core in control.fleet.cores:
        core.check()
        assert core.pool.held == 0
        assert not core.has_work
    control.fleet.close(simulation.now)
    return recorder, control.fleet.slots


def bursts(seed: int, count: int = 40) -> list[Request]:
    rng, now, found = random.Random(seed), 0.0, []
    for i in range(count):
        now += rng.expovariate(80.0) + (rng.random() < 0.05) * 2.0
        pieces = (Segment(rng.randrange(3), 0, 40), Segment(100 + i, 0, rng.randint(1, 300)))
        length = rng.choice([1, 2, 20, 120])
        found.append(
            Request(id=f"r{i}", prompt=Prompt(pieces), arrival=round(now * SECOND), output_len=length)
        )
    return found


def counts(events: Sequence[FleetEvent], slots: dict[int, int], place: int) -> list[int]:
    """How many of one group were ready or starting after each event."""
    up, found = 0, []
    for event in events:
        if slots[event.replica] != place or event.reason == "end of run":
            continue
        came = event.event in ("start", "recall") or event.reason == "initial"
        went = event.event == "drain" or (event.event == "gone" and event.reason != "drained")
        up += came - went
        found.append(up)
    return found


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 1 << 20), st.sampled_from([1e6, 1e8]), st.sampled_from([0, 4]), st.sampled_from([45, 400])
)
def test_each_group_stays_within_its_bounds_and_every_request_ends_once(
    seed: int, rate: float, layers: int, blocks: int
) -> None:
    requests = bursts(seed)
    straggler = Prompt((Segment(0, 0, 40),))
    late = requests[-1].arrival + 30 * SECOND
    requests.append(Request(id="last", prompt=straggler, arrival=late, output_len=200))
    recorder, slots = serve(requests, link=Link(rate, 70_000, layers), blocks=blocks)
    assert len(recorder.requests) == len(requests)
    for record in recorder.requests:
        whole(record)
        for move in record.transfers:
            assert (slots[move.source], slots[move.destination]) == (0, 1)
    for place, most in ((0, 3), (1, 4)):
        up = counts(recorder.fleet, slots, place)
        assert min(up) >= 1
        assert max(up) <= most
        assert up[-1] == 1  # the last request came to an idle fleet, and stayed for many decisions


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 1 << 20),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1500), st.integers(0, 400)), min_size=1, max_size=3),
)
def test_replicas_that_come_go_and_fail_lose_nothing(seed: int, planned: list[tuple[int, int, int]]) -> None:
    requests = bursts(seed)
    failures = [Failure(replica, at * MS, back * MS) for replica, at, back in planned]
    recorder, _ = serve(requests, failures=failures)
    assert len(recorder.requests) == len(requests)
    for record in recorder.requests:
        assert record.outcome == "finished" or record.reason == "no replica is up"


@pytest.mark.parametrize("grows", [0, 1])
def test_a_group_that_may_not_grow_does_not(grows: int) -> None:
    recorder, slots = serve(bursts(3), (BOTH[grows],))
    later = [event.replica for event in recorder.fleet if event.event == "start"]
    assert later
    assert {slots[replica] for replica in later} == {grows}


class Seen(ScalingPolicy):
    """As many as at the start; what each group's own policy saw is kept."""

    interval = 100 * MS
    looks: list[tuple[int, FleetView]] = []  # noqa: RUF012

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        self.looks.append((id(self), fleet))
        return (fleet.most if fleet.group == "decode" else fleet.least), "as told"


def test_a_groups_policy_sees_its_own_replicas_and_its_own_bounds() -> None:
    Seen.looks.clear()
    recorder, slots = serve(bursts(3), scaling={"name": "tests.sim.test_group_scaling:Seen"})
    roles = {"prefill": (1, 3), "decode": (1, 4)}
    for _, seen in Seen.looks:
        assert {view.role for view in seen.replicas} == {seen.group}
        assert (seen.least, seen.most) == roles[seen.group]
    assert len({(who, seen.group) for who, seen in Seen.looks}) == 2
    arrived = {group: sum(s.arrived for _, s in Seen.looks if s.group == group) for group in roles}
    assert arrived["prefill"] == arrived["decode"] == 40
    assert [seen.starting for _, seen in Seen.looks if seen.group == "decode"][:2] == [
        0,
        0,
    ]  # 50 ms later all are up
    assert [len(seen.replicas) for _, seen in Seen.looks if seen.group == "decode"][:2] == [1, 4]
    starts = [event for event in recorder.fleet if event.event == "start"]
    assert {event.reason for event in starts} == {"decode: as told"}
    assert {slots[event.replica] for event in starts} == {1}


LLAMA = ["backend=sim", "cost=physical", "cost.model=llama-3.1-8b", "routing=least_tokens"]


def composed(*words: str) -> Config:
    with compose.composer() as composer:
        cfg = composer.config([*LLAMA, *words])
    validation.validate(cfg)
    return cfg


def test_one_group_told_in_either_way_is_the_same_fleet() -> None:
    more = "scaling=concurrency", "scaling.per_replica=2", "scaling.interval_s=0.1", "scaling.down_s=1"
    told = []
    for word in ("fleet.most=5", "topology.groups.replica.most=5"):
        cfg = composed("topology=dp2", "fleet.cold_start_s=0.2", *more, word)
        backend = open_backend(cfg, Console(), None)
        spec = EngineSpec.of(dataclasses.asdict(cfg))
        assert (spec.fleet.replicas, spec.fleet.most) == (2, 5)
        requests, recorder = bursts(1), Recorder()
        control = assemble(spec, backend.capacity, recorder, requests, capacities=backend.capacities)
        backend.drive(control, requests, lambda core, now: None).run()
        told.append([(step.replica, step.end, step.plan.digest) for step in recorder.steps])
        assert any(event.event == "start" for event in recorder.fleet)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["topology=pd_1p1d", "fleet.most=4", "scaling=slo"], "has groups: prefill, decode; expected topology.groups"),
        (["topology=dp2", "fleet.most=4", "topology.groups.replica.most=4", "scaling=slo"], "GROUP.most of those"),
        (["topology=dp2", "topology.groups.replica.most=1"], "replica.most is 1; expected 2, its count, to"),
        (["topology=pd_1p1d", "scaling=slo"], "nothing to scale"),
        (["topology=pd_1p1d", "topology.groups.decode.most=2", "routing=single"], "all replicas but one idle"),
        (["topology=pd_1p1d", "topology.groups.decode.most=65000"], "at most"),
    ],
)  # fmt: skip
def test_bounds_that_make_no_sense_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*words)
    assert said in str(caught.value)
