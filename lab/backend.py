"""What a backend is to the commands: a data plane, the clock it runs on, and what it is called. Control plane.

Backends are found by name (`lab.plugins`, kind `backend`): a function `open_backend(cfg, console, beside)`.
`beside` is a backend opened before it for the same experiment, if any: the simulator calibrates itself on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from lab.assembly import ControlPlane
from lab.config import Config
from lab.console import Console
from lab.control.core import EngineCore
from lab.control.executor import Capacity, Executor
from lab.control.request import Request

KV_TOKENS = 32_768
"""Tokens that the KV cache holds when `kv.blocks` is not set; the same on every backend."""

Progress = Callable[[EngineCore, int], None]
"""Called after each step with the core and the run's time in nanoseconds."""


class Drive(Protocol):
    """One workload on its way through one backend."""

    @property
    def now(self) -> int:
        """The run's time, nanoseconds."""
        ...

    def run(self) -> None:
        """Until every request has ended."""
        ...


class Backend(Protocol):
    """An opened data plane."""

    @property
    def name(self) -> Literal["real", "sim"]: ...
    @property
    def clock(self) -> Literal["stepped", "virtual", "wall"]: ...
    @property
    def evidence(self) -> Literal["measured", "modelled", "replayed"]: ...
    @property
    def capacity(self) -> Capacity: ...
    @property
    def executor(self) -> Executor: ...
    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which this model ends its answer; a simulator knows none."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """What to write down for the run: model, dtype, attention, calibration, ..."""
        ...

    def drive(self, control: ControlPlane, requests: Sequence[Request], progress: Progress) -> Drive: ...

    def close(self) -> None: ...


OpenBackend = Callable[[Config, Console, Backend | None], Backend]


def kv_blocks(cfg: Config) -> int:
    """Blocks of the KV cache: as configured, or enough for `KV_TOKENS`."""
    return cfg.kv.blocks or max(1, KV_TOKENS // cfg.kv.block_size)
