"""The map's components: stops gathered by class, in three layers, and the calls between them. Observation path.

What stands in which layer follows from plane and path; who calls whom, how often, and which policy decides
where, from the run. Where state lives is declared, and held against the classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab.codemap.stops import plane, stops
from lab.codemap.watch import Watched, seam
from lab.observe.source import ROOT, Place, attributes, locate

LAYERS = ("Entry and control", "Execution and state", "Observation and validation")

STATE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "lab/control/fleet.py:Fleet": (("_ready", "replicas"),),
    "lab/control/core.py:EngineCore": (("_waiting", "waiting"), ("_running", "running requests")),
    "lab/state/blocks.py:BlockPool": (("_index", "content → block"), ("_free", "free blocks")),
    "lab/state/tiers.py:HostTier": (("_free", "host blocks"),),
    "lab/observe/recorder.py:Recorder": (("requests", "requests"), ("steps", "steps")),
    "lab/observe/rundir.py:RunDirectory": (("path", "the run's files"),),
    "real_engine/kv_memory.py:KvMemory": (("keys", "keys"), ("values", "values")),
}
"""Where state lives: (attribute, what it holds). In the simulator no tensors stand behind the blocks."""

_BEHIND = {"sim/executor.py:SimExecutor": "real_engine/kv_memory.py:KvMemory"}
"""State of the real engine's data plane, shown at its twin."""


@dataclass
class Component:
    """A class or function of the map."""

    place: Place
    layer: int
    twin: str = ""
    calls: int = 0
    functions: list[str] = field(default_factory=list)
    """Its methods on the map."""
    state: tuple[str, ...] = ()
    control_points: dict[str, str] = field(default_factory=dict)
    """Seam to the policy that decided there in the run."""
    after: bool = False
    """No simulation calls it: it is the real engine's, or starts from a run's files."""


@dataclass(frozen=True)
class Drawn:
    """All components by symbol, and how often one called another."""

    components: dict[str, Component]
    edges: Counter[tuple[str, str]]


def components(seen: Watched, root: Path = ROOT) -> Drawn:
    """Gather the stops. Raises `LookupError` where the code has moved on, also an attribute that holds state."""
    found: dict[str, Component] = {}
    owner: dict[str, str] = {}
    after: list[str] = []
    for stop in stops():
        at = locate(stop.symbol, root)
        home = owner[stop.symbol] = at.owner
        if stop.after:
            after.append(home)
        if home not in found:
            away = stop.after or stop.elsewhere
            found[home] = Component(locate(home, root), _layer(home, root), after=away)
        if stop.twin:
            found[home].twin = locate(stop.twin, root).owner
        found[home].calls += seen.calls(stop.symbol)
        if home != stop.symbol:
            found[home].functions.append(stop.symbol.rpartition(".")[2])
    for home, component in found.items():
        component.state = tuple(_state(home, root))
    edges: Counter[tuple[str, str]] = Counter()
    for symbol, visit in seen.visits.items():
        for asker, count in visit.under.items():
            caller = _through_policies(asker, seen)
            if symbol.startswith("policies/"):
                policy = symbol.partition(":")[2].partition(".")[0]
                found[owner[caller]].control_points[seam(symbol)] = policy
            elif owner[caller] != owner[symbol]:
                edges[owner[caller], owner[symbol]] += count
    return Drawn(found, edges)


def _through_policies(symbol: str, seen: Watched) -> str:
    """The code that asked the policy that made a call: that a policy acts through it, is how it is built."""
    while symbol.startswith("policies/"):
        symbol = next(iter(seen.visits[symbol].under))
    return symbol


def _layer(symbol: str, root: Path) -> int:
    file = symbol.partition(":")[0]
    kind = plane(file, root)
    if kind == "observation":
        return 2
    return 1 if kind == "data" or file.startswith("lab/state/") else 0


def _state(home: str, root: Path) -> list[str]:
    held = []
    for symbol in (home, _BEHIND.get(home, "")):
        has = attributes(symbol, root) if symbol in STATE else set()
        for name, what in STATE.get(symbol, ()):
            if name not in has:
                raise LookupError(f"'{symbol}': no attribute '{name}', which is said to hold {what}")
        if symbol in STATE:
            said = ", ".join(what for _, what in STATE[symbol])
            held.append(said if symbol == home else f"{said} in {symbol.rpartition(':')[2]}")
    return held
