"""t_lru: first drop what a conversation's next turn can do without and still be fast; then lru.

Rule: a history of L tokens, a next prompt of Q (`next_prompt`), and `spare` tokens that may be computed within
the latency target: what lies beyond L + Q - spare is safe to lose. Safe blocks go first, oldest first; then lru.
L is the last user's prompt; blocks whose last user belongs to no session are never called safe.
Origin: Tail-Optimized LRU, arXiv 2510.15152. Wins: fewer slow turns at the tail of TTFT.
Loses: mean hit ratio, as it gives up tails that would have been hit. Cost: O(1).
"""

from __future__ import annotations

from collections import OrderedDict

from lab.policy import BlockId, BlockView, EvictionPolicy


class TailLru(EvictionPolicy):
    """`spare`: tokens that a turn may compute and still meet its target; `next_prompt`: its expected length."""

    leaf_only = False

    def __init__(self, spare: int = 1024, next_prompt: int = 256) -> None:
        for name, value in (("spare", spare), ("next_prompt", next_prompt)):
            if value < 0:
                raise ValueError(f"{name} is {value}; expected a number of tokens, at least 0")
        self._extra = next_prompt - spare
        self._safe: OrderedDict[BlockId, None] = OrderedDict()
        self._rest: OrderedDict[BlockId, None] = OrderedDict()

    def on_open(self, blocks: int, block_size: int) -> None:
        self._block_size = block_size

    def victim(self, now: int) -> BlockId:
        return next(iter(self._safe or self._rest))

    def on_evictable(self, block: BlockView, now: int) -> None:
        user, begin = block.user, block.depth * self._block_size
        safe = user is not None and user.session and begin >= len(user.prompt) + self._extra
        (self._safe if safe else self._rest)[block.id] = None

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._safe.pop(block.id, None)
        self._rest.pop(block.id, None)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self.on_pinned(block, now)
