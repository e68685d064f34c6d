"""arc: a list of blocks used once and one of blocks used again share the cache; misses move the border.

Rule: T1 (used once) and T2 (used again) are LRU lists; B1 and B2 remember keys that they dropped. A miss that
B1 remembers says that T1 is too small, one of B2 that T2 is: T1's target moves by the ratio of B1 and B2. T1
gives while it is over its target, else T2.
Origin: Megiddo and Modha, FAST 2003, save that the victim is chosen before the newcomer is known.
Wins: adapts between recency and frequency. Loses: it learns from ghosts, which long chains flush. Cost: O(1).
"""

from __future__ import annotations

from collections import OrderedDict

from lab.policy import BlockId, BlockView, EvictionPolicy


class Arc(EvictionPolicy):
    """Index 0 is T1 and B1, index 1 is T2 and B2. Held blocks count for their list."""

    leaf_only = False

    def __init__(self) -> None:
        self._lists = (OrderedDict[BlockId, None](), OrderedDict[BlockId, None]())
        self._ghosts = (OrderedDict[bytes, None](), OrderedDict[bytes, None]())
        self._member: dict[BlockId, int] = {}
        self._once = 0  # members of T1
        self._target = 0.0

    def on_open(self, blocks: int, block_size: int) -> None:
        self._blocks = blocks

    def victim(self, now: int) -> BlockId:
        once, again = self._lists
        return next(iter(once if once and (self._once > self._target or not again) else again))

    def on_cached(self, block: BlockView, now: int) -> None:
        (b1, b2), key = self._ghosts, block.key
        if key in b1:
            self._target = min(self._blocks, self._target + max(1.0, len(b2) / len(b1)))
        elif key in b2:
            self._target = max(0.0, self._target - max(1.0, len(b1) / len(b2)))
        self._member[block.id] = int(key in b1 or key in b2)
        self._once += 1 - self._member[block.id]
        b1.pop(key, None)
        b2.pop(key, None)
        while b1 and self._once + len(b1) > self._blocks:
            b1.popitem(last=False)
        while b2 and len(self._member) + len(b1) + len(b2) > 2 * self._blocks:
            b2.popitem(last=False)

    def on_hit(self, block: BlockView, now: int) -> None:
        self._once -= 1 - self._member[block.id]
        self._member[block.id] = 1

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._lists[self._member[block.id]][block.id] = None

    def on_pinned(self, block: BlockView, now: int) -> None:
        del self._lists[self._member[block.id]][block.id]

    def on_dropped(self, block: BlockView, now: int) -> None:
        which = self._member.pop(block.id)
        self._once -= 1 - which
        self._lists[which].pop(block.id, None)
        self._ghosts[which][block.key] = None
