"""radix_lru: among blocks that nothing cached continues, drop the one hit or written longest ago.

Rule: a heap of the radix tree's unreferenced leaves by last access; a dropped leaf may make its parent one.
Origin: SGLang's radix cache, at the granularity of blocks instead of tree nodes.
Wins: no block is ever orphaned, whatever the order of release.
Loses: against lru nothing but a heap; both orders agree almost everywhere (lru lets go of tails first).
Cost: O(log n), and the pool keeps count of children.
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy, Request
from policies.keyed_heap import KeyedHeap


class RadixLru(EvictionPolicy):
    """Leaves by last access. All that one request accesses at one time counts as one access."""

    leaf_only = True

    def __init__(self) -> None:
        self._access: dict[BlockId, int] = {}
        self._candidates: KeyedHeap[BlockId] = KeyedHeap()
        self._latest: tuple[int, Request | None] = (-1, None)
        self._count = 0

    def victim(self, now: int) -> BlockId:
        return self._candidates.peek()

    def on_cached(self, block: BlockView, now: int) -> None:
        self.on_hit(block, now)

    def on_hit(self, block: BlockView, now: int) -> None:
        time, user = self._latest
        if now != time or block.user is not user:
            self._latest = (now, block.user)
            self._count += 1
        self._access[block.id] = self._count

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._candidates.push(block.id, (self._access[block.id], -block.depth, block.id))

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)
        self._access.pop(block.id, None)
