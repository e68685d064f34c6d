"""What a recorded run tells a simulator: its durations, its capacity, its outputs. Data plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.control.executor import Capacity
from lab.control.request import RequestId
from lab.errors import ReplayError
from sim.cost.replay import RecordedCost
from sim.executor import Output

if TYPE_CHECKING:
    from lab.analysis.runs import Run


def recorded_cost(run: Run) -> RecordedCost:
    """The durations of a recorded run as a cost model."""
    digests, *shapes = run.step_columns("digest", "prefill_tokens", "decode_tokens", "context_tokens")
    return RecordedCost(digests, run.timings(), list(zip(*shapes, strict=True)))


def recorded_capacity(run: Run) -> Capacity:
    """The data plane's capacity as the run wrote it down."""
    try:
        return Capacity(**run.environment["capacity"])
    except (KeyError, TypeError) as error:
        raise ReplayError(f"run '{run.path}' doesn't say its capacity in environment.json") from error


def recorded_outputs(run: Run) -> dict[RequestId, Output]:
    """What each request of a recorded run generated, and whether it ended by that."""
    return {record.request.id: (record.output, record.reason == "stop") for record in run.request_records()}
