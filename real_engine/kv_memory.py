"""The paged KV cache's memory. Data plane; state path.

One key and one value tensor a layer, `[blocks, block_size, kv_heads, head_dim]`: the layout flash-attn and
vLLM's kernels take too. Which block holds what is the control plane's business (`lab/state/blocks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lab.errors import ExecutorError
from real_engine import pages
from real_engine.device import available_memory as device_memory
from real_engine.models.config import ModelShape

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class KvShape:
    """How much one block holds."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelShape, dtype: torch.dtype, block_size: int) -> KvShape:
        return cls(config.layers, config.kv_heads, config.head_dim, block_size, dtype)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values, all layers."""
        return 2 * self.layers * self.block_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    def blocks_in(self, memory: int) -> int:
        """Blocks that fit `memory` bytes."""
        return max(0, memory) // self.block_bytes


class KvMemory:
    """Keys and values of all layers. `keys[layer]` is `[blocks, block_size, kv_heads, head_dim]`."""

    def __init__(
        self, shape: KvShape, blocks: int, device: torch.device | None = None, *, pinned: bool = False
    ) -> None:
        """Allocate, on the CPU if no device is given; `pinned` memory of the host can be copied to and from a CUDA
        device while both go on. Raises `ExecutorError`, saying how many blocks would fit."""
        if blocks < 1 or shape.block_size < 1:
            raise ExecutorError(
                f"the KV cache is to have {blocks} blocks of {shape.block_size} tokens; expected at least 1 of each"
            )
        self.shape, self.blocks = shape, blocks
        self.device = device or torch.device("cpu")
        free = available_memory() if self.device.type == "cpu" else device_memory(self.device)
        needed, available = blocks * shape.block_bytes, free
        if available is not None and needed > available:
            raise _too_large(shape, blocks, available)
        size = (blocks, shape.block_size, shape.kv_heads, shape.head_dim)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        try:
            # Zeros and not just memory: a masked position has weight 0, and 0 times a NaN left there is NaN.
            for _ in range(shape.layers):
                for tensors in (self.keys, self.values):
                    tensors.append(_zeros(size, shape.dtype, self.device, pinned))
        except (RuntimeError, MemoryError) as error:
            # Whatever the system had promised: what could be had is what there is.
            had = needed * (len(self.keys) + len(self.values)) // (2 * shape.layers)
            self.free()
            raise _too_large(shape, blocks, had if available is None else min(available, had)) from error

    @property
    def nbytes(self) -> int:
        return self.blocks * self.shape.block_bytes

    def copy(self, source: KvMemory, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of all layers from another memory of the same shape: (its block, block of this).

        From this memory itself too: all of them are read before any is written.
        """
        if not pairs:
            return
        if self.device != source.device:
            copy_runs((*self.keys, *self.values), (*source.keys, *source.values), pairs)
            return
        theirs, ours = (torch.tensor(blocks, device=self.device) for blocks in zip(*pairs, strict=True))
        for mine, other in zip((*self.keys, *self.values), (*source.keys, *source.values), strict=True):
            mine[ours] = other[theirs]

    def free(self) -> None:
        """Give the memory back; the cache can't be used afterwards. May be called twice."""
        self.keys, self.values = [], []


def copy_runs(ours: Sequence[Tensor], theirs: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks between devices, (their block, our block), each run of neighbours at once.

    Indexing would gather them into memory that isn't pinned, and read that before it is there. A copy has been done
    when the device is synchronised.
    """
    for first, last, place in runs(pairs):
        for mine, other in zip(ours, theirs, strict=True):
            mine[place : place + last - first].copy_(other[first:last], non_blocking=True)


def runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Pairs of blocks that are neighbours on both sides put together: (first, end, first of ours)."""
    found: list[tuple[int, int, int]] = []
    for theirs, ours in pairs:
        if found and found[-1][1] == theirs and found[-1][2] + theirs - found[-1][0] == ours:
            found[-1] = (found[-1][0], theirs + 1, found[-1][2])
        else:
            found.append((theirs, theirs + 1, ours))
    return found


def available_memory() -> int | None:
    """Bytes this process may still take: the machine's available memory within the cgroup's limit.

    None where the system doesn't say. Linux grants memory it doesn't have, so asking first is the only way
    to a sentence instead of a killed process.
    """
    limits = [_meminfo(), _cgroup()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    if device.type == "cpu" and not pinned:
        return pages.zeros(size, dtype)
    return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)


def _too_large(shape: KvShape, blocks: int, available: int | None) -> ExecutorError:
    message = (
        f"a KV cache of {blocks} blocks of {shape.block_size} tokens needs "
        f"{blocks * shape.block_bytes / _GIB:.2f} GiB"
    )
    if available is None:
        return ExecutorError(f"{message}, more than there is; set kv.blocks lower")
    return ExecutorError(
        f"{message} and {available / _GIB:.2f} GiB of memory is available: at most "
        f"{shape.blocks_in(available)} blocks fit (kv.blocks)"
    )


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        return int((root / "memory.max").read_text()) - int((root / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        return None
