"""The front door: every request enters through `Gateway.submit`. Request path, control plane.

Admission decides whether it enters at all, routing decides which replica serves it. Both are policies, see
only `ReplicaView`s, which say how old they are, and are told how what they let in ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lab.control.blame import blame
from lab.control.fleet import Fleet
from lab.control.live import LiveRequest
from lab.control.observer import Decision, Interval, Observer, Outcome, RequestRecord
from lab.control.request import Request, RequestId
from lab.errors import PolicyError, RequestRefused
from lab.policy import AdmissionPolicy, Ended, ReplicaView, RoutingPolicy, Verdict


@dataclass(slots=True)
class _Group:
    """A request with several outputs: policies decided once on it, and hear once of it."""

    request: Request
    records: list[RequestRecord] = field(default_factory=list)

    def ended(self) -> Ended:
        """Finished if every sequence was; else as the first that wasn't."""
        records, arrival = self.records, self.request.arrival
        unlike = [record for record in records if record.outcome != "finished"]
        firsts = [record.token_times[0] for record in records if record.token_times]
        return Ended(
            (unlike or records)[0].outcome,
            records[0].decision.replica,
            min(firsts) - arrival if firsts else None,
            records[-1].end - arrival,
            sum(len(record.token_times) for record in records),
        )


class Gateway:
    """Admission and routing over the replicas of a fleet."""

    def __init__(
        self,
        admission: AdmissionPolicy,
        routing: RoutingPolicy,
        fleet: Fleet,
        observer: Observer | None = None,
        placing: RoutingPolicy | None = None,
    ) -> None:
        """`placing`: routes requests that have their first token, where others decode than prefill."""
        self._admission, self._routing, self._fleet = admission, routing, fleet
        self._placing = placing
        self._observer = observer or Observer()
        self._groups: dict[RequestId, _Group] = {}
        """Requests with several outputs whose feedback isn't complete."""
        # Feedback costs a call per request, so policies that don't listen are never told.
        self._listeners: list[tuple[str, Callable[..., Any]]] = []
        if type(admission).on_finish is not AdmissionPolicy.on_finish:
            self._listeners.append((self._named("admission", admission), admission.on_finish))
        if type(routing).on_finish is not RoutingPolicy.on_finish:
            self._listeners.append((self._named("routing", routing), routing.on_finish))
        self._promised: dict[RequestId, int] = {}
        """Where requests that prefill will decode, if they were placed early and somebody will hear how they end."""
        self._placed: Callable[..., Any] | None = None
        if placing is not None and type(placing).on_finish is not RoutingPolicy.on_finish:
            self._placed = placing.on_finish

    def submit(self, request: Request, now: int, ingest_lag: int = 0) -> Decision:
        """Admit, route and enqueue; a request that is turned away is recorded as rejected, with the reason.

        `ingest_lag` is how long after `now`, the arrival, this is called by the wall clock: noted, not acted on.
        """
        self._fleet.arrived()
        views = self._fleet.views(now)
        try:
            admit: Any = self._admission.admit
            verdict = admit(request, views, now)
        except Exception as error:
            raise blame(error, self._named("admission", self._admission), _about(request)) from error
        if not isinstance(verdict, Verdict):
            who = self._named("admission", self._admission)
            raise PolicyError(
                f"{who} answered {verdict!r} for {_about(request)}; expected a Verdict(admit, reason)"
            )
        if not verdict.admit:
            refused = Decision(False, verdict.reason, ingest_lag=ingest_lag)
            return self._turn_away(request, refused, verdict.reason, now)
        candidates = self._able(views, "prefill")
        if not candidates:
            refused = Decision(False, "no replica is up", ingest_lag=ingest_lag)
            return self._turn_away(request, refused, "no replica is up", now)
        replica, why = self._route(self._routing, request, candidates, now)
        core = self._fleet.ready(replica)
        assert core is not None  # checked by _route
        decision = Decision(True, verdict.reason, replica, why, ingest_lag)
        if request.n > 1:
            self._groups[request.id] = _Group(request)
        try:
            self._check_decoding(request, views)
            core.add(request, now, decision)
        except RequestRefused as refusal:
            self._groups.pop(request.id, None)
            # Both policies had let it pass, and may be counting what is in flight.
            self._tell(request, Ended("rejected", replica, None, now - request.arrival, 0), now)
            reason = f"{refusal.reason} (needs {refusal.needed}, has {refusal.available})"
            refused = Decision(False, "never fits", replica, why, ingest_lag)
            return self._turn_away(request, refused, reason, now)
        return decision

    def place(self, request: Request, now: int, early: bool = False) -> tuple[int, str] | None:
        """Which replica decodes a request that has its first token, and why; None while there is none. `early`: that
        is being computed up to there."""
        assert self._placing is not None
        views = self._able(self._fleet.views(now), "decode")
        found = self._route(self._placing, request, views, now) if views else None
        if early and self._placed is not None and found is not None:
            self._promised[request.id] = found[0]
        return found

    def again(self, request: Request, now: int) -> tuple[int, str] | None:
        """Which replica takes a request whose own is lost; None while there is none."""
        views = self._able(self._fleet.views(now), "prefill")
        return self._route(self._routing, request, views, now) if views else None

    def lose(self, live: LiveRequest, outcome: Outcome, reason: str, now: int) -> None:
        """A request that is at no replica ends there."""
        record = live.record(outcome, reason, now)
        self._observer.on_request(record)
        if outcome != "unfinished":
            self.ended(record, now)

    def _able(self, views: Sequence[ReplicaView], role: str) -> list[ReplicaView]:
        """Those that do what is asked for."""
        if not self._fleet.spec.roles:
            return list(views)
        return [view for view in views if view.role in (role, "mixed")]

    def _check_decoding(self, request: Request, views: Sequence[ReplicaView]) -> None:
        """Raises `RequestRefused` where a replica that may have to decode the request could never hold it."""
        for view in views if self._placing is not None else ():
            core = self._fleet.ready(view.index) if view.role == "decode" else None
            if core is not None and (refusal := core.refusal(request)) is not None:
                raise refusal

    def ended(self, record: RequestRecord, now: int) -> None:
        """A request that was let in has ended: told to the policies that want to know, and to the fleet."""
        group = self._groups.get(record.request.parent) if record.request.parent else None
        if group is not None:
            group.records.append(record)
            if len(group.records) == group.request.n:
                del self._groups[group.request.id]
                self._fleet.ended(all(part.met_objectives for part in group.records))
                if self._listeners:
                    self._tell(group.request, group.ended(), now)
            return
        self._fleet.ended(record.met_objectives)
        if not (self._listeners or self._placed):
            return
        arrival, times = record.request.arrival, record.token_times
        ttft = times[0] - arrival if times else None
        ended = Ended(record.outcome, record.decision.replica, ttft, record.end - arrival, len(times))
        self._tell(record.request, ended, now)
        if self._placed is None:
            return
        at = self._promised.pop(record.request.id, None)
        if record.transfers:
            at = record.transfers[-1].destination
        if at is not None:
            try:
                self._placed(record.request, replace(ended, replica=at), now)
            except Exception as error:
                who = self._named("routing", self._placing)
                raise blame(error, who, f"in on_finish, request '{record.request.id}'") from error

    def _tell(self, request: Request, ended: Ended, now: int) -> None:
        for who, listener in self._listeners:
            try:
                listener(request, ended, now)
            except Exception as error:
                raise blame(error, who, f"in on_finish, request '{request.id}'") from error

    def _route(
        self, routing: RoutingPolicy, request: Request, views: list[ReplicaView], now: int
    ) -> tuple[int, str]:
        try:
            route: Any = routing.route  # it may answer anything
            answer = route(request, views, now)
        except Exception as error:
            raise blame(error, self._named("routing", routing), _about(request)) from error
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], int)):
            raise PolicyError(
                f"{self._named('routing', routing)} answered {answer!r} for {_about(request)}; expected "
                "(replica index, reason)"
            )
        if answer[0] not in [view.index for view in views] or self._fleet.ready(answer[0]) is None:
            known = ", ".join(str(view.index) for view in views)
            raise PolicyError(
                f"{self._named('routing', routing)} sent {_about(request)} to replica {answer[0]}; expected one "
                f"of: {known}"
            )
        return answer[0], str(answer[1])

    @staticmethod
    def _named(kind: str, policy: object) -> str:
        return f"{kind} policy '{type(policy).__name__}'"

    def _turn_away(self, request: Request, decision: Decision, reason: str, now: int) -> Decision:
        self._fleet.rejected()
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


def _about(request: Request) -> str:
    return f"request '{request.id}'"
