"""What a recorded run tells a simulator: its durations, its capacity, its outputs. Data plane."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lab import topology
from lab.choices import SHAPED
from lab.control.executor import Capacity
from lab.control.fleet import IN_PLACE_OF
from lab.control.plan import StepTiming
from lab.control.request import RequestId
from lab.errors import ReplayError
from lab.topology import Slot
from sim.cost.replay import RecordedCost
from sim.executor import Output

if TYPE_CHECKING:
    from lab.analysis.runs import Run


def recorded_cost(run: Run) -> RecordedCost:
    """The durations of a recorded run as a cost model."""
    return _cost(_steps(run), _cut_off(run))


def recorded_costs(run: Run, places: Sequence[Slot]) -> list[RecordedCost]:
    """The same for each place of a topology: the steps of the group of its name, else of its role, else all."""
    rows, own, cut = _steps(run), _places(run), _cut_off(run)
    made: dict[Slot, RecordedCost] = {}
    for kind in dict.fromkeys(Slot(place.group, place.role) for place in places):
        lent = rows, cut
        for same in ("role", "group"):
            named = {replica for replica, slot in own.items() if getattr(slot, same) == getattr(kind, same)}
            alike = [row for row in rows if row.replica in named]
            if alike:
                lent = alike, {replica: cut[replica] for replica in cut if replica in named}
        made[kind] = _cost(*lent)
    return [made[Slot(place.group, place.role)].another(replica) for replica, place in enumerate(places)]


class _Step(NamedTuple):
    replica: int
    digest: str
    timing: StepTiming
    shape: tuple[int, int, int]


def _steps(run: Run) -> list[_Step]:
    columns = ("replica", "digest", "prefill_tokens", "decode_tokens", "context_tokens")
    replicas, digests, *shapes = run.step_columns(*columns)
    return list(map(_Step, replicas, digests, run.timings(), zip(*shapes, strict=True)))


def _cost(rows: Sequence[_Step], cut: Mapping[int, Mapping[str, StepTiming]]) -> RecordedCost:
    return RecordedCost(
        [row.digest for row in rows],
        [row.timing for row in rows],
        [row.shape for row in rows],
        [row.replica for row in rows],
        cut,
    )


def _cut_off(run: Run) -> dict[int, dict[str, StepTiming]]:
    """How long steps would have taken that failures cut off, by replica and digest."""
    found: dict[int, dict[str, StepTiming]] = {}
    if not (run.config.get("fleet") or {}).get("failures"):
        return found
    try:
        lost = json.loads((run.path / "cost.json").read_text(encoding="utf-8"))["lost_steps"]
        for replica, digest, took in lost:
            found.setdefault(int(replica), {})[digest] = StepTiming(0, 0, int(took), 0, 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReplayError(
            f"run '{run.path}' has failures and doesn't say in cost.json how long the steps were that they cut off; "
            "was it written by another version?"
        ) from error
    return found


def _places(run: Run) -> dict[int, Slot]:
    """By replica, its place in the topology; what was started later took the place of one, and said of which."""
    config = run.config.get("topology") or {}
    slots = topology.slots(config)
    found = dict(enumerate(slots))
    groups = {group.group: slots[group.first] for group in topology.scaled(config)}
    for event in run.fleet_events() if slots else ():
        if event.event != "start":
            continue
        lost = event.reason.removeprefix(IN_PLACE_OF)
        if lost != event.reason:
            found[event.replica] = found[int(lost)]
        else:
            found[event.replica] = groups.get(event.reason.partition(": ")[0], slots[0])
    return found


def recorded_capacity(run: Run) -> Capacity:
    """The data plane's capacity as the run wrote it down."""
    try:
        return Capacity(**run.environment["capacity"])
    except (KeyError, TypeError) as error:
        raise ReplayError(f"run '{run.path}' doesn't say its capacity in environment.json") from error


def recorded_outputs(run: Run) -> dict[RequestId, Output]:
    """What each request of a recorded run generated, and whether it ended by that."""
    return {record.request.id: (record.output, record.reason == "stop") for record in run.request_records()}


def recorded_capacities(run: Run) -> list[Capacity]:
    """The same of each replica of the run's topology; none where it has no groups."""
    alike, places = recorded_capacity(run), topology.slots(run.config.get("topology") or {})
    told = (run.environment.get("backend") or {}).get("replicas")
    if told is None and (run.config.get("cost") or {}).get("name") not in SHAPED:
        return [alike] * len(places)
    try:
        blocks = [int(each["blocks"]) for each in told or ()]
        return [replace(alike, blocks=count) for _, count in zip(places, blocks, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(
            f"run '{run.path}' doesn't say in environment.json how many KV blocks each of its replicas has"
        ) from error
