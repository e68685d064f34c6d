"""Time, by SimPy: one process for the arrivals, one for each replica. Request path.

SimPy's clock is the run's clock: integer nanoseconds. At equal times arrivals come first, as they do in the
real engine's stepped clock, so that both see the same order of events.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from lab.control.core import EngineCore
from lab.control.gateway import Gateway
from lab.control.loop import IDLE, serve
from lab.control.request import Request
from sim.executor import SimExecutor

Progress = Callable[[EngineCore, int], None]


class Simulation:
    """One replica behind a gateway, fed from a list of requests in order of arrival."""

    def __init__(
        self,
        gateway: Gateway,
        core: EngineCore,
        executor: SimExecutor,
        requests: Sequence[Request],
        progress: Progress | None = None,
    ) -> None:
        self._env = simpy.Environment()
        self._gateway, self._core, self._executor = gateway, core, executor
        self._requests = requests
        self._next = 0
        self._progress = progress
        self._idle: simpy.Event | None = None

    @property
    def now(self) -> int:
        return int(self._env.now)

    def run(self) -> None:
        """Until every request has ended. Raises what the policy or the cost model raises."""
        self._env.process(self._arrivals())
        replica = self._env.process(self._replica())
        self._env.run(until=replica)

    def _arrivals(self) -> Generator[simpy.Event, Any, None]:
        env, requests = self._env, self._requests
        while self._next < len(requests):
            wait = requests[self._next].arrival - env.now
            if wait > 0:
                yield env.timeout(wait)
            while self._next < len(requests) and requests[self._next].arrival <= env.now:
                request = requests[self._next]
                self._next += 1
                self._gateway.submit(request, int(env.now))
            if self._idle is not None:
                self._idle.succeed()
                self._idle = None

    def _replica(self) -> Generator[simpy.Event, Any, None]:
        env, core = self._env, self._core
        for wait in serve(core, self._executor, self._executor, lambda: int(env.now)):
            if wait == IDLE:
                if self._next == len(self._requests):
                    if core.has_work:
                        raise core.stalled()
                    return
                self._idle = env.event()
                yield self._idle
                continue
            yield env.timeout(wait)
            if self._next < len(self._requests) and self._requests[self._next].arrival == env.now:
                # The arrival process is due at this very instant; let it go first.
                yield env.timeout(0)
            if self._progress is not None:
                self._progress(core, int(env.now))
