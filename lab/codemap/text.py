"""The map as text: three paths, the answers, one line a place. Observation path."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from lab.codemap.answers import answers
from lab.codemap.stops import PATHS, Stop, place, plane, spans_at, stops
from lab.codemap.watch import Visit, Watched, seam
from lab.observe.source import ROOT

TITLES = {
    "request": "Request path: a request from its arrival to its last token",
    "state": "State path: KV blocks from the first match to the last release",
    "observation": "Observation path: what a run says of itself, and what is read from it",
}

WIDTH = 116
_INDENT = 16


def tour(seen: Watched, root: Path = ROOT) -> str:
    """The whole map: the run it was drawn from, the paths, the answers. Raises `LookupError` as `place` does."""
    parts = [
        f"A map of {seen.steps} steps and {seen.requests} requests, which you can run yourself:",
        *textwrap.wrap(
            f"python -m lab.experiment {' '.join(seen.words)}",
            WIDTH,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        ),
    ]
    parts += ["", "Answers", ""]
    for answer in answers(seen, root):
        parts.append(f"  {answer.question}")
        for at in answer.places:
            line = f"      {f'{at.file}:{at.line}':<34} {at.name:<24} {at.doc}"
            parts.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 4].rstrip()} ...")
        parts += textwrap.wrap(answer.evidence, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for path in PATHS:
        parts += ["", TITLES[path], ""]
        for number, (stop, visit) in enumerate(ordered(seen, path), 1):
            parts += _stop(number, stop, visit, seen, root)
    return "\n".join(parts)


def ordered(seen: Watched, path: str) -> list[tuple[Stop, Visit | None]]:
    """The stops of one path in the order of their first call; then those that start from a run's files.

    A policy is on the path of the code that asked it.
    """
    on = {stop.symbol: stop for stop in stops() if path in stop.paths}
    found: list[tuple[Stop, Visit | None]] = []
    for symbol, visit in seen.visits.items():
        if symbol in on:
            found.append((on[symbol], visit))
        elif symbol.startswith("policies/") and any(asker in on for asker in visit.under):
            found.append((Stop(symbol, ()), visit))
    return found + [(stop, None) for symbol, stop in on.items() if symbol not in seen.visits]


def _stop(number: int, stop: Stop, visit: Visit | None, seen: Watched, root: Path) -> Iterator[str]:
    at = place(stop, root)
    policy = stop.symbol.startswith("policies/")
    mark = "decides" if policy else plane(at.file, root)
    yield f"{number:4}  {mark:<11} {at.file}:{at.line}  {at.name}"
    said = [at.doc.rstrip(".") + "."]
    if visit is None:
        said.append(
            "Not part of a run: it starts from the files of one."
            if stop.after
            else "The real engine's own: no simulation calls it."
            if stop.elsewhere
            else "Not called in this run."
        )
    else:
        file, line, caller = visit.caller
        how = "once" if visit.calls == 1 else f"{visit.calls:,} times"
        said.append(f"Called {how}, first from {file}:{line} ({caller}).")
    if policy:
        said.append(f"A control point: the seam '{seam(stop.symbol)}'.")
    if stop.contract:
        contract = place(Stop(stop.contract, ()), root)
        said.append(f"The contract: {contract.file}:{contract.line} ({contract.name}).")
    if stop.twin:
        twin = place(Stop(stop.twin, ()), root)
        said.append(f"In the real engine: {twin.file}:{twin.line} ({twin.name}).")
    spans = spans_at(stop)
    if spans:
        said.append("Spans: " + ", ".join(f"{name} {seen.spans[name]:,}" for name in spans) + ".")
    yield from textwrap.wrap(
        " ".join(said),
        WIDTH,
        initial_indent=" " * _INDENT,
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
    )
