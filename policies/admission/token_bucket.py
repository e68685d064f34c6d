"""token_bucket: a steady rate, with bursts up to the bucket's size.

Rule: the bucket fills at `rate` a second up to `burst`; a request enters if its cost is there, and takes it. Over any
time t no more than burst + rate * t enters. The cost is 1, or the prompt's tokens.
Origin: traffic shaping (leaky bucket as a meter, Turner 1986); API gateways. Wins: a bound that holds whatever comes.
Loses: turns away while replicas idle, and admits while they drown: it sees no load. Cost: O(1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lab.policy import AdmissionPolicy, ReplicaView, Request, Verdict


class TokenBucket(AdmissionPolicy):
    """`rate` a second and `burst`, both in units of `cost`. Full at the beginning."""

    def __init__(
        self, rate: float = 10.0, burst: float = 20.0, cost: Literal["requests", "tokens"] = "requests"
    ) -> None:
        for name, value in (("rate", rate), ("burst", burst)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a finite number above 0")
        self._rate, self._burst, self._in_tokens = rate, burst, cost == "tokens"
        self._level, self._at = burst, 0

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        self._level = min(self._burst, self._level + self._rate * (now - self._at) / 1e9)
        self._at = now
        price = len(request.prompt) if self._in_tokens else 1
        if price > self._burst:
            return Verdict(False, f"costs {price}, the bucket holds {self._burst:g}")
        if price > self._level:
            return Verdict(False, f"costs {price}, the bucket has {self._level:.2f}")
        self._level -= price
        return Verdict(True, f"the bucket keeps {self._level:.2f}")
