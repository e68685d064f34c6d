"""fifo: drop the block that has been cached longest, however often it was hit since.

Origin: textbook. Wins: no work on a hit. Loses: a shared system prompt goes as early as anything else, and
takes the reach of all its continuations with it (blocks behind a missing parent can't be hit).
A block enters the queue when it is first let go, so a chain enters own tail first. O(log n).
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.eviction.common import Queue


class Fifo(EvictionPolicy):
    """Candidates by order of entry; being used again doesn't change a block's place."""

    leaf_only = False

    def __init__(self) -> None:
        self._queue = Queue()

    def victim(self, now: int) -> BlockId:
        return self._queue.first()

    def on_evictable(self, block: BlockView, now: int) -> None:
        if block.id not in self._queue:
            self._queue.enter(block.id)
        self._queue.offer(block.id)

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._queue.hold(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._queue.leave(block.id)
