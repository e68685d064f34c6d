"""The course's questions, answered by symbols that are there and by a run that shows it. Observation path.

Where something is, is declared here and resolved in the source. Which point controls and which path is hot, is
found in the run: the first is the innermost code that every decision happened inside, the second what the loop
calls once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab.codemap.stops import Stop, place, stops
from lab.codemap.watch import Watched
from lab.observe.source import ROOT, Place


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, the code that answers it, in order, and what the run says of that."""

    question: str
    places: tuple[Place, ...]
    evidence: str


WHERE: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Where does a request enter?",
        ("lab/control/gateway.py:Gateway.submit", "lab/control/core.py:EngineCore.add"),
    ),
    (
        "Where is the scheduling loop?",
        ("lab/control/loop.py:serve", "lab/control/core.py:EngineCore.plan"),
    ),
    (
        "Where are KV blocks allocated?",
        (
            "lab/control/step.py:StepBuilder.run",
            "lab/state/blocks.py:BlockPool.take",
            "lab/state/blocks.py:BlockPool.take_run",
        ),
    ),
    (
        "Where are KV blocks reclaimed?",
        ("lab/state/blocks.py:BlockPool.release", "lab/state/blocks.py:BlockPool.evict"),
    ),
    ("Where is a step executed?", ("sim/executor.py:SimExecutor.execute",)),
    (
        "Where do metrics come out?",
        ("lab/observe/metrics.py:summarise", "lab/observe/prometheus.py:prometheus_text"),
    ),
)

DECISIONS = (
    "lab/control/step.py:StepBuilder.run",
    "lab/control/step.py:StepBuilder.run_decodes",
    "lab/control/step.py:StepBuilder.preempt",
    "lab/state/blocks.py:BlockPool.take",
    "lab/state/blocks.py:BlockPool.take_run",
    "lab/state/blocks.py:BlockPool.evict",
)
"""What is decided in a step: who runs, who is preempted, whose blocks are taken and dropped."""

_LOOP = "lab/control/loop.py:serve"


def answers(seen: Watched, root: Path = ROOT) -> list[Answer]:
    """Every question with its answer. Raises `LookupError` where a symbol of an answer is gone."""
    on = {stop.symbol: stop for stop in stops()}
    found = [
        Answer(question, _places(symbols, on, root), _called(seen, symbols)) for question, symbols in WHERE
    ]
    point = control_point(seen)
    asked = [visit for visit in seen.policies if visit.inside[point]]
    schedules = sum(visit.calls for visit in asked if visit.symbol.startswith("policies/scheduling/"))
    decided = sum(seen.calls(symbol) for symbol in DECISIONS)
    lines = seen.visits[point].callers
    found.append(
        Answer(
            "Which is the global control point?",
            _places((point,), on, root),
            f"all {decided:,} decisions of the run and all {schedules:,} turns of the scheduling policy happened "
            f"inside it, and {'one line calls' if len(lines) == 1 else f'{len(lines)} lines call'} it: "
            + ", ".join(f"{file}:{line}" for file, line in sorted(lines)),
        )
    )
    hot = hot_path(seen)
    found.append(
        Answer(
            "Which is the hot path?",
            _places(hot, on, root),
            f"the loop calls each of them in every one of the {seen.steps:,} steps",
        )
    )
    return found


def control_point(seen: Watched) -> str:
    """The innermost visited function around every decision and every turn of the scheduling policy."""
    policy = [v.symbol for v in seen.policies if v.symbol.startswith("policies/scheduling/")]
    wanted = [seen.visits[symbol] for symbol in (*policy, *DECISIONS) if symbol in seen.visits]
    around = [symbol for symbol in seen.visits if all(v.inside[symbol] == v.calls for v in wanted)]
    if not around:
        raise LookupError("no function of the run is around all of its decisions")
    return max(around, key=lambda symbol: len(seen.visits[symbol].inside))


def hot_path(seen: Watched) -> tuple[str, ...]:
    """What the step loop itself calls at least once a step, in order."""
    return tuple(
        visit.symbol for visit in seen.visits.values() if seen.steps and visit.under[_LOOP] >= seen.steps
    )


def _places(symbols: tuple[str, ...], on: dict[str, Stop], root: Path) -> tuple[Place, ...]:
    found: list[Place] = []
    for symbol in symbols:
        stop = on.get(symbol, Stop(symbol, ()))
        found.append(place(stop, root))
        if stop.twin:
            found.append(place(Stop(stop.twin, (), contract=stop.contract), root))
    return tuple(found)


def _called(seen: Watched, symbols: tuple[str, ...]) -> str:
    counts = (f"{symbol.rpartition(':')[2]} {seen.calls(symbol):,}" for symbol in symbols)
    return "calls in the run: " + ", ".join(counts)
