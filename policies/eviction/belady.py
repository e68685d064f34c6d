"""belady: drop the block whose next use lies furthest ahead. A bound, not a policy: it reads the future.

Rule: by the position, in order of arrival, of the next request whose prompt holds the block; ties go deepest
first. Blocks in use are the pool's business, as always.
Origin: Belady 1966. Optimal for a stream of single uses; in an engine, where requests overlap, hold blocks and
finish out of order, it is a strong reference and no proof. Runs say that they used it.
Cost: O(log n) amortised, and the keys of all prompts in memory.
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.keyed_heap import KeyedHeap


class Belady(EvictionPolicy):
    """Candidates by next use, from both ends: the furthest is the victim, the nearest is the first to be outdated."""

    leaf_only = False
    needs_future = True

    def __init__(self) -> None:
        self._views: dict[BlockId, BlockView] = {}
        self._furthest: KeyedHeap[BlockId] = KeyedHeap()
        self._nearest: KeyedHeap[BlockId] = KeyedHeap()

    def victim(self, now: int) -> BlockId:
        # A request can pass without touching a block that it holds (its prefix was lost): look again.
        while True:
            (known, _), block = self._nearest.peek_key(), self._views[self._nearest.peek()]
            if self.future.next_use(block.key) == known:
                return self._furthest.peek()
            self.on_evictable(block, now)

    def on_evictable(self, block: BlockView, now: int) -> None:
        use = self.future.next_use(block.key)
        self._views[block.id] = block
        self._furthest.push(block.id, (-use, -block.depth, block.id))
        self._nearest.push(block.id, (use, block.id))

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._furthest.remove(block.id)
        self._nearest.remove(block.id)
        self._views.pop(block.id, None)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self.on_pinned(block, now)
