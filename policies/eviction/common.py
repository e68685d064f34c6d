"""A queue of blocks by order of entry in which a held block keeps its place: what fifo and its kin are made of."""

from __future__ import annotations

from lab.policy import BlockId
from policies.keyed_heap import KeyedHeap


class Queue:
    """First in, first out. Members are candidates while they are offered, in O(log n) a move."""

    def __init__(self) -> None:
        self._entry: dict[BlockId, int] = {}
        self._offered: KeyedHeap[BlockId] = KeyedHeap()
        self._count = 0

    def __len__(self) -> int:
        """Members, held ones too."""
        return len(self._entry)

    def __contains__(self, block: object) -> bool:
        return block in self._entry

    @property
    def offers(self) -> bool:
        """Whether any member is a candidate."""
        return len(self._offered) > 0

    def enter(self, block: BlockId) -> None:
        """Put a block at the back, not offered."""
        self._offered.remove(block)
        self._count += 1
        self._entry[block] = self._count

    def offer(self, block: BlockId) -> None:
        """A member becomes a candidate, in its place."""
        self._offered.push(block, (self._entry[block],))

    def hold(self, block: BlockId) -> None:
        """It is no candidate, but keeps its place."""
        self._offered.remove(block)

    def leave(self, block: BlockId) -> bool:
        """Forget a block; whether it was a member."""
        self._offered.remove(block)
        return self._entry.pop(block, None) is not None

    def first(self) -> BlockId:
        """The candidate that entered first. Raises IndexError when there is none."""
        return self._offered.peek()
