"""How long replicas were up, what they drew and what they cost. Observation path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lab.control.observer import FleetEvent, StepTotals
from lab.observe.percentiles import ratio


@dataclass(frozen=True, slots=True)
class Power:
    """What one replica draws and costs: devices, watts of each when idle and at most, and USD an hour of each."""

    devices: int
    idle_w: float
    tdp_w: float
    price_per_hour: float


def uptime(events: Sequence[FleetEvent]) -> dict[str, float]:
    """`fleet` of `metrics.json`."""
    up: set[int] = set()
    most = 0
    for event in events:
        if event.event == "gone":
            up.remove(event.replica)
        else:
            up.add(event.replica)
        most = max(most, len(up))
    starts = sum(event.event == "start" for event in events)
    return {
        "replica_seconds": sum(_up(events).values()) / 1e9,
        "most_replicas": most,
        "cold_starts": starts,
        "failures": sum(event.event == "gone" and event.reason == "failed" for event in events),
    }


def _up(events: Sequence[FleetEvent]) -> dict[int, int]:
    """By replica, how long it was up."""
    since: dict[int, int] = {}
    up: dict[int, int] = {}
    for event in events:
        if event.event == "gone":
            up[event.replica] = event.at - since.pop(event.replica)
        else:
            since.setdefault(event.replica, event.at)
    return up


def bill(
    totals: Mapping[int, StepTotals], events: Sequence[FleetEvent], power: Mapping[int, Power], tokens: int
) -> dict[str, dict[str, float | None]]:
    """`energy` and `cost` of `metrics.json`: of what was up, busy or not. `totals` and `power` by replica."""
    energy = dict.fromkeys(("kwh", "kwh_per_million_output_tokens", "busy_ratio"))
    cost = dict.fromkeys(("usd", "usd_per_million_output_tokens"))
    found: dict[str, dict[str, float | None]] = {"energy": {**energy}, "cost": {**cost}}
    up = {replica: time / 3.6e12 for replica, time in _up(events).items() if replica in power}
    if not up:
        return found
    busy = {replica: totals[replica].time_ns / 3.6e12 if replica in totals else 0.0 for replica in up}
    kwh = usd = 0.0
    for replica, hours in up.items():
        own = power[replica]
        kwh += own.devices * (own.idle_w * hours + (own.tdp_w - own.idle_w) * busy[replica]) / 1000
        usd += own.devices * own.price_per_hour * hours
    found["energy"] = {
        "kwh": kwh,
        "kwh_per_million_output_tokens": ratio(kwh * 1e6, tokens),
        "busy_ratio": ratio(sum(busy.values()), sum(up.values())),
    }
    found["cost"] = {"usd": usd, "usd_per_million_output_tokens": ratio(usd * 1e6, tokens)}
    return found
