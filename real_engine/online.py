"""Time, for the real engine: the wall clock. Request path.

What a server does: requests come when they come, whether or not the engine is free, and an idle engine sleeps.
Requests are taken in between two steps, so one that comes during a step waits for its end; how long is
measured for each (`Decision.ingest_lag`) and part of its latency, because every time of a request counts from
its intended arrival. A load generator that sends the next request only when it gets round to it would leave
that wait out (Tene's "coordinated omission").

The run's clock never leaves the wall by more than the step under way: steps tile it without gaps. What passes
between two steps (recording, taking requests in, waking up) is counted to the planning of the second, so the
durations of the steps explain every arrival that a plan saw, and replaying them gives its decisions exactly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from lab.assembly import ControlPlane
from lab.control.executor import Executor
from lab.control.plan import StepPlan
from lab.control.request import Request, RequestId
from real_engine.driver import Progress, SteppedRun


class OnlineRun(SteppedRun):
    """One replica behind a gateway under an open-loop load. `clock` counts nanoseconds, from wherever.

    `sleep(seconds)` may return early, and does when something is aborted; the default is a real one.
    """

    def __init__(
        self,
        control: ControlPlane,
        executor: Executor,
        requests: Sequence[Request],
        progress: Progress | None = None,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        super().__init__(control, executor, requests, progress, _WallControl(self))
        self._clock, self._origin = clock, clock()
        self._woken = threading.Event()
        self._sleep = sleep or self._woken.wait

    def run(self) -> None:
        self._origin = self._clock()
        super().run()

    def elapsed(self) -> int:
        """Nanoseconds of wall time since the run began."""
        return self._clock() - self._origin

    def abort(self, request: RequestId) -> None:
        super().abort(request)
        self._woken.set()

    def _pass_until(self, arrival: int) -> None:
        self._woken.clear()
        while (left := arrival - self.elapsed()) > 0:
            if self._aborts:
                self.now = max(self.now, arrival - left)
                return
            self._sleep(left / 1e9)
        self.now = arrival

    def _lag(self, request: Request) -> int:
        return max(0, self.elapsed() - request.arrival)


class _WallControl:
    """The control plane's share of the wall clock: all that the data plane doesn't account for."""

    def __init__(self, run: OnlineRun) -> None:
        self._run = run

    def start(self) -> None:
        """Counting goes on from where the run's clock stands."""

    def plan_ns(self, plan: StepPlan) -> int:
        return max(0, self._run.elapsed() - plan.now)

    def commit_ns(self, plan: StepPlan) -> int:
        return max(0, self._run.elapsed() - self._run.now)
