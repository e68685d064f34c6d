"""clock: fifo with a second chance: a block hit since the hand last passed goes to the back instead.

Rule: the oldest candidate is dropped if its bit is clear; else the bit is cleared and it enters anew.
Origin: Corbato's one-bit clock, as FIFO with reinsertion.
Wins: nearly lru without reordering at every hit.
Loses: one bit can't tell a block hit once from one hit a hundred times.
Cost: O(log n) amortised. A block enters when first let go; held blocks keep their place and are passed over.
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView
from policies.eviction.fifo import Fifo


class Clock(Fifo):
    """Candidates by order of entry. `victim` moves the hand; asked again, it gives the same answer."""

    def __init__(self) -> None:
        super().__init__()
        self._hit: set[BlockId] = set()

    def victim(self, now: int) -> BlockId:
        while (block := self._queue.first()) in self._hit:
            self._hit.remove(block)
            self._queue.enter(block)
            self._queue.offer(block)
        return block

    def on_hit(self, block: BlockView, now: int) -> None:
        self._hit.add(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        super().on_dropped(block, now)
        self._hit.discard(block.id)
