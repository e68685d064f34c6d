"""Memory on huge pages, for tensors that are read at random or whole in every step. Data plane; state path.

With pages of 4 KiB a good part of reading a paged cache is finding out where its pages are: attention over a
scattered cache runs an eighth faster on pages of 2 MiB. Where the system has none, it is ordinary memory.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 2 << 20
"""Bytes; below this a huge page would be mostly empty."""


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros whose memory is there already. Raises `MemoryError` or `RuntimeError` if there is none."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.zeros(tuple(shape), dtype=dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes of memory: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    # Written now, so that no step pays for the first touch of a page.
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape)).zero_()


def moved(tensor: Tensor) -> Tensor:
    """A contiguous copy of a CPU tensor, on huge pages."""
    return zeros(tensor.shape, tensor.dtype).copy_(tensor)
