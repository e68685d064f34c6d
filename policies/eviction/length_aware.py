"""length_aware: drop the block used least often; among equals, the one furthest from its prompt's beginning.

Rule: lfu with in-cache counts, ties by depth.
Origin: the LengthAwareCache of the Mooncake paper's trace study.
Wins: a shared system prompt under one-time traffic. Loses: to lru at every size on chat and agent traces:
most blocks tie at one use, and then long conversations, which do return, go first.
Cost: O(log n).
"""

from __future__ import annotations

from lab.policy import BlockId, BlockView
from policies.eviction.lfu import Lfu


class LengthAware(Lfu):
    """Candidates by (uses, depth from the deepest, order of being let go)."""

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._count += 1
        self._candidates.push(block.id, (self._uses[block.id], -block.depth, self._count))

    def victim(self, now: int) -> BlockId:
        return self._candidates.peek()
