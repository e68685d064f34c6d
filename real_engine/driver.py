"""Time, for the real engine: the stepped clock. Request path.

Measured step durations advance a virtual clock and arrivals are injected in virtual time: idle gaps cost
nothing, and batching depends on durations alone. Made for machines where an open-loop load in wall time would
mostly measure the load generator. The wall clock is `real_engine/online.py`, recorded plans `replay.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lab.assembly import ControlPlane
from lab.control.clock import ControlTimer, MeasuredControl
from lab.control.core import EngineCore
from lab.control.executor import Executor
from lab.control.loop import IDLE, serve
from lab.control.request import Request, RequestId

Progress = Callable[[EngineCore, int], None]


class SteppedRun:
    """One replica behind a gateway, fed from a list of requests in order of arrival.

    `timer` says what the control plane itself takes; by default it is measured.
    """

    def __init__(
        self,
        control: ControlPlane,
        executor: Executor,
        requests: Sequence[Request],
        progress: Progress | None = None,
        timer: ControlTimer | None = None,
    ) -> None:
        self._gateway, self._core, self._executor = control.gateway, control.core, executor
        self._requests = requests
        self._progress = progress
        self._timer = timer or MeasuredControl()
        self._next = 0
        self._aborts: deque[RequestId] = deque()
        self.now = 0

    def run(self) -> None:
        """Until every request has ended. Raises what the policy or the executor raises."""
        core = self._core
        loop = serve(core, self._executor, self._timer, lambda: self.now)
        self._take_in()
        while core.has_work or self._next < len(self._requests):
            wait = next(loop)
            if wait == IDLE:
                if self._next == len(self._requests):
                    raise core.stalled()
                self._pass_until(self._requests[self._next].arrival)
            else:
                self.now += wait
                if self._progress is not None:
                    self._progress(core, self.now)
            self._take_in()

    def abort(self, request: RequestId) -> None:
        """Its sender gave up: it ends between two steps. May be called from any thread, and for one that is gone."""
        self._aborts.append(request)

    def _pass_until(self, arrival: int) -> None:
        """Nothing to do until then."""
        self.now = arrival

    def _lag(self, request: Request) -> int:
        """How long it took until this request is taken in; a virtual clock waits for nobody."""
        return 0

    def _take_in(self) -> None:
        while self._next < len(self._requests) and self._requests[self._next].arrival <= self.now:
            request = self._requests[self._next]
            self._next += 1
            self._gateway.submit(request, request.arrival, self._lag(request))
        while self._aborts:
            self._core.abort(self._aborts.popleft(), self.now)
