"""What adaptive concurrency limits share: how many requests are in flight, and the limit on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lab.policy import AdmissionPolicy, Ended, ReplicaView, Request, Verdict

Latency = Literal["ttft", "e2e"]


class ConcurrencyLimit(AdmissionPolicy):
    """Admits while fewer requests than `limit` are in flight; `react` moves the limit by how each one ended."""

    def __init__(self, start: int, least: int, most: int, latency: Latency) -> None:
        if not 1 <= least <= start <= most:
            raise ValueError(
                f"start is {start}; expected 1 <= least <= start <= most, and these are {least}, {most}"
            )
        self.limit: float = start
        self.in_flight = 0
        self._least, self._most, self._ttft = least, most, latency == "ttft"

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        if self.in_flight >= int(self.limit):
            return Verdict(False, f"{self.in_flight} in flight, the limit is {int(self.limit)}")
        self.in_flight += 1
        return Verdict(True, f"{self.in_flight} in flight, the limit is {int(self.limit)}")

    def on_finish(self, request: Request, ended: Ended, now: int) -> None:
        dropped = ended.outcome != "finished"
        latency = ended.e2e if ended.ttft is None or not self._ttft else ended.ttft
        self.limit = min(max(self.react(latency, dropped), self._least), self._most)
        self.in_flight -= 1

    def react(self, latency: int, dropped: bool) -> float:
        """The new limit, before it is cut to its bounds. `in_flight` still counts the request that ended."""
        raise NotImplementedError
