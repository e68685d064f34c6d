"""Where tensors live, and how numbers get there. Data plane; state path.

The only file that asks which kind of device it is on. What a step says of itself is packed on the host and sent in
one copy out of pinned memory, which the device reads while the host goes on. On the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.errors import ExecutorError

_ALIGN = 16
"""Bytes at whose multiples the arrays of one copy begin: enough for vector loads of any type."""


def choose(name: str) -> torch.device:
    """The device that `engine.device` means: `auto`, `cpu` or `cuda`. Raises `ExecutorError` where there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "has no CUDA in it" if torch.version.cuda is None else "finds no CUDA device"
        raise ExecutorError(
            f"engine.device=cuda, but torch {torch.__version__} {built}; say engine.device=cpu, or see "
            "what python -m lab.doctor says"
        )
    return torch.device("cuda", torch.cuda.current_device())


def upload(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    """The arrays as tensors on `device`, in one copy; on the CPU they are shared, not copied.

    The pinned buffer belongs to torch's caching allocator, which reuses it only when the copy is done.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    packed, places = pack(arrays)
    host = torch.from_numpy(packed)
    if device.type == "cuda":
        host = host.pin_memory()
    return unpack(host.to(device, non_blocking=True), places)


Place = tuple[int, torch.dtype, tuple[int, ...]]
"""First byte, type and shape of one array within a buffer."""


def pack(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[np.uint8], list[Place]]:
    """All arrays one after another as bytes, and where each one lies."""
    places: list[Place] = []
    size = 0
    for array in arrays:
        places.append((size, torch.from_numpy(np.empty(0, array.dtype)).dtype, array.shape))
        size += -(-array.nbytes // _ALIGN) * _ALIGN
    packed = np.zeros(max(size, _ALIGN), np.uint8)  # torch gives an empty buffer no stride to view it by
    for array, (first, _, _) in zip(arrays, places, strict=True):
        packed[first : first + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed, places


def unpack(buffer: Tensor, places: Sequence[Place]) -> list[Tensor]:
    """The arrays of `pack` as views of its buffer, uint8 `[bytes]`, wherever that lies now."""
    views = []
    for first, dtype, shape in places:
        count = int(np.prod(shape, dtype=np.int64))
        views.append(buffer[first : first + count * dtype.itemsize].view(dtype).view(shape))
    return views


def describe(device: torch.device) -> str:
    """As a run's manifest should name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Say in a sentence that the device has no memory left for `what`. Raises `ExecutorError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExecutorError(f"the device has no memory left for {what}; expected {remedy}") from error


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read next means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a CUDA device; None for another, which says nothing."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
