"""A run that was never written: what its observers were told, seen as the tables of a run directory. Observation path.

Re-simulating two runs to tell duration error from decision error needs their decisions and metrics, once. Files,
spans and the log of such a run would take longer than the run itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from lab.observe.columns import PLANS, REQUESTS, STEPS
from lab.observe.metrics import summarise
from lab.observe.parquet import Column, in_memory
from lab.observe.recorder import Recorder, by_entry

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

_STEPS = ("step", "replica", "start_ns", "end_ns", "digest", "running", "waiting", "evicted", "batch")
_STATE = ("prefill_tokens", "decode_tokens", "blocks_free", "blocks_cached", "blocks_held")
_PLANS = (
    *("step", "replica", "request", "start", "tokens", "samples", "blocks"),
    *("admitted", "preempted", "rejected"),
)
_REQUESTS = (
    *("id", "seq", "arrival_ns", "end_ns", "outcome", "replica", "prompt_tokens", "output_tokens"),
    *("cached_tokens", "first_scheduled_ns", "first_token_ns", "last_token_ns", "preemptions", "intervals"),
)


@dataclass(frozen=True)
class Kept:
    """A `RunLike` over a recorder. Its tables have the columns that finding a divergence takes."""

    recorder: Recorder
    config: Mapping[str, Any]
    block_size: int
    partial: None = None

    @cached_property
    def requests(self) -> pd.DataFrame:
        return _frame(by_entry(self.recorder.requests), REQUESTS, _REQUESTS)

    @cached_property
    def steps(self) -> pd.DataFrame:
        return _frame(self.recorder.steps, STEPS, (*_STEPS, *_STATE))

    @cached_property
    def plans(self) -> pd.DataFrame:
        return _frame(self.recorder.steps, PLANS, _PLANS)

    def plan(self, step: int, replica: int) -> pd.DataFrame:
        """The one row of `plans`."""
        rows = [row for row in self.recorder.steps if (row.plan.index, row.replica) == (step, replica)]
        return _frame(rows, PLANS, _PLANS)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return summarise(self.recorder, block_size=self.block_size)


def _frame(rows: Sequence[T], columns: Sequence[Column[T]], wanted: Sequence[str]) -> pd.DataFrame:
    frame: pd.DataFrame = in_memory(rows, [column for column in columns if column[0] in wanted]).to_pandas()
    return frame
