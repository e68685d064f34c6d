"""The boundary to the data plane. Whoever implements `Executor` can be driven by the control plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lab.control.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a data plane offers: KV blocks, tokens a block, and the longest context it can hold.

    `host_blocks` of the same `block_bytes` are host memory to swap to, over a link of `transfer_gb_s` each way.
    """

    blocks: int
    block_size: int = 16
    max_context: int = 1 << 31
    vocab_size: int = 1 << 15
    host_blocks: int = 0
    block_bytes: int = 0
    transfer_gb_s: float = 16.0

    def transfer_ns(self, blocks: int) -> int:
        """Nominal time to move this many blocks one way."""
        return round(blocks * self.block_bytes / self.transfer_gb_s)


class Executor(Protocol):
    """The data plane. Knows nothing of queues, policies or arrival times."""

    capacity: Capacity

    def execute(self, plan: StepPlan) -> StepResult:
        """Do the work; one token for each sampling item, and the durations. Raises `ExecutorError`."""
        ...

    def close(self) -> None:
        """Give back what is held. May be called twice."""
        ...
