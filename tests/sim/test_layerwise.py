"""KV that is sent layer by layer while its prompt is computed: what is left afterwards, and that no byte is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.control.observer import RequestRecord
from lab.control.request import Prompt, Request, Segment
from lab.policy import Ended, ReplicaView, SchedulingPolicy, Step
from policies.routing.least_tokens import LeastTokens
from sim.driver import Simulation
from sim.links import Link
from sim.moves import Failure
from tests.policies.fleets import MS, SECOND
from tests.sim.test_moves import BYTES, PREFILL, SPLIT, same, serve, whole, workload

LAYERS = 8
PAIR = ("prefill", "decode")


def sent(
    requests: Sequence[Request], roles: tuple[str, ...], link: Link, **more: Any
) -> tuple[dict[str, RequestRecord], int]:
    """Records by request, and all bytes that went over the link."""
    carried: list[int] = []

    def ended(simulation: Simulation) -> None:
        carried.append(simulation._moves.carried)

    _, records = serve(requests, roles, link, ended=ended, **more)
    return records, carried[0]


@pytest.mark.parametrize("rate", [1e6, 5e6, 8.33e6, 9e6, 5e7, 1e9])
@pytest.mark.parametrize("latency", [0, 7000])
def test_what_is_left_of_a_lone_prompt_is_its_last_layer_or_what_a_slow_link_has_not_carried(
    rate: float, latency: int
) -> None:
    records, carried = sent(same(1), PAIR, Link(rate, latency, LAYERS))
    whole(records["r0"])
    (move,) = records["r0"].transfers
    total = 100 * BYTES / rate * 1e9
    left = max(total / LAYERS, total - PREFILL * (1 - 1 / LAYERS))
    assert move.ready == move.reserved == PREFILL
    assert move.end - move.ready == pytest.approx(left + latency, abs=LAYERS)
    assert (move.tokens, move.bytes, carried) == (100, 100 * BYTES, 100 * BYTES)
    (plain,) = sent(same(1), PAIR, Link(rate, latency))[0]["r0"].transfers
    assert plain.end - plain.ready == pytest.approx(total + latency, abs=1)


@pytest.mark.parametrize("rate", [1e6, 6e6, 1e7, 1.2e7, 1e9])
def test_chunks_follow_each_other(rate: float) -> None:
    """600 tokens in steps of 256: each layer of each chunk goes when it is done and the one before has gone."""
    records, _ = sent(same(1, 600), PAIR, Link(rate, 0, LAYERS))
    at = link = 0.0
    for tokens in (256, 256, 88):
        took = 2 * MS + tokens * 100_000
        for layer in range(LAYERS):
            done = at + took * (layer + 1) / LAYERS
            link = max(link, done) + tokens * BYTES / LAYERS / rate * 1e9
        at += took
    (move,) = records["r0"].transfers
    assert move.ready == at
    assert move.end == pytest.approx(link, abs=50)


def test_prompts_that_share_a_slow_link_keep_it_busy_from_the_first_layer_on() -> None:
    records, carried = sent(same(6), ("prefill",) * 2 + ("decode",) * 2, Link(1e6, 0, LAYERS), max_seqs=1)
    ends = [record.transfers[0].end for record in records.values()]
    assert carried == 6 * 100 * BYTES
    assert max(ends) == pytest.approx(PREFILL / LAYERS + carried / 1e6 * 1e9, abs=100)


def test_what_either_end_has_cached_is_sent_at_once_or_not_at_all() -> None:
    """One prompt three times: at the same source (96 tokens cached) and destination (as many), then at another."""
    twice = [
        Request(id=f"r{i}", prompt=Prompt((Segment(1, 0, 100),)), output_len=3, arrival=i * SECOND)
        for i in range(2)
    ]
    records, carried = sent(twice, PAIR, Link(1e6, 0, LAYERS))
    assert [records[f"r{i}"].transfers[0].bytes for i in range(2)] == [100 * BYTES, 4 * BYTES]
    assert carried == 104 * BYTES
    records, _ = sent(twice, PAIR, Link(1e6, 0, LAYERS), failures=[Failure(1, 500 * MS, 0)])
    (move,) = records["r1"].transfers
    took = 2 * MS + 4 * 100_000
    assert move.ready == SECOND + took
    assert move.end == pytest.approx(
        SECOND + 100 * MS, abs=2
    )  # 96 tokens are ready at once: 96 ms, and then the rest


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1 << 20),
    st.sampled_from([45, 400]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([3e5, 3e6, 1e9]),
    st.sampled_from([1, 5, 32]),
)
def test_every_byte_on_the_link_is_some_requests(
    seed: int, blocks: int, cache: bool, late: bool, rate: float, layers: int
) -> None:
    requests = workload(seed)
    records, carried = sent(
        requests, SPLIT, Link(rate, 70_000, layers), blocks=blocks, prefix_cache=cache, joins_late=late
    )
    moves = []
    for request in requests:
        record = records[request.id]
        whole(record)
        assert len(record.transfers) == (request.output_len > 1)  # type: ignore[operator]
        for move in record.transfers:
            moves.append(move)
            assert record.token_times[0] == move.ready <= move.reserved <= move.sent <= move.end
            assert move.end <= record.token_times[1]
            assert move.bytes >= move.tokens * BYTES
            if not cache:
                assert move.tokens == len(request.prompt)
                assert (move.bytes == move.tokens * BYTES) or record.preemptions
    assert sum(move.bytes for move in moves) == carried
    first = min(record.request.arrival for record in records.values())
    assert max(move.end for move in moves) - first >= carried / rate * 1e9


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1 << 20),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1500), st.integers(0, 400)), min_size=1, max_size=4),
    st.sampled_from([3e5, 3e6, 1e9]),
    st.sampled_from([30, 400]),
)
def test_whatever_fails_every_request_ends_once(
    seed: int, planned: list[tuple[int, int, int]], rate: float, blocks: int
) -> None:
    requests = workload(seed)
    failures = [Failure(replica, at * MS, back * MS) for replica, at, back in planned]
    records, carried = sent(
        requests, SPLIT, Link(rate, 70_000, 4), failures=failures, cold_start=50 * MS, blocks=blocks
    )
    assert len(records) == len(requests)
    for record in records.values():
        if record.outcome == "finished":
            whole(record)
        else:
            assert record.reason == "no replica is up"
    assert sum(move.bytes for record in records.values() for move in record.transfers) <= carried


def test_a_destination_that_is_lost_midway_has_been_sent_to_in_vain() -> None:
    """The first of two chunks is on its way; the second goes to another replica, with all before it."""
    roles = ("prefill", "decode", "decode")
    lost = 2 * MS + 256 * 100_000  # one of each, when the first chunk is done
    records, carried = sent(same(1, 400), roles, Link(1e9, 0, LAYERS), failures=[Failure(1, lost - MS)])
    (move,) = records["r0"].transfers
    gone = 256 // LAYERS * (LAYERS - 1)
    assert (move.destination, move.tokens) == (2, 400)
    assert move.bytes == carried == (400 + gone) * BYTES


class Fickle(SchedulingPolicy):
    """In its second step, preempts the first request, or rejects it, and goes on with the second."""

    def __init__(self, reject: bool = False) -> None:
        self._steps, self._reject = 0, reject

    def schedule(self, step: Step) -> None:
        self._steps += 1
        names = [*step.running, *step.waiting]
        if self._steps == 2 and "r0" in step.running:
            step.preempt("r0")
            if self._reject:
                step.reject("r0", "changed its mind")
            names.remove("r0")
        for name in names:
            step.run(name)


class Listener(LeastTokens):
    heard: list[tuple[str, int]] = []  # noqa: RUF012

    def on_finish(self, request: Request, ended: Ended, now: int) -> None:
        self.heard.append((ended.outcome, ended.replica))

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        return replicas[-1].index, "the last"


@pytest.mark.parametrize("reject", [False, True])
def test_a_preempted_prompt_wastes_what_was_sent(reject: bool) -> None:
    """After 256 of 400 tokens, but for their last layer, which hasn't left."""
    Listener.heard.clear()
    here = "tests.sim.test_layerwise"
    policies = {
        "policy": {"name": f"{here}:Fickle", "reject": reject},
        "routing": {"name": f"{here}:Listener"},
    }
    records, carried = sent(
        same(2, 400),
        ("prefill", "decode", "decode"),
        Link(1e9, 0, LAYERS),
        policies=policies,
        prefix_cache=False,
    )
    gone = 256 // LAYERS * (LAYERS - 1)
    whole(records["r1"])
    if reject:
        assert (records["r0"].outcome, records["r0"].transfers) == ("rejected", ())
        assert Listener.heard[:2] == [("rejected", 0), ("rejected", 2)]
        assert carried == (400 + gone) * BYTES
    else:
        whole(records["r0"])
        assert [records[name].transfers[0].tokens for name in ("r0", "r1")] == [400, 400]
        assert [records[name].transfers[0].bytes for name in ("r0", "r1")] == [
            (400 + gone) * BYTES,
            400 * BYTES,
        ]
        assert carried == (800 + gone) * BYTES
        assert sorted(Listener.heard) == [("finished", 0)] * 2 + [("finished", 2)] * 2
