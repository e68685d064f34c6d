"""Plays a workload on a few replicas, with an admission, routing or scaling policy under test. Observation path.

Time goes in ticks of 1 ms, in which every replica takes one step. What the policies see is as old as the
case says, and replicas are named by indices that aren't their positions.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from lab.control.core import EngineCore
from lab.control.observer import Observer, RequestRecord
from lab.control.plan import StepResult, StepTiming
from lab.control.request import Request
from lab.errors import RequestRefused
from lab.policy import Ended, FleetView, ReplicaView, Verdict
from lab.testing.cases import MS, Case
from lab.testing.contracts import Broken
from lab.testing.play import Decided, engine
from lab.testing.standin import watched
from lab.testing.watch import Watch, judged

INTERVAL, COLD_START = 5, 12
"""Ticks between two looks of a scaling policy, and until a replica that it wants is ready."""
LEAST, MOST = 1, 4


class _Fleet(Observer):
    """The replicas, what was seen of them at each tick, and what the policies are told of the ends."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.cores: dict[int, EngineCore] = {}
        self.seen: deque[dict[int, ReplicaView]] = deque(maxlen=case.stale + 1)
        self.requests = [request for _, request in case.made()]
        self.told: list[tuple[Request, Ended, int]] = []
        self.ended = 0
        for index in case.replicas:
            self.start(index)

    def start(self, index: int) -> None:
        core = self.cores[index] = engine(self.case, {}, self, index)

        def ended(record: RequestRecord, now: int) -> None:
            arrival = record.request.arrival
            ttft = record.token_times[0] - arrival if record.token_times else None
            tokens = len(record.token_times)
            said = Ended(record.outcome, core.replica, ttft, record.end - arrival, tokens)
            self.told.append((record.request, said, now))
            self.ended += 1

        core.on_ended = ended

    def look(self, now: int) -> None:
        self.seen.append({index: core.view(now) for index, core in self.cores.items()})

    def views(self) -> list[ReplicaView]:
        """Those that are there now, as they were when last heard of."""
        old, new = self.seen[0], self.seen[-1]
        return [old.get(index, new[index]) for index in self.cores]

    def tick(self, now: int) -> None:
        for core in self.cores.values():
            plan = core.plan(now)
            if plan:
                core.commit(plan, StepResult((0,) * sum(w.samples for w in plan.work)), now + MS)
                core.observe(StepTiming(0, MS, 0, 0, 0))


def play_fleet(case: Case, watch: Watch, salt: int = 0) -> list[Decided]:
    """Serve a case to its end and return every answer. Raises `Broken`."""
    with judged(watch):
        stand_in = watched(watch)
    fleet = _Fleet(case)
    todo = case.made(salt)
    aborts = [(ask.abort * MS, request) for ask, request in todo if ask.abort is not None]
    entered: set[str] = set()
    said: list[Decided] = []
    last = max(request.arrival for _, request in todo) + 4 * INTERVAL * MS
    looks = _Scaling(fleet, stand_in, watch) if watch.kind == "scaling" else None
    now = 0
    while todo or now <= last or any(core.has_work for core in fleet.cores.values()):
        fleet.look(now)
        while todo and todo[0][1].arrival <= now:
            _, request = todo.pop(0)
            replica = _enter(fleet, stand_in, watch, request, now, said)
            try:
                if replica is not None:
                    fleet.cores[replica].add(request, now)
                    entered.add(str(request.id))
            except RequestRefused:
                pass
        for item in [a for a in aborts if a[0] <= now]:
            aborts.remove(item)
            for core in fleet.cores.values():
                core.abort(item[1].id, now)
        if looks is not None and now % (INTERVAL * MS) == 0:
            said.append(looks.look(now))
        fleet.tick(now)
        now += MS
        _tell(fleet, stand_in, watch)
    return said


def _tell(fleet: _Fleet, stand_in: Any, watch: Watch) -> None:
    told, fleet.told = fleet.told, []
    if hasattr(stand_in, "on_finish"):
        for request, ended, when in told:
            with judged(watch):
                stand_in.on_finish(request, ended, when)


def _enter(
    fleet: _Fleet, stand_in: Any, watch: Watch, request: Request, now: int, said: list[Decided]
) -> int | None:
    """The replica that a request goes to, or None where it is turned away."""
    views = fleet.views()
    before = tuple(views)
    replica = min(fleet.cores)
    if watch.kind == "admission":
        with judged(watch):
            verdict = stand_in.admit(request, views, now)
        if not isinstance(verdict, Verdict) or not isinstance(verdict.admit, bool):
            _wrong(watch, "admit", verdict, "a Verdict(admit=True or False, reason=...)")
        _reason(watch, "admit", verdict.reason)
        said.append((str(request.id), verdict))
        if not verdict.admit:
            return None
    if watch.kind == "routing":
        with judged(watch):
            answer = stand_in.route(request, views, now)
        if not isinstance(answer, tuple) or len(answer) != 2:
            _wrong(watch, "route", answer, "(index of a replica, reason)")
        replica = answer[0]
        if not _is_int(replica) or replica not in fleet.cores:
            known = ", ".join(str(index) for index in fleet.cores)
            _wrong(watch, "route", replica, f"the `index` of one of the replicas given ({known})")
        _reason(watch, "route", answer[1])
        said.append((str(request.id), answer))
    if tuple(views) != before:
        raise Broken("views", f"{watch.hook} changed the list of replicas", watch.defined(watch.hook))
    return replica


class _Scaling:
    """Brings replicas up, each after a cold start, and takes idle ones down, as a scaling policy wishes."""

    def __init__(self, fleet: _Fleet, policy: Any, watch: Watch) -> None:
        self.fleet, self.policy, self.watch = fleet, policy, watch
        self.starting: dict[int, int] = {}
        self.arrived = 0

    def look(self, now: int) -> Decided:
        fleet, starting = self.fleet, self.starting
        for index in [i for i, ready in starting.items() if ready <= now]:
            del starting[index]
            fleet.start(index)
        fleet.look(now)
        arrived = sum(request.arrival <= now for request in fleet.requests)
        seen = FleetView(
            replicas=tuple(fleet.views()),
            starting=len(starting),
            draining=0,
            least=LEAST,
            most=MOST,
            arrived=arrived - self.arrived,
            finished=fleet.ended,
            met=fleet.ended // 2,
        )
        self.arrived, fleet.ended = arrived, 0
        with judged(self.watch):
            answer = self.policy.target(seen, now)
        if not isinstance(answer, tuple) or len(answer) != 2 or not _is_int(answer[0]):
            _wrong(self.watch, "target", answer, "(number of replicas, reason)")
        _reason(self.watch, "target", answer[1])
        more = min(max(answer[0], LEAST), MOST) - len(fleet.cores) - len(starting)
        first = max([*fleet.cores, *starting]) + 1
        starting.update((first + number, now + COLD_START * MS) for number in range(more))
        idle = [i for i, core in reversed(fleet.cores.items()) if not core.has_work]
        for index in idle[: max(min(-more, len(fleet.cores) - 1), 0)]:
            del fleet.cores[index]
        return (now, answer)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _reason(watch: Watch, hook: str, reason: object) -> None:
    if not isinstance(reason, str) or not reason.strip():
        _wrong(watch, hook, reason, "a reason in words: it is recorded with every decision")


def _wrong(watch: Watch, hook: str, value: object, expected: str) -> None:
    raise Broken("answer", f"{hook} answered {value!r}; expected {expected}", watch.defined(hook))
