"""The boundary to the data plane. Whoever implements `Executor` can be driven by the control plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lab.control.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a data plane offers: KV blocks, tokens a block, and the longest context it can hold."""

    blocks: int
    block_size: int
    max_context: int
    vocab_size: int


class Executor(Protocol):
    """The data plane. Knows nothing of queues, policies or arrival times."""

    capacity: Capacity

    def execute(self, plan: StepPlan) -> StepResult:
        """Do the work; one token for each sampling item, and the durations. Raises `ExecutorError`."""
        ...

    def close(self) -> None:
        """Give back what is held. May be called twice."""
        ...
