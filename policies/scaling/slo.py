"""slo: more replicas when objectives are missed, or will be; fewer after a time of ease.

Rule: up, unless one is starting, if less than `attainment` of those that ended in the last `window_s` met their
objectives (one more), or the backlog's time exceeds `ttft_ms` (in proportion). Down by one after `down_s` of ease:
attainment held, and one replica less would have had the backlog done in half of `ttft_ms`.
Origin: SLO-driven autoscaling; the backlog as early sign, as in Chiron (2501.08090). Wins: looks at what is promised.
Loses: attainment is late news; a cold start long against `ttft_ms` comes too late anyway. Cost: O(replicas) a look.
"""

from __future__ import annotations

import math
from collections import deque

from lab.policy import FleetView, ScalingPolicy
from policies.backlog import backlog_time
from policies.scaling.common import nanoseconds


class Slo(ScalingPolicy):
    """`attainment`: share to reach; who is turned away at the gateway counts as missed."""

    def __init__(
        self,
        attainment: float = 0.95,
        ttft_ms: float = 2000.0,
        window_s: float = 30.0,
        down_s: float = 60.0,
        interval_s: float = 1.0,
    ) -> None:
        if not 0 < attainment <= 1:
            raise ValueError(f"attainment is {attainment}; expected a share above 0, at most 1")
        if not 0 < ttft_ms < math.inf:
            raise ValueError(f"ttft_ms is {ttft_ms}; expected a finite number above 0")
        self._attainment, self._limit = attainment, ttft_ms * 1e6
        self._window, self._down = nanoseconds("window_s", window_s), nanoseconds("down_s", down_s)
        self.interval = nanoseconds("interval_s", interval_s, least=1)
        self._ended: deque[tuple[int, int, int]] = deque()
        self._strained = 0

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        ready = len(fleet.replicas)
        current = ready + fleet.starting
        self._ended.append((now, fleet.finished + fleet.rejected, fleet.met))
        while now - self._ended[0][0] > self._window:
            self._ended.popleft()
        finished, met = (sum(column) for column in list(zip(*self._ended, strict=True))[1:])
        share = met / finished if finished else 1.0
        backlog = sum(backlog_time(replica, 0) for replica in fleet.replicas)
        reason = f"{share:.1%} within objectives, backlog {backlog / ready / 1e6:.0f} ms a replica"
        late = share < self._attainment
        if late or backlog > self._limit / 2 * max(ready - 1, 1):
            self._strained = now
        if not fleet.starting and (late or backlog > self._limit * ready):
            self._ended.clear()  # what ended so far says nothing about the larger fleet
            return max(current + 1, math.ceil(backlog / self._limit)), reason
        if now - self._strained >= self._down and current > fleet.least:
            self._strained = now
            return current - 1, reason
        return current, reason
