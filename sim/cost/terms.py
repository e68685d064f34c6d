"""What a step's time is made of, by name. Data plane."""

from __future__ import annotations

from typing import NamedTuple

from lab.control.plan import StepTiming


class StepCost(NamedTuple):
    """Seconds of one step, one term after another."""

    weights: float = 0.0
    """Linear layers and the LM head: bound by reading their weights, or by their arithmetic."""
    attention: float = 0.0
    """Attention of prompt chunks."""
    kv_read: float = 0.0
    """Attention of single tokens: as good as nothing but reading their KV."""
    collectives: float = 0.0
    """Devices waiting for each other's data."""
    host: float = 0.0
    """Launching and preparing, where it isn't hidden."""
    transfer: float = 0.0
    """KV on its way between device and host."""

    @property
    def total(self) -> float:
        return sum(self)

    def timing(self) -> StepTiming:
        """As phases of a step, in nanoseconds: the host's share is `prepare`, the transfer its own, and the rest
        `forward`."""
        forward = self.weights + self.attention + self.kv_read + self.collectives
        terms = tuple([round(term * 1e9) for term in self])
        return StepTiming(
            0, round(self.host * 1e9), round(forward * 1e9), 0, 0, round(self.transfer * 1e9), 0, terms
        )
