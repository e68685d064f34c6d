"""Prefill and decode apart, and replicas that fail: what moves, what waits for it, and that nothing is lost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.assembly import EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.fleet import FleetSpec
from lab.control.observer import RequestRecord
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from sim.driver import Simulation
from sim.executor import SimExecutor
from sim.links import Link, Network
from sim.moves import Failure
from tests.policies.fleets import MS, SECOND, Cost

BYTES = 1000
"""Of KV, a token."""
FAST = Link(1e9)
SPLIT = ("prefill", "prefill", "decode", "decode")


def serve(
    requests: Sequence[Request],
    roles: tuple[str, ...] = SPLIT,
    link: Link | Network | None = FAST,
    *,
    blocks: int = 400,
    failures: Sequence[Failure] = (),
    cost: Any = None,
    replicas: int | None = None,
    ended: Callable[[Simulation], object] | None = None,
    **more: Any,
) -> tuple[Recorder, dict[str, RequestRecord]]:
    count = replicas or len(roles)
    spec = EngineSpec(
        {"policy": {"name": "fcfs"}, "routing": {"name": "least_tokens"}, **more.pop("policies", {})},
        Limits(256, more.pop("max_seqs", 16), None),
        more.pop("prefix_cache", True),
        0,
        FleetSpec(replicas=count, most=count, cold_start=more.pop("cold_start", 0), roles=roles),
        joins_late=more.pop("joins_late", False),
    )
    capacity = Capacity(blocks, 16, block_bytes=more.pop("block_bytes", 16 * BYTES))
    recorder = Recorder()
    control = assemble(spec, capacity, recorder, requests, aggregate=more.pop("aggregate", True))
    executor = SimExecutor(cost or Cost(), capacity)
    simulation = Simulation(control, executor, requests, link=link, failures=failures)
    simulation.run()
    if ended is not None:
        ended(simulation)
    for core in control.fleet.cores:
        core.check()
        assert core.pool.held == 0
        assert not core.has_work
        assert not core.relocation.leaving
    control.fleet.close(simulation.now)
    return recorder, {record.request.id: record for record in recorder.requests}


def workload(seed: int, count: int = 40, rate: float = 40.0) -> list[Request]:
    rng = random.Random(seed)
    now, found = 0.0, []
    for i in range(count):
        now += rng.expovariate(rate)
        pieces = (Segment(rng.randrange(3), 0, 40), Segment(100 + i, 0, rng.randint(1, 300)))
        found.append(
            Request(
                id=f"r{i}",
                prompt=Prompt(pieces),
                arrival=round(now * SECOND),
                output_len=rng.choice([1, 2, 20, 80]),
            )
        )
    return found


def whole(record: RequestRecord) -> None:
    """A finished request has all its tokens, and its life is tiled."""
    assert record.outcome == "finished"
    assert len(record.token_times) == record.request.output_limit
    assert list(record.token_times) == sorted(record.token_times)
    at = record.request.arrival
    for part in record.intervals:
        assert part.start == at
        assert part.end >= part.start
        at = part.end
    assert at == record.end


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1 << 20),
    st.sampled_from([30, 45, 400]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e5, 3e6, 1e9]),
)
def test_nothing_leaks_and_every_byte_is_some_requests(
    seed: int, blocks: int, cache: bool, late: bool, aggregate: bool, rate: float
) -> None:
    requests = workload(seed)
    _recorder, records = serve(
        requests,
        link=Link(rate, 70_000),
        blocks=blocks,
        prefix_cache=cache,
        joins_late=late,
        aggregate=aggregate,
    )
    assert len(records) == len(requests)
    sent = []
    for request in requests:
        record = records[request.id]
        whole(record)
        assert len(record.transfers) == (request.output_len > 1)  # type: ignore[operator]
        for move in record.transfers:
            assert move.source in (0, 1)
            assert move.destination in (2, 3)
            assert record.decision.replica == move.source
            assert move.bytes == move.tokens * BYTES
            assert move.tokens <= len(request.prompt)
            assert cache or move.tokens == len(request.prompt)
            assert record.token_times[0] <= move.ready <= move.reserved <= move.sent <= move.end
            assert move.end <= record.token_times[1]
            assert move.ready == record.token_times[0]
            sent.append(move)
    on_wire = sorted((move.sent, move.end - 70_000) for move in sent if move.tokens)
    for (_, end), (start, _) in itertools.pairwise(on_wire):
        assert start >= end, "the link carries one transfer at a time"
    for destination in (2, 3):  # nobody overtakes another on the way to room, nor to the link
        there = [(m.ready, m.reserved, m.sent) for m in sent if m.destination == destination and m.tokens]
        assert [reserved for _, reserved, _ in sorted(there)] == sorted(reserved for _, reserved, _ in there)
    on_link = [(move.reserved, move.sent) for move in sent if move.tokens]
    assert [at for _, at in sorted(on_link)] == sorted(at for _, at in on_link)
    for move in sent:
        if move.tokens:
            assert move.wire_ns == round(move.bytes / rate * 1e9) + 70_000


def test_both_ways_of_keeping_decodes_take_the_same_decisions() -> None:
    requests = workload(5, 80)
    (one, _), (two, _) = (serve(requests, blocks=60, aggregate=way) for way in (True, False))
    assert [(s.replica, s.start, s.plan.digest) for s in one.steps] == [
        (s.replica, s.start, s.plan.digest) for s in two.steps
    ]
    assert [r.transfers for r in one.requests] == [r.transfers for r in two.requests]


def test_one_request_by_hand() -> None:
    request = Request(id="a", prompt=Prompt((Segment(1, 0, 100),)), output_len=3)
    _, records = serve([request], ("prefill", "decode"), Link(1e8, 5000))
    record = records["a"]
    first = 2 * MS + 100 * 100_000
    wire = 100 * BYTES * 10 + 5000
    step = 2 * MS + 100_000
    assert record.token_times == (first, first + wire + step, first + wire + 2 * step)
    (move,) = record.transfers
    assert (move.queue_ns, move.wire_ns) == (0, wire)
    assert [(part.phase, part.cause) for part in record.intervals] == [
        ("queue", "arrival"), ("prefill", ""), ("queue", "transfer"), ("decode", ""),
    ]  # fmt: skip


def same(count: int, tokens: int = 100, output: int = 3, apart: int = 0) -> list[Request]:
    """Requests of one size with nothing in common."""
    return [
        Request(id=f"r{i}", prompt=Prompt((Segment(i, 0, tokens),)), output_len=output, arrival=i * apart)
        for i in range(count)
    ]


PREFILL = 2 * MS + 100 * 100_000
"""Of 100 tokens, alone."""


def test_the_links_latency_keeps_nobody_waiting() -> None:
    late, wire = 50 * MS, 1 * MS
    _, records = serve(same(2), SPLIT, Link(1e8, late))
    first, second = sorted((records[f"r{i}"].transfers[0] for i in range(2)), key=lambda move: move.sent)
    assert (first.sent, first.end) == (PREFILL, PREFILL + wire + late)
    assert (second.sent, second.end) == (PREFILL + wire, PREFILL + 2 * wire + late)


def test_part_of_a_byte_is_sent_whole() -> None:
    _, records = serve(same(1), ("prefill", "decode"), Link(1e8), block_bytes=9)
    assert records["r0"].transfers[0].bytes == 57  # 100 tokens of 9/16 bytes


def test_what_the_destination_has_cached_is_not_sent_again() -> None:
    same = [
        Request(id=f"r{i}", prompt=Prompt((Segment(1, 0, 100),)), output_len=3, arrival=i * SECOND)
        for i in range(2)
    ]
    _, records = serve(same, ("prefill", "decode"))
    assert [records[f"r{i}"].transfers[0].tokens for i in range(2)] == [100, 100 - 6 * 16]


def test_the_link_queues_as_a_server_of_fixed_times_does() -> None:
    """M/D/1: Poisson in, since prefills of equal length that never wait only shift the arrivals."""
    rng, load, now = random.Random(4), 0.7, 0.0
    size, service = 64, 64 * BYTES / 6.4e7  # 1 ms
    requests = []
    for i in range(6000):
        now += rng.expovariate(load / service)
        requests.append(
            Request(
                id=f"r{i}", prompt=Prompt((Segment(i, 0, size),)), arrival=round(now * SECOND), output_len=2
            )
        )
    roles = ("prefill",) * 24 + ("decode",) * 2
    recorder, _ = serve(
        requests, roles, Link(6.4e7), blocks=40_000, max_seqs=512, prefix_cache=False, cost=Cost(20_000, 10)
    )
    waits = [record.transfers[0].queue_ns for record in recorder.requests]
    mean = sum(waits) / len(waits) / 1e9
    assert mean == pytest.approx(load * service / (2 * (1 - load)), rel=0.12)


def test_a_destination_without_room_keeps_the_kv_at_its_source() -> None:
    requests = [Request(id=f"r{i}", prompt=Prompt((Segment(i, 0, 160),)), output_len=40) for i in range(6)]
    _, records = serve(requests, ("prefill", "decode"), blocks=26, prefix_cache=False)
    waited = [records[f"r{i}"].transfers[0] for i in range(6)]
    assert max(move.reserved - move.ready for move in waited) > 0
    for record in records.values():
        whole(record)


# -- failures ------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1 << 20),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1500), st.integers(0, 400)), min_size=1, max_size=4),
    st.sampled_from([(), SPLIT]),
    st.sampled_from([3e5, 1e9]),
    st.sampled_from([30, 400]),
    st.booleans(),
)
def test_whatever_fails_and_comes_back_every_request_ends_once(
    seed: int,
    planned: list[tuple[int, int, int]],
    roles: tuple[str, ...],
    rate: float,
    blocks: int,
    aggregate: bool,
) -> None:
    requests = workload(seed)
    failures = [Failure(replica, at * MS, back * MS) for replica, at, back in planned]
    recorder, records = serve(
        requests,
        roles,
        Link(rate),
        failures=failures,
        replicas=4,
        cold_start=50 * MS,
        blocks=blocks,
        aggregate=aggregate,
    )
    assert len(recorder.requests) == len(records) == len(requests)
    for record in records.values():
        if record.outcome == "finished":
            whole(record)
        else:
            assert record.reason == "no replica is up"
    gone = [event for event in recorder.fleet if event.reason == "failed"]
    assert len(gone) == len({replica for replica, _, _ in planned if any(e.replica == replica for e in gone)})


def test_a_failed_replicas_requests_are_computed_again_and_keep_their_tokens() -> None:
    requests = [Request(id=f"r{i}", prompt=Prompt((Segment(i, 0, 50),)), output_len=100) for i in range(2)]
    recorder, records = serve(requests, (), None, replicas=2, failures=[Failure(0, 100 * MS)])
    moved = next(r for r in records.values() if r.decision.replica == 0)
    whole(moved)
    before = [time for time in moved.token_times if time <= 100 * MS]
    assert 10 < len(before) < 90
    (failed,) = [part for part in moved.intervals if part.cause == "failed"]
    assert failed.start == 100 * MS
    assert moved.computed_tokens > 50 + 99 + 50
    assert {step.replica for step in recorder.steps if step.start > 100 * MS} == {1}


def test_an_idle_replica_takes_up_what_was_lost_at_once() -> None:
    recorder, records = serve(same(1, output=100), (), None, replicas=2, failures=[Failure(0, 100 * MS)])
    whole(records["r0"])
    assert min(step.start for step in recorder.steps if step.replica == 1) == 100 * MS


def test_when_no_replica_is_left_the_rest_is_refused() -> None:
    requests = workload(3, 20, rate=20.0)
    for roles, lost in (((), 0), (("prefill", "decode"), 1)):
        count = len(roles) or 1
        _, records = serve(requests, roles, replicas=count, failures=[Failure(lost, 300 * MS)])
        outcomes = {record.outcome for record in records.values()}
        assert outcomes == {"finished", "rejected"}


def test_while_it_is_replaced_requests_wait() -> None:
    requests = [Request(id="a", prompt=Prompt((Segment(1, 0, 50),)), output_len=100)]
    failure = Failure(0, 100 * MS, 200 * MS)
    _, records = serve(requests, (), None, replicas=1, failures=[failure], cold_start=500 * MS)
    whole(records["a"])
    gaps = [b - a for a, b in zip(records["a"].token_times, records["a"].token_times[1:], strict=False)]
    assert max(gaps) > 700 * MS


def test_what_is_called_off_uses_neither_the_link_nor_room() -> None:
    """Three for one link of 100 ms each; the second's source is lost while it waits for the link."""
    wire = 100 * MS
    requests = same(3, output=20, apart=MS)
    _, records = serve(
        requests, ("prefill",) * 3 + ("decode",), Link(1e6), failures=[Failure(1, 50 * MS)], blocks=400
    )
    a, b, c = (records[f"r{i}"] for i in range(3))
    assert [record.decision.replica for record in (a, b, c)] == [0, 1, 2]
    assert (a.transfers[0].sent, a.transfers[0].end) == (PREFILL, PREFILL + wire)
    assert (c.transfers[0].sent, c.transfers[0].end) == (PREFILL + wire, PREFILL + 2 * wire)
    assert [move.source for move in b.transfers] != [1]
    assert b.transfers[0].sent >= c.transfers[0].end
    whole(b)


def test_room_that_was_kept_for_a_lost_request_goes_to_the_next_at_once() -> None:
    requests = same(2, output=20, apart=MS)
    lost = 50 * MS
    _, records = serve(
        requests, ("prefill", "prefill", "decode"), Link(1e6), failures=[Failure(0, lost)], blocks=8
    )
    a, b = records["r0"], records["r1"]
    assert (a.decision.replica, b.decision.replica) == (0, 1)
    assert b.transfers[0].ready < lost
    assert b.transfers[0].reserved == lost
    whole(a)
    whole(b)


def test_a_replica_that_comes_back_does_what_the_lost_one_did() -> None:
    recorder, records = serve(
        same(4, output=40, apart=30 * MS), ("prefill", "decode"), failures=[Failure(1, 60 * MS, 100 * MS)]
    )
    for record in records.values():
        whole(record)
    assert any(move.destination == 2 for record in records.values() for move in record.transfers)
    assert {step.replica for step in recorder.steps if step.start > 160 * MS and step.decode_tokens} == {2}


def test_who_waits_for_a_decoding_replica_and_loses_its_own_is_computed_again() -> None:
    """The only one that decodes is away while a prompt ends; so is, then, the one that has its KV."""
    failures = [Failure(1, 5 * MS, 200 * MS), Failure(0, 100 * MS, 200 * MS)]
    _, records = serve(same(1), ("prefill", "decode"), failures=failures)
    record = records["r0"]
    whole(record)
    assert record.token_times[0] == PREFILL
    (move,) = record.transfers
    assert (move.source, move.destination) == (3, 2)
    assert record.computed_tokens == 100 + 101 + 1
    causes = [part.cause for part in record.intervals if part.phase == "queue"]
    assert causes == ["arrival", "transfer", "failed", "transfer"]


@pytest.mark.parametrize("lost", [0, 1])
def test_who_waits_for_room_is_computed_again_only_where_its_kv_is_lost(lost: int) -> None:
    """A long one fills the replica that decodes; then that is lost, or the one that keeps the next one's KV."""
    long, short = same(1, tokens=200, output=60), same(2, output=20, apart=20 * MS)[1:]
    failure = Failure(lost, 80 * MS, 100 * MS)
    _, records = serve([*long, *short], ("prefill", "decode"), blocks=18, failures=[failure])
    for record in records.values():
        whole(record)
    waited = records["r1"]
    assert waited.token_times[0] < 80 * MS < waited.transfers[0].reserved
    causes = [part.cause for part in waited.intervals if part.phase == "queue"]
    assert ("failed" in causes) == (lost == 0)
    assert waited.transfers[0].source == (2 if lost == 0 else 0)
    assert waited.computed_tokens == (100 + 101 + 19 - 1 if lost == 0 else 100 + 19)
