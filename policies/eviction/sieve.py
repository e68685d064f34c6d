"""sieve: a hand moves from the oldest block to the newest and drops the first that wasn't hit since it passed.

Rule: like clock, but a block that is spared stays where it is, so old survivors are met only once a round.
Origin: Zhang et al., NSDI 2024. Wins: web traffic, with many one-hit wonders.
Loses: on prefix chains it behaves like lfu: newcomers are sifted out before their conversation returns.
Cost: O(log n) amortised. Held blocks keep their place and are passed over.
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.keyed_heap import KeyedHeap


class Sieve(EvictionPolicy):
    """Candidates by order of entry, ahead of the hand and behind it. `victim`, asked again, answers the same."""

    leaf_only = False

    def __init__(self) -> None:
        self._entry: dict[BlockId, int] = {}
        self._hit: set[BlockId] = set()
        self._ahead: KeyedHeap[BlockId] = KeyedHeap()
        self._behind: KeyedHeap[BlockId] = KeyedHeap()
        self._hand = self._count = 0

    def victim(self, now: int) -> BlockId:
        while True:
            if not self._ahead:
                self._ahead, self._behind, self._hand = self._behind, self._ahead, 0
            block = self._ahead.peek()
            self._hand = self._entry[block]
            if block not in self._hit:
                return block
            self._hit.remove(block)
            self._hand += 1
            self._behind.push(self._ahead.pop(), (self._entry[block],))

    def on_hit(self, block: BlockView, now: int) -> None:
        self._hit.add(block.id)

    def on_evictable(self, block: BlockView, now: int) -> None:
        if block.id not in self._entry:
            self._count += 1
            self._entry[block.id] = self._count
        entry = self._entry[block.id]
        (self._ahead if entry >= self._hand else self._behind).push(block.id, (entry,))

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._ahead.remove(block.id)
        self._behind.remove(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self.on_pinned(block, now)
        self._entry.pop(block.id, None)
        self._hit.discard(block.id)
        if not self._ahead:  # the newest went: the next round begins before anything enters
            self._ahead, self._behind, self._hand = self._behind, self._ahead, 0
