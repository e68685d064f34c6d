"""A device that records graphs, on the CPU: every operation of torch that a run makes, done again on the same tensors.

As strict as CUDA's: reading a number on the host while recording is refused, Python isn't run again, and results go
where they went. Functions that are one kernel on the device (flash-attn's) are recorded as one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::equal")


class _Recording(TorchDispatchMode):
    def __init__(self, device: RecordingDevice) -> None:
        super().__init__()
        self._device = device
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._device.inside:
            if func._schema.name in REFUSED:
                raise RuntimeError(f"{func._schema.name} reads on the host, which can't be recorded")
            self.operations.append((func, args, kwargs, out))
        return out


class RecordingDevice:
    """Implements `GraphDevice`."""

    def __init__(self) -> None:
        self.inside = 0
        self.captured = 0
        self.replayed = 0
        self._recording: _Recording | None = None

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        run()
        with _Recording(self) as recording:
            self._recording = recording
            out = run()
        self._recording = None
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, old in recording.operations:
                _write(old, func(*args, **kwargs))

        return out, replay

    def kernel(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function` as something that the device does in one."""

        def call(*args: Any, **kwargs: Any) -> Tensor:
            self.inside += 1
            try:
                out = function(*args, **kwargs)
            finally:
                self.inside -= 1
            if self._recording is not None:
                self._recording.operations.append((function, args, kwargs, out))
            return out

        return call


def _write(old: Any, new: Any) -> None:
    """Results of a replay take the place of the recorded ones; views and in-place results are there already."""
    if isinstance(old, Tensor):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)
    elif isinstance(old, list | tuple):
        for one, other in zip(old, new, strict=True):
            _write(one, other)
