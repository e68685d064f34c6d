"""s3fifo: a small queue in front of a main one; what isn't hit in the small one never enters the main one.

Rule: new blocks enter small (`small` of the cache), remembered ones main. While small fills its share, its
oldest goes: to main after `promote` hits, else out, its key remembered (`ghost`). Else main's oldest goes: to
the back if it was hit, one of its hits (3 at most) the poorer, else out.
Origin: Yang et al., SOSP 2023. Wins: one-hit wonders leave quickly. Loses: chats return late. Cost: O(log n).
"""

from __future__ import annotations

from collections import OrderedDict

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.eviction.common import Queue


class S3Fifo(EvictionPolicy):
    """`small`, `ghost`: shares of the cache's blocks. `victim`, asked again, gives the same answer."""

    leaf_only = False

    def __init__(self, small: float = 0.1, ghost: float = 0.9, promote: int = 2) -> None:
        for name, value, good in (("small", small, small <= 1), ("ghost", ghost, True)):
            if not (good and value >= 0):
                raise ValueError(f"{name} is {value}; expected a share of the cache")
        if promote < 1:
            raise ValueError(f"promote is {promote}; expected at least 1 hit")
        self._shares, self._promote = (small, ghost), promote
        self._queues = (Queue(), Queue())  # small, main
        self._giving: int | None = None
        self._hits: dict[BlockId, int] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def on_open(self, blocks: int, block_size: int) -> None:
        self._most_small, self._most_ghosts = (int(blocks * share) for share in self._shares)

    def victim(self, now: int) -> BlockId:
        if self._giving is None:  # the queue that begins to give goes on, promotions or not, until a drop
            self._giving = int(len(self._queues[0]) < self._most_small)
        while True:
            if not self._queues[self._giving].offers:
                self._giving = 1 - self._giving
            block = self._queues[self._giving].first()
            if self._hits[block] < (1 if self._giving else self._promote):
                return block
            self._hits[block] = self._hits[block] - 1 if self._giving else 0
            self._queues[self._giving].leave(block)
            self._queues[1].enter(block)
            self._queues[1].offer(block)

    def on_cached(self, block: BlockView, now: int) -> None:
        self._hits[block.id] = 0
        self._queues[int(block.key in self._ghosts)].enter(block.id)
        self._ghosts.pop(block.key, None)
        while len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)

    def on_hit(self, block: BlockView, now: int) -> None:
        self._hits[block.id] = min(3, self._hits[block.id] + 1)

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._queues[int(block.id in self._queues[1])].offer(block.id)

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._queues[int(block.id in self._queues[1])].hold(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._giving = None
        del self._hits[block.id]
        if self._queues[0].leave(block.id):
            self._ghosts[block.key] = None
        self._queues[1].leave(block.id)
