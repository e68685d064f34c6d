"""Links between nodes: each pair has its own, inside and across, each serves who comes first; and what they share."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.links import Link, Network
from sim.moves import Failure
from tests.policies.fleets import MS, SECOND
from tests.sim.test_moves import BYTES, PREFILL, SPLIT, same, serve, whole, workload

INSIDE, ACROSS = Link(1e8, 1000), Link(1e6, 50_000)
NODES = (0, 1, 0, 1)
"""Two replicas that prefill, two that decode: one of each on either node."""
TWO = Network({(0, 0): INSIDE, (1, 1): INSIDE, (0, 1): ACROSS, (1, 0): ACROSS}, NODES)
TURNS = {"routing": {"name": "round_robin"}}


@pytest.mark.parametrize(("nodes", "took"), [((0, 0), 1 * MS + 1000), ((0, 1), 100 * MS + 50_000)])
def test_a_transfer_takes_what_the_link_between_its_ends_takes(nodes: tuple[int, int], took: int) -> None:
    _, records = serve(same(1), ("prefill", "decode"), Network(TWO.links, nodes))
    (move,) = records["r0"].transfers
    assert move.end - move.ready == took


def test_each_pair_of_nodes_is_a_queue_of_its_own() -> None:
    """From node 0 to nodes 0 and 1 in turn: two inside, two across; neither kind waits for the other."""
    roles, nodes = ("prefill",) * 4 + ("decode",) * 2, (0, 0, 0, 0, 0, 1)
    _, records = serve(same(4), roles, Network(TWO.links, nodes), policies=TURNS)
    ends: dict[int, list[int]] = defaultdict(list)
    for record in records.values():
        ends[record.transfers[0].destination].append(record.transfers[0].end - PREFILL)
    assert sorted(ends[4]) == [MS + 1000, 2 * MS + 1000]
    assert sorted(ends[5]) == [100 * MS + 50_000, 200 * MS + 50_000]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 20), st.sampled_from([45, 400]), st.booleans())
def test_one_at_a_time_on_each_link_and_nothing_lost(seed: int, blocks: int, cache: bool) -> None:
    _, records = serve(workload(seed), SPLIT, TWO, blocks=blocks, prefix_cache=cache)
    busy: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for record in records.values():
        whole(record)
        for move in record.transfers:
            assert move.bytes == move.tokens * BYTES
            way = NODES[move.source], NODES[move.destination]
            link = INSIDE if way[0] == way[1] else ACROSS
            if move.tokens:
                assert move.wire_ns == round(move.bytes / link.bytes_s * 1e9) + link.latency_ns
                busy[way].append((move.sent, move.end - link.latency_ns))
    assert len(busy) > 1
    for stretches in busy.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(stretches)):
            assert start >= end


def test_layer_by_layer_goes_over_the_same_links() -> None:
    links = {way: Link(link.bytes_s, link.latency_ns, 4) for way, link in TWO.links.items()}
    for node, left in ((0, MS // 4 + 1000), (1, 100 * MS - PREFILL * 3 // 4 + 50_000)):
        _, records = serve(same(1), ("prefill", "decode"), Network(links, (0, node)))
        (move,) = records["r0"].transfers
        assert move.end - move.ready == pytest.approx(left, abs=4)


# -- a switch that links between nodes share ------------------------------------------------------------------

APART = (0, 1, 2, 3, 4, 5, 6, 7)
FOUR = ("prefill",) * 4 + ("decode",) * 4


def switched(rate: float | None, layers: int = 0, nodes: tuple[int, ...] = APART) -> Network:
    links = {
        (a, b): Link(link.bytes_s, link.latency_ns, layers)
        for a in nodes
        for b in nodes
        for link in [INSIDE if a == b else ACROSS]
    }
    return Network(links, nodes, rate)


@pytest.mark.parametrize("share", [0.5, 1, 2, 2.5, 4, 1e6])
def test_transfers_over_links_of_their_own_follow_each_other_through_the_switch(share: float) -> None:
    """The n-th waits until the switch has carried those before it, then takes as long as the slower of the two."""
    rate = ACROSS.bytes_s * share
    _, records = serve(same(4), FOUR, switched(rate), policies=TURNS)
    through, alone = round(100 * BYTES / rate * 1e9), 100 * MS
    assert sorted(record.transfers[0].end for record in records.values()) == [
        PREFILL + n * through + max(through, alone) + ACROSS.latency_ns for n in range(4)
    ]


def test_inside_a_node_nothing_passes_the_switch() -> None:
    """Through one so slow that nothing gets through it, and beside it."""
    nodes = (0, 1, 0, 1, 0, 1, 0, 1)
    _, records = serve(same(2), FOUR, switched(1.0, nodes=nodes), policies=TURNS)
    for record in records.values():
        (move,) = record.transfers
        assert move.end - move.ready == MS + INSIDE.latency_ns


@pytest.mark.parametrize("layers", [0, 4])
def test_a_switch_that_is_fast_enough_is_as_none(layers: int) -> None:
    told = [
        [record.transfers for record in serve(workload(7), SPLIT, switched(rate, layers, NODES))[0].requests]
        for rate in (None, 1e15)
    ]
    assert told[0] == told[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 20), st.sampled_from([3e5, 1e6, 1.7e6]), st.sampled_from([45, 400]))
def test_a_switch_carries_one_after_another_and_every_byte(seed: int, rate: float, blocks: int) -> None:
    carried: list[int] = []
    _, records = serve(
        workload(seed),
        SPLIT,
        switched(rate, nodes=NODES),
        blocks=blocks,
        ended=lambda simulation: carried.append(simulation._moves.carried),
    )
    across = []
    for record in records.values():
        whole(record)
        for move in record.transfers:
            assert move.bytes == move.tokens * BYTES
            if move.tokens and NODES[move.source] != NODES[move.destination]:
                slower = min(rate, ACROSS.bytes_s)
                assert move.wire_ns == pytest.approx(move.bytes / slower * 1e9 + ACROSS.latency_ns, abs=2)
                across.append((move.sent, move.bytes, move.end))
    assert carried == [sum(move.bytes for record in records.values() for move in record.transfers)]
    across.sort()
    for (start, size, _), (after, _, _) in itertools.pairwise(across):
        assert after >= start + int(size / rate * 1e9)
    busiest = max(size for _, size, _ in across)
    for n, (start, _, _) in enumerate(across):  # never more than it carries, and what was on its way
        sizes = list(itertools.accumulate(size for _, size, _ in across[n:]))
        for total, (_, _, end) in zip(sizes, across[n:], strict=True):
            assert total <= rate * (end - start) / 1e9 + busiest


@pytest.mark.parametrize("lost", [0, 2])
def test_whoever_is_lost_while_it_waits_for_the_switch_leaves_it_to_others(lost: int) -> None:
    """Over a slow switch; what is called off uses it no more, and everybody else arrives."""
    failure = Failure(lost, PREFILL + 50 * MS, 100 * MS)
    for layers in (0, 4):
        network = switched(3e5, layers, NODES)
        _, records = serve(same(12, output=5, apart=30 * MS), SPLIT, network, failures=[failure])
        for record in records.values():
            whole(record)


def test_what_is_called_off_before_the_switch_is_free_lets_go_of_its_link_too() -> None:
    """The second's source is lost while the first is on the switch; who takes its place sends over the same link."""
    roles, nodes = ("prefill", "prefill", "decode"), (0, 1, 2)
    failure = Failure(1, PREFILL + 50 * MS, 10 * MS)
    requests = same(2) + [dataclasses.replace(r, id=f"later {r.id}", arrival=SECOND) for r in same(2)]
    recorder, records = serve(requests, roles, switched(1e6, nodes=nodes), failures=[failure], policies=TURNS)
    for record in records.values():
        whole(record)
    assert [move.source for record in recorder.requests for move in record.transfers].count(3) == 1
    assert records["r1"].transfers[0].source == 0
