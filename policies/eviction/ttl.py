"""ttl: keep a block for a fixed time after its last use, then drop it though there is room; lru in between.

Rule: a block not used for more than `ttl_s` seconds is dropped at the next step; a hit starts its time anew.
Origin: prompt caching as it is sold (five minutes, an hour); pinning for a tool call's duration (Continuum).
Wins: memory for others, and a promise that users can plan with. Loses: hits that room would have allowed;
under pressure the time limit never comes into play.
Cost: O(1) a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lab.policy import BlockId, BlockView, EvictionPolicy


class Ttl(EvictionPolicy):
    """`ttl_s`: seconds that an unused block is kept."""

    leaf_only = False

    def __init__(self, ttl_s: float = 300.0) -> None:
        if not ttl_s >= 0:
            raise ValueError(f"ttl_s is {ttl_s}; expected a time in seconds, at least 0")
        self._ttl_s = ttl_s
        self._since: OrderedDict[BlockId, int] = OrderedDict()

    def expired(self, now: int) -> Sequence[BlockId]:
        gone: list[BlockId] = []
        for block, since in self._since.items():
            if now - since <= self._ttl_s * 1e9:
                break
            gone.append(block)
        return gone

    def victim(self, now: int) -> BlockId:
        return next(iter(self._since))

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._since[block.id] = now

    def on_pinned(self, block: BlockView, now: int) -> None:
        del self._since[block.id]

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._since.pop(block.id, None)
