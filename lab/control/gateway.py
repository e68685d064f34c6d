"""The front door: every request enters through `Gateway.submit`. Request path, control plane.

Admission decides whether it enters at all, routing decides which replica serves it. Both are policies and
see only `ReplicaView`s, which say how old they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.control.blame import blame
from lab.control.core import EngineCore
from lab.control.observer import Decision, Interval, Observer, RequestRecord
from lab.control.request import Request
from lab.errors import PolicyError, RequestRefused
from lab.policy import AdmissionPolicy, RoutingPolicy


class Gateway:
    """Admission and routing over one or more replicas."""

    def __init__(
        self,
        admission: AdmissionPolicy,
        routing: RoutingPolicy,
        replicas: Sequence[EngineCore],
        observer: Observer | None = None,
    ) -> None:
        self._admission, self._routing, self._replicas = admission, routing, replicas
        self._observer = observer or Observer()

    def submit(self, request: Request, now: int) -> Decision:
        """Admit, route and enqueue; a request that is turned away is recorded as rejected, with the reason."""
        views = [core.view(now) for core in self._replicas]
        try:
            verdict = self._admission.admit(request, views, now)
        except Exception as error:
            raise blame(
                error, f"admission policy '{type(self._admission).__name__}'", f"request '{request.id}'"
            ) from error
        if not verdict.admit:
            return self._turn_away(request, Decision(False, verdict.reason), verdict.reason, now)
        try:
            replica, why = self._routing.route(request, views, now)
        except Exception as error:
            raise blame(
                error, f"routing policy '{type(self._routing).__name__}'", f"request '{request.id}'"
            ) from error
        if not 0 <= replica < len(self._replicas):
            raise PolicyError(
                f"routing policy '{type(self._routing).__name__}' sent request '{request.id}' to replica "
                f"{replica}; expected 0 to {len(self._replicas) - 1}"
            )
        decision = Decision(True, verdict.reason, replica, why)
        try:
            self._replicas[replica].add(request, now, decision)
        except RequestRefused as refusal:
            reason = f"{refusal.reason} (needs {refusal.needed}, has {refusal.available})"
            return self._turn_away(request, Decision(False, "never fits", replica, why), reason, now)
        return decision

    def _turn_away(self, request: Request, decision: Decision, reason: str, now: int) -> Decision:
        self._observer.on_request(
            RequestRecord(
                request=request,
                seq=-1,
                decision=decision,
                outcome="rejected",
                reason=reason,
                end=now,
                cached_tokens=0,
                cached_blocks=0,
                computed_tokens=0,
                preemptions=0,
                token_times=(),
                intervals=(Interval("queue", request.arrival, now, "arrival"),),
                output=(),
            )
        )
        return decision
