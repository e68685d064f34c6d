"""A priority queue whose entries can be removed or given a new key: what most policies keep their order in."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Key = tuple[Any, ...]


class KeyedHeap(Generic[Name]):
    """Names by ascending key. Keys must differ between names, so that the order is total.

    Removal is lazy: a stale entry is skipped when it surfaces, and all are swept out once they are the
    majority, so memory is bounded by what is live. push, remove and pop are O(log n) amortised.
    """

    def __init__(self) -> None:
        self._keys: dict[Name, Key] = {}
        self._heap: list[tuple[Key, Name]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def push(self, name: Name, key: Key) -> None:
        """Insert, or move to a new key."""
        self._keys[name] = key
        heappush(self._heap, (key, name))
        if len(self._heap) > 2 * len(self._keys) + 64:
            self._heap = [(k, n) for n, k in self._keys.items()]
            heapify(self._heap)

    def remove(self, name: Name) -> None:
        """Forget a name; nothing happens if it isn't here."""
        self._keys.pop(name, None)

    def peek(self) -> Name:
        """The name with the least key. Raises IndexError when empty."""
        while True:
            key, name = self._heap[0]
            if self._keys.get(name) == key:
                return name
            heappop(self._heap)

    def peek_key(self) -> Key:
        """The least key. Raises IndexError when empty."""
        return self._keys[self.peek()]

    def first(self, count: int) -> list[Name]:
        """The names with the `count` least keys, in order; they stay. O(count log n)."""
        found: list[tuple[Key, Name]] = []
        while self._heap and len(found) < count:
            key, name = heappop(self._heap)
            # A name that left and came back with the same key stands here twice, side by side.
            if self._keys.get(name) == key and (not found or found[-1][1] != name):
                found.append((key, name))
        for entry in found:
            heappush(self._heap, entry)
        return [name for _, name in found]

    def pop(self) -> Name:
        """Remove and return the name with the least key."""
        name = self.peek()
        del self._keys[name]
        return name
