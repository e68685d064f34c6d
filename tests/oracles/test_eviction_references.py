"""Eviction policies against the plainest possible versions of themselves, and Belady's against all choices there are.

The references keep lists and search them, know nothing of pools or pins, and see one access after another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import plugins
from tests.oracles.eviction_traces import made, replay

Stream = list[int]


def lru(stream: Stream, size: int) -> int:
    kept: Stream = []
    hits = 0
    for block in stream:
        if block in kept:
            hits += 1
            kept.remove(block)
        elif len(kept) == size:
            kept.pop(0)
        kept.append(block)
    return hits


def fifo(stream: Stream, size: int) -> int:
    kept: Stream = []
    hits = 0
    for block in stream:
        if block in kept:
            hits += 1
            continue
        if len(kept) == size:
            kept.pop(0)
        kept.append(block)
    return hits


def lfu(stream: Stream, size: int, forget: bool = True) -> int:
    kept: Stream = []  # by last use
    uses: dict[int, int] = {}
    hits = 0
    for block in stream:
        if block in kept:
            hits += 1
            kept.remove(block)
        elif len(kept) == size:
            victim = min(kept, key=lambda b: uses[b])
            kept.remove(victim)
            if forget:
                del uses[victim]
        uses[block] = uses.get(block, 0) + 1
        kept.append(block)
    return hits


def lfu_perfect(stream: Stream, size: int) -> int:
    return lfu(stream, size, forget=False)


def clock(stream: Stream, size: int) -> int:
    kept: list[list[int]] = []  # block, bit
    hits = 0
    for block in stream:
        found = next((entry for entry in kept if entry[0] == block), None)
        if found:
            hits += 1
            found[1] = 1
            continue
        if len(kept) == size:
            while kept[0][1]:
                kept.append([kept.pop(0)[0], 0])
            kept.pop(0)
        kept.append([block, 0])
    return hits


def sieve(stream: Stream, size: int) -> int:
    kept: list[list[int]] = []
    hand = hits = 0
    for block in stream:
        found = next((entry for entry in kept if entry[0] == block), None)
        if found:
            hits += 1
            found[1] = 1
            continue
        if len(kept) == size:
            while kept[hand][1]:
                kept[hand][1] = 0
                hand = (hand + 1) % size
            kept.pop(hand)
            hand %= size - 1 or 1
        kept.append([block, 0])
    return hits


def two_q(stream: Stream, size: int) -> int:
    new: Stream = []
    old: Stream = []
    ghosts: Stream = []
    hits = 0
    for block in stream:
        if block in new:
            hits += 1
        elif block in old:
            hits += 1
            old.remove(block)
            old.append(block)
        else:
            known = block in ghosts
            if known:
                ghosts.remove(block)
            if len(new) + len(old) == size:
                if len(new) > size // 4 or not old:
                    ghosts.append(new.pop(0))
                    ghosts = ghosts[-(size // 2) :] if size // 2 else []
                else:
                    old.pop(0)
            (old if known else new).append(block)
    return hits


def s3fifo(stream: Stream, size: int) -> int:
    small: list[list[int]] = []
    main: list[list[int]] = []
    ghosts: Stream = []
    share, remembered = int(size * 0.1), int(size * 0.9)
    hits = 0

    def drop_small() -> bool:
        while small:
            block, count = small.pop(0)
            if count < 2:
                ghosts.append(block)
                return True
            main.append([block, 0])
        return False

    def drop_main() -> bool:
        while main:
            block, count = main.pop(0)
            if not count:
                return True
            main.append([block, count - 1])
        return False

    for block in stream:
        found = next((entry for entry in small + main if entry[0] == block), None)
        if found:
            hits += 1
            found[1] = min(3, found[1] + 1)
            continue
        known = block in ghosts
        if known:
            ghosts.remove(block)
        if len(small) + len(main) == size:
            first, second = (drop_small, drop_main) if len(small) >= share else (drop_main, drop_small)
            _ = first() or second()
            del ghosts[: max(0, len(ghosts) - remembered)]
        (main if known else small).append([block, 0])
    return hits


REFERENCES: dict[str, Callable[[Stream, int], int]] = {
    "lru": lru,
    "fifo": fifo,
    "lfu": lfu,
    "lfu_perfect": lfu_perfect,
    "clock": clock,
    "sieve": sieve,
    "2q": two_q,
    "s3fifo": s3fifo,
}


def flat_hits(policy: str, stream: Stream, size: int) -> int:
    """Each access a request of one block."""
    requests = [made(f"r{i}", [block], arrival=i, block=1) for i, block in enumerate(stream)]
    return replay(policy, requests, size, block_size=1).flat_hits


@pytest.mark.parametrize("policy", list(REFERENCES))
@settings(max_examples=40, deadline=None)
@given(
    stream=st.lists(st.integers(0, 18) | st.integers(0, 5), min_size=30, max_size=150),
    size=st.integers(1, 16),
)
def test_hits_equal_those_of_the_plain_version(policy: str, stream: Stream, size: int) -> None:
    assert flat_hits(policy, stream, size) == REFERENCES[policy](stream, size)


@pytest.mark.parametrize("policy", list(REFERENCES))
def test_hits_equal_those_of_the_plain_version_while_favourites_change(policy: str) -> None:
    rng = random.Random(7)
    stream = [phase * 10 + int(30 * rng.random() ** 4) for phase in range(12) for _ in range(120)]
    for size in (6, 12, 20):
        assert flat_hits(policy, stream, size) == REFERENCES[policy](stream, size)


def most_hits(stream: Stream, size: int) -> int:
    """The most hits that any sequence of victims leads to: all of them are tried."""

    @cache
    def best(index: int, kept: frozenset[int]) -> int:
        if index == len(stream):
            return 0
        block = stream[index]
        if block in kept:
            return 1 + best(index + 1, kept)
        if len(kept) < size:
            return best(index + 1, kept | {block})
        return max(best(index + 1, (kept - {victim}) | {block}) for victim in kept)

    return best(0, frozenset())


short_streams = st.lists(st.integers(0, 6), min_size=8, max_size=22)


@settings(max_examples=80, deadline=None)
@given(stream=short_streams, size=st.integers(1, 4))
def test_belady_hits_as_often_as_the_best_of_all_choices(stream: Stream, size: int) -> None:
    assert flat_hits("belady", stream, size) == most_hits(stream, size)


@pytest.mark.parametrize("policy", [name for name in plugins.names("eviction") if name != "belady"])
@settings(max_examples=15, deadline=None)
@given(stream=st.lists(st.integers(0, 12), min_size=20, max_size=80), size=st.integers(1, 8))
def test_no_policy_beats_belady(policy: str, stream: Stream, size: int) -> None:
    assert flat_hits(policy, stream, size) <= flat_hits("belady", stream, size)
