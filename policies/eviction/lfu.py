"""lfu: drop the block that was used least often since it was cached; among equals, the one let go first.

Origin: textbook, in-cache counts (a block's count is forgotten with it). Wins: a small cache under one-time
traffic. Loses: what was popular yesterday stays; on chat traces it is behind lru at every larger size. O(log n).
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.keyed_heap import KeyedHeap


class Lfu(EvictionPolicy):
    """Candidates by (uses, order of being let go)."""

    leaf_only = False

    def __init__(self) -> None:
        self._uses: dict[BlockId, int] = {}
        self._candidates: KeyedHeap[BlockId] = KeyedHeap()
        self._count = 0

    def victim(self, now: int) -> BlockId:
        return self._candidates.peek()

    def on_cached(self, block: BlockView, now: int) -> None:
        self._uses[block.id] = 1

    def on_hit(self, block: BlockView, now: int) -> None:
        self._uses[block.id] += 1

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._count += 1
        self._candidates.push(block.id, (self._uses[block.id], self._count))

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)
        self._uses.pop(block.id, None)
