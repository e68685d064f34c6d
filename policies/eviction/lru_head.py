"""lru_head: drop the block whose request used it longest ago, a chain's head before its tail.

Rule: least recently used by request; within one request's blocks the least deep goes first.
Origin: what a plain LRU cache does when a prompt's blocks are touched from the first to the last.
Wins: nowhere; it is here for contrast with lru.
Loses: dropping a head cuts off all that follows it, which stays in memory and can't be hit.
Cost: O(log n).
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy, Request
from policies.keyed_heap import KeyedHeap


class LruHead(EvictionPolicy):
    """Candidates by (when their request let go, depth)."""

    leaf_only = False

    def __init__(self) -> None:
        self._candidates: KeyedHeap[BlockId] = KeyedHeap()
        self._latest: tuple[int, Request | None] = (-1, None)
        self._turn = 0

    def victim(self, now: int) -> BlockId:
        return self._candidates.peek()

    def on_evictable(self, block: BlockView, now: int) -> None:
        time, user = self._latest
        if now != time or block.user is not user:
            self._latest = (now, block.user)
            self._turn += 1
        self._candidates.push(block.id, (self._turn, block.depth, block.id))

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)
