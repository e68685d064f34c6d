"""Keeps what the control plane tells, and does nothing else while the run goes. Observation path.

A record is complete and frozen when it arrives, so recording is one append. Spans, columns and metrics are
made from the records afterwards, off the hot path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lab.control.observer import FleetEvent, Observer, RequestRecord, StepRecord


class Recorded(Protocol):
    """What a run left behind: all that spans, tables and metrics are computed from."""

    @property
    def requests(self) -> Sequence[RequestRecord]: ...
    @property
    def steps(self) -> Sequence[StepRecord]: ...
    @property
    def fleet(self) -> Sequence[FleetEvent]: ...


class Recorder(Observer):
    """Every record of a run, in the order of its telling: requests by end, steps by commit."""

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []
        self.steps: list[StepRecord] = []
        self.fleet: list[FleetEvent] = []

    @property
    def ended(self) -> int:
        """Requests told so far."""
        return len(self.requests)

    def on_step(self, step: StepRecord) -> None:
        self.steps.append(step)

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def on_fleet(self, event: FleetEvent) -> None:
        self.fleet.append(event)


def by_entry(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Requests in order of arrival, then of entry, then of id: the order of every table."""
    return sorted(records, key=lambda record: (record.request.arrival, record.seq, record.request.id))
