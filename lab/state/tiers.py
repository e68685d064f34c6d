"""The host tier: where the KV of swapped-out requests waits. State path, control plane.

It counts host blocks and hands out their numbers; the copies are moves of the `StepPlan`.
"""

from __future__ import annotations

from collections.abc import Iterable

from lab.errors import ConfigError


class HostTier:
    """Blocks of host memory, of the same size as the device's.

    What a swap-in leaves behind can't be written in the same step, since a plan's swap-outs are carried out
    first: it comes free at the next `settle`.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 0:
            raise ConfigError(f"kv.host_blocks is {blocks}; expected at least 0")
        self.total = blocks
        self._touched = 0
        """Blocks that were ever taken are those below: the rest of a large tier costs nothing."""
        self._free: list[int] = []
        """Blocks that were given back, taken again before untouched ones."""
        self._leaving: list[int] = []

    @property
    def free(self) -> int:
        """Blocks that can be written in this step."""
        return self.total - self._touched + len(self._free)

    def settle(self) -> None:
        """A new step begins: what was given back can be used again."""
        if self._leaving:
            self._free.extend(reversed(self._leaving))
            self._leaving.clear()

    def take(self, count: int) -> list[int]:
        """`count` blocks; the caller has looked at `free`."""
        free = self._free
        back = [free.pop() for _ in range(min(count, len(free)))]
        first = self._touched
        self._touched += count - len(back)
        return [*back, *range(first, self._touched)]

    def release(self, blocks: Iterable[int]) -> None:
        self._leaving.extend(blocks)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Every block is free, leaving, or in exactly one table. Raises AssertionError."""
        seen = [*self._free, *self._leaving, *(block for table in tables for block in table)]
        assert sorted(seen) == list(range(self._touched)), (
            f"host blocks {sorted(seen)} of {self._touched} used"
        )
        assert self._touched <= self.total, f"{self._touched} host blocks were taken of {self.total}"
