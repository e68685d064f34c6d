"""2q: newcomers queue apart; only a block that returns after being dropped enters the long-lived part.

Rule: a new block enters A1in (FIFO, `kin` of the cache). Pushed out, its key is remembered in A1out (`kout`);
a block that comes back while remembered enters Am (LRU). A1in gives while it is over its share, else Am.
Origin: Johnson and Shasha, VLDB 1994 (full version). Wins: scans never reach Am.
Loses: a conversation's blocks need a second miss before they count. Cost: O(log n).
"""

from __future__ import annotations

from collections import OrderedDict

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.eviction.common import Queue


class TwoQ(EvictionPolicy):
    """`kin`, `kout`: sizes of A1in and of the remembered A1out, as shares of the cache's blocks."""

    leaf_only = False

    def __init__(self, kin: float = 0.25, kout: float = 0.5) -> None:
        for name, share in (("kin", kin), ("kout", kout)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; expected a share from 0 to 1")
        self._kin, self._kout = kin, kout
        self._new = Queue()
        self._old: OrderedDict[BlockId, None] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def on_open(self, blocks: int, block_size: int) -> None:
        self._most_new, self._most_ghosts = int(blocks * self._kin), int(blocks * self._kout)

    def victim(self, now: int) -> BlockId:
        from_new = self._new.offers and (len(self._new) > self._most_new or not self._old)
        return self._new.first() if from_new else next(iter(self._old))

    def on_cached(self, block: BlockView, now: int) -> None:
        if self._ghosts.pop(block.key, True):
            self._new.enter(block.id)
        # Only now, so that making room for a block can't forget that very block.
        while len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)

    def on_evictable(self, block: BlockView, now: int) -> None:
        if block.id in self._new:
            self._new.offer(block.id)
        else:
            self._old[block.id] = None

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._new.hold(block.id)
        self._old.pop(block.id, None)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._old.pop(block.id, None)
        if self._new.leave(block.id):
            self._ghosts[block.key] = None
