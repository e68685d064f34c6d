"""What the control plane's own work costs in time. State path, control plane.

The data plane reports its durations itself. Planning and committing happen here, in Python, and take time
too: measured beside a real engine, modelled or replayed in a simulation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from lab.control.plan import StepPlan


class ControlTimer(Protocol):
    """Asked around every plan and every commit."""

    def start(self) -> None:
        """Planning or committing begins."""
        ...

    def plan_ns(self, plan: StepPlan) -> int:
        """What the planning that just ended took."""
        ...

    def commit_ns(self, plan: StepPlan) -> int:
        """What the commit that just ended took."""
        ...


class MeasuredControl:
    """Wall-clock durations of the control plane."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._began = clock()

    def start(self) -> None:
        self._began = self._clock()

    def plan_ns(self, plan: StepPlan) -> int:
        return self._clock() - self._began

    def commit_ns(self, plan: StepPlan) -> int:
        return self._clock() - self._began
