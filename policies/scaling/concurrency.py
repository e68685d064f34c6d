"""concurrency: as many replicas as give each its target number of requests.

Rule: ceil(n * x / `per_replica`) with x the mean requests of the n replicas, those that start included; n itself while
x is within `tolerance` of the target. What the last `up_s` (`down_s`) seconds all asked for at least (at most) counts.
Origin: Kubernetes' Horizontal Pod Autoscaler; Knative's concurrency target. Wins: jumps to what is needed at once.
Loses: requests differ in size; the target needs measuring. Cost: O(replicas) a look.
"""

from __future__ import annotations

import math
from collections import deque

from lab.policy import FleetView, ScalingPolicy
from policies.scaling.common import nanoseconds


class Concurrency(ScalingPolicy):
    """`per_replica`: requests, waiting and running. `up_s`, `down_s`: stabilisation windows in seconds."""

    def __init__(
        self,
        per_replica: float = 16.0,
        tolerance: float = 0.1,
        up_s: float = 0.0,
        down_s: float = 60.0,
        interval_s: float = 1.0,
    ) -> None:
        if not 0 < per_replica < math.inf:
            raise ValueError(f"per_replica is {per_replica}; expected a finite number above 0")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance is {tolerance}; expected a finite number, at least 0")
        self._target, self._tolerance = per_replica, tolerance
        self._up, self._down = nanoseconds("up_s", up_s), nanoseconds("down_s", down_s)
        self.interval = nanoseconds("interval_s", interval_s, least=1)
        self._asked: deque[tuple[int, int]] = deque()

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        current = len(fleet.replicas) + fleet.starting
        requests = sum(replica.requests for replica in fleet.replicas)
        ratio = requests / (current * self._target)
        wanted = current if abs(ratio - 1) <= self._tolerance else math.ceil(requests / self._target)
        wanted = min(max(wanted, fleet.least), fleet.most)
        self._asked.append((now, wanted))
        while now - self._asked[0][0] > max(self._up, self._down):
            self._asked.popleft()
        low = min(asked for at, asked in self._asked if now - at <= self._up)
        high = max(asked for at, asked in self._asked if now - at <= self._down)
        return min(max(current, low), high), f"{requests} requests want {wanted} replicas"
