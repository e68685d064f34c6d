"""gdsf: among blocks that nothing cached continues, drop the one whose loss costs least to make good.

Rule: value = floor + uses * cost, fixed at each use; the least goes, and the floor rises to its value, which
ages what isn't used. cost = 1 + tokens before the block / `even`: recomputing a block attends to all before it.
Origin: Cherkasova's Greedy-Dual-Size-Frequency; all sizes are one block.
Wins: where deep context is dear. Loses: not monotone along a chain, so by block alone it would orphan tails
(hence leaves only); on chats frequency misleads as in lfu. Cost: O(log n).
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy
from policies.keyed_heap import KeyedHeap


class Gdsf(EvictionPolicy):
    """`even`: tokens of context at which attention costs as much as the matrix products (an 8B model: 30,000)."""

    leaf_only = True

    def __init__(self, even: int = 30_000) -> None:
        if even < 1:
            raise ValueError(f"even is {even}; expected at least 1 token")
        self._even = even
        self._floor = 0.0
        self._uses: dict[BlockId, int] = {}
        self._value: dict[BlockId, float] = {}
        self._candidates: KeyedHeap[BlockId] = KeyedHeap()
        self._count = 0

    def on_open(self, blocks: int, block_size: int) -> None:
        self._block_size = block_size

    def victim(self, now: int) -> BlockId:
        block = self._candidates.peek()
        self._floor = max(self._floor, self._value[block])
        return block

    def on_cached(self, block: BlockView, now: int) -> None:
        self.on_hit(block, now)

    def on_hit(self, block: BlockView, now: int) -> None:
        uses = self._uses[block.id] = self._uses.get(block.id, 0) + 1
        self._value[block.id] = self._floor + uses * (1 + block.depth * self._block_size / self._even)

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._count += 1
        self._candidates.push(block.id, (self._value[block.id], self._count))

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)
        del self._uses[block.id], self._value[block.id]
