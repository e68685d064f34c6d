"""When a request's tokens were there: single instants, and stretches of a clock that others share. State path.

Most tokens of a run come from steps that give one to each of many requests at the same instant. Such an instant is
kept once, in `Decodes.times`, and a request keeps from where to where the clock is its own: ten numbers are as good as
a thousand, to hold and to add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload


class TokenTimes(Sequence[int]):
    """Nanoseconds, one for each token, in order. Read like a tuple, and equal to one of the same times."""

    __slots__ = ("_count", "_own", "_shared")

    def __init__(self) -> None:
        self._own: list[int] = []
        self._shared: list[tuple[int, list[int], int, int]] = []
        """(how many of its own come before, clock, first, end): never empty."""
        self._count = 0

    def append(self, now: int) -> None:
        self._own.append(now)
        self._count += 1

    def share(self, clock: list[int], first: int, end: int) -> None:
        """The next ones are `clock[first:end]`, which must not change any more."""
        before = len(self._own)
        self._count += end - first
        if self._shared:
            place, last, since, until = self._shared[-1]
            if last is clock and until == first and place == before:
                self._shared[-1] = (place, clock, since, end)
                return
        self._shared.append((before, clock, first, end))

    def copy(self) -> TokenTimes:
        new = TokenTimes()
        new._own, new._shared, new._count = self._own[:], self._shared[:], self._count
        return new

    def listed(self) -> list[int]:
        """All of them."""
        if not self._shared:
            return self._own[:]
        found: list[int] = []
        done = 0
        for before, clock, first, end in self._shared:
            found += self._own[done:before]
            found += clock[first:end]
            done = before
        return found + self._own[done:]

    def split(self) -> tuple[list[int], list[tuple[list[int], int, int]]]:
        """The gaps between them: those that are its own, one by one; and stretches of clocks that hold the rest."""
        if not self._shared:
            return [later - earlier for earlier, later in pairwise(self._own)], []
        own: list[int] = []
        edge: list[int] = []  # the end of what came before, then all singles up to the next stretch
        stretches: list[tuple[list[int], int, int]] = []
        done = 0
        for before, clock, first, end in self._shared:
            edge += self._own[done:before]
            edge.append(clock[first])
            own += [later - earlier for earlier, later in pairwise(edge)]
            stretches.append((clock, first, end))
            edge, done = [clock[end - 1]], before
        edge += self._own[done:]
        return own + [later - earlier for earlier, later in pairwise(edge)], stretches

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return tuple(self.listed()[index])
        # The first and the last are what is asked for, of every request.
        if index == -1 and self._shared and self._shared[-1][0] == len(self._own):
            _, clock, _, end = self._shared[-1]
            return clock[end - 1]
        if index in (0, -1) and (index == -1 or not self._shared or self._shared[0][0]):
            return self._own[index]
        return self.listed()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.listed())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.listed() == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self.listed()))

    def __repr__(self) -> str:
        return repr(tuple(self.listed()))
