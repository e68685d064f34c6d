"""workload_aware: drop the block least likely to be used again soon, judged by how its kind of request behaves.

Rule: per category (tenant, in a session or not) learn the share q of blocks let go that are used again, and
their mean time to that, 1/r (exponential). P(reuse within `window_s` | unused for a) =
q (e^-ra - e^-r(a+w)) / (1 - q + q e^-ra). The least goes; P falls with a, so a category's oldest is its least.
Origin: Wang et al., KVCache Cache in the Wild, ATC 2025. Wins: mixed traffic, where one kind never returns.
Loses: nothing but work on uniform traffic, where it is lru (tail first). O(categories) a victim.
"""

from __future__ import annotations

from collections import OrderedDict
from math import exp

from lab.policy import BlockId, BlockView, EvictionPolicy


class _Category:
    def __init__(self) -> None:
        self.since: OrderedDict[BlockId, tuple[int, int]] = OrderedDict()  # time and order of being let go
        self.let_go = self.reused = self.waited = 0


class WorkloadAware(EvictionPolicy):
    """`window_s`: how far ahead a use counts, about as long as a block stays cached."""

    leaf_only = False

    def __init__(self, window_s: float = 300.0) -> None:
        if not window_s > 0:
            raise ValueError(f"window_s is {window_s}; expected a time in seconds, above 0")
        self._window = window_s * 1e9
        self._categories: dict[tuple[str, bool], _Category] = {}
        self._of: dict[BlockId, _Category] = {}
        self._count = 0

    def victim(self, now: int) -> BlockId:
        fronts = ((c, *next(iter(c.since.items()))) for c in self._categories.values() if c.since)
        return min((self._chance(c, now - since), order, block) for c, block, (since, order) in fronts)[2]

    def on_evictable(self, block: BlockView, now: int) -> None:
        kind = (block.user.tenant, bool(block.user.session)) if block.user else ("", False)
        category = self._of[block.id] = self._categories.setdefault(kind, _Category())
        category.let_go += 1
        self._count += 1
        category.since[block.id] = (now, self._count)

    def on_pinned(self, block: BlockView, now: int) -> None:
        category = self._of.pop(block.id)
        category.reused += 1
        category.waited += now - category.since.pop(block.id)[0]

    def on_dropped(self, block: BlockView, now: int) -> None:
        if category := self._of.pop(block.id, None):
            del category.since[block.id]

    def _chance(self, category: _Category, age: int) -> float:
        # One imagined block of each fate: nothing is certain before it was seen.
        q = (category.reused + 1) / (category.let_go + 2)
        rate = (category.reused + 1) / (category.waited + self._window)
        still = q * exp(-rate * age)
        return still * (1 - exp(-rate * self._window)) / (1 - q + still)
