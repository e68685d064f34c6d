"""Links between nodes: each pair has its own, inside and across, and each serves who comes first."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.links import Link, Network
from tests.policies.fleets import MS
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
