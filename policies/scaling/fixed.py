"""fixed: as many replicas as at the start."""

from __future__ import annotations

from lab.policy import FleetView, ScalingPolicy


class Fixed(ScalingPolicy):
    """O(1)."""

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        return fleet.least, "fixed"
