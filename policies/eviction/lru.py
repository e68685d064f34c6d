"""lru: drop the block that was let go longest ago, a chain's tail before its head.

Origin: vLLM's free-block queue (a request's blocks are appended in reverse when it ends). Wins: everywhere a
little; the default. Loses: one long scan flushes what is popular.
A parent is always let go after its child, so this order never orphans a block. O(1).
"""

from __future__ import annotations

from collections import OrderedDict

from lab.policy import BlockId, BlockView, EvictionPolicy


class Lru(EvictionPolicy):
    """Candidates in the order in which they were let go."""

    leaf_only = False
    by_release = True

    def __init__(self) -> None:
        self._order: OrderedDict[BlockId, None] = OrderedDict()

    def victim(self, now: int) -> BlockId:
        return next(iter(self._order))

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._order[block.id] = None

    def on_pinned(self, block: BlockView, now: int) -> None:
        del self._order[block.id]

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._order.pop(block.id, None)
