"""slo_reject: turn away at once who would miss the time to first token anyway.

Rule: foresee the TTFT on each replica: full steps for what is to be computed there and for this prompt's uncached
tokens; with `foresee=slots` also, where all slots are taken, steps for enough of those before it to end. Reject if
even the least is above `factor` times the request's objective. Without an objective or an estimate yet: admit.
Origin: early rejection of Mooncake (FAST'25). Wins: goodput in overload: nobody computes what comes too late.
Loses: in overload all enter at the very edge, so an estimate too low by little makes all late: hence the margin.
Cost: O(replicas) look-ups of the prompt's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lab.policy import AdmissionPolicy, ReplicaView, Request, Verdict
from policies.backlog import backlog_time


class SloReject(AdmissionPolicy):
    """`foresee`: prefill alone, or the wait for a slot as well."""

    def __init__(self, factor: float = 0.9, foresee: Literal["prefill", "slots"] = "slots") -> None:
        if not 0 < factor < float("inf"):
            raise ValueError(f"factor is {factor}; expected a finite number above 0")
        self._factor, self._slots = factor, foresee == "slots"

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        if request.ttft_slo is None:
            return Verdict(True, "no objective")
        best = min(self._ttft(request, replica) for replica in replicas)
        if best > self._factor * request.ttft_slo:
            return Verdict(False, f"first token foreseen after {best / 1e6:.0f} ms")
        return Verdict(True, f"first token foreseen after {best / 1e6:.0f} ms" if best else "no estimate yet")

    def _ttft(self, request: Request, replica: ReplicaView) -> float:
        time = backlog_time(replica, len(request.prompt) - replica.cached(request))
        if self._slots and replica.requests >= replica.max_seqs:
            # One must end for each of those ahead, and for this one: after a mean output, max_seqs have ended.
            steps = replica.tokens_expected / replica.requests * (replica.waiting + 1) / replica.max_seqs
            time += steps * replica.estimate(0, replica.running, replica.context_tokens)
        return time
