"""queue_threshold: one replica more when queues are long, one less when they are short.

Rule: waiting requests for each replica that is ready or starting: above `up` one more; below `down` one less, if what
is there would find slots without it. At least `up_cooldown_s`, or `down_cooldown_s`, after the last change.
Origin: step scaling of cloud autoscalers. Wins: simple; two thresholds don't flap. Loses: one at a time is slow for
bursts; sees nothing until there is a queue. Cost: O(replicas) a look.
"""

from __future__ import annotations

from lab.policy import FleetView, ScalingPolicy
from policies.scaling.common import nanoseconds


class QueueThreshold(ScalingPolicy):
    """`up` and `down` in waiting requests a replica; times in seconds."""

    def __init__(
        self,
        up: float = 4.0,
        down: float = 1.0,
        up_cooldown_s: float = 5.0,
        down_cooldown_s: float = 30.0,
        interval_s: float = 1.0,
    ) -> None:
        if not 0 <= down < up:
            raise ValueError(f"down is {down}; expected at least 0, and below up, {up}")
        self._up, self._down = up, down
        self._up_cooldown = nanoseconds("up_cooldown_s", up_cooldown_s)
        self._down_cooldown = nanoseconds("down_cooldown_s", down_cooldown_s)
        self.interval = nanoseconds("interval_s", interval_s, least=1)
        self._changed: int | None = None

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        current = len(fleet.replicas) + fleet.starting
        waiting = sum(replica.waiting for replica in fleet.replicas) / current
        reason = f"{waiting:.2f} waiting a replica"
        since = now if self._changed is None else now - self._changed
        slots = sum(replica.max_seqs for replica in fleet.replicas) / len(fleet.replicas)
        spare = sum(replica.requests for replica in fleet.replicas) <= slots * (current - 1)
        change = 0
        if waiting > self._up and (self._changed is None or since >= self._up_cooldown):
            change = 1 if current < fleet.most else 0
        elif waiting < self._down and spare and since >= self._down_cooldown:
            change = -1 if current > fleet.least else 0
        if change:
            self._changed = now
        return current + change, reason
