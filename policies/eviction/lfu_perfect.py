"""lfu_perfect: drop the block used least often in the whole run; among equals, the one let go first.

Rule: lfu whose counts outlive the block. Origin: textbook ("perfect" LFU).
Wins: a cache far smaller than the working set. Loses: yesterday's favourites keep their count for ever.
Cost: O(log n); memory for every distinct block ever cached.
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.keyed_heap import KeyedHeap


class LfuPerfect(EvictionPolicy):
    """Candidates by (uses ever, order of being let go)."""

    leaf_only = False

    def __init__(self) -> None:
        self._uses: dict[bytes, int] = {}
        self._candidates: KeyedHeap[BlockId] = KeyedHeap()
        self._count = 0

    def victim(self, now: int) -> BlockId:
        return self._candidates.peek()

    def on_cached(self, block: BlockView, now: int) -> None:
        self.on_hit(block, now)

    def on_hit(self, block: BlockView, now: int) -> None:
        self._uses[block.key] = self._uses.get(block.key, 0) + 1

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._count += 1
        self._candidates.push(block.id, (self._uses[block.key], self._count))

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)
