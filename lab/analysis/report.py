"""The report page: one file that opens offline and shows a run, or two laid over each other. Observation path.

Everything is inlined: figures as images, the timeline's data as JSON, its code, the styles. The page asks
nothing of the network.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis.architecture import architecture_svg
from lab.analysis.diff import Diff
from lab.analysis.drawing import KV_COLOURS, STAGE_COLOURS, STAGE_LABELS, labelled
from lab.analysis.files import write_atomic
from lab.analysis.frames import RunLike, intervals, leaves, scalars, stages_of
from lab.analysis.plots import figures
from lab.analysis.table import number, rows
from lab.analysis.verdict import changes, divergence, names, percent, verdict
from lab.errors import RunError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
MOST_REQUESTS = 2000
"""Requests a side in the interactive timeline; more are thinned evenly, and the page says so."""
MOST_STEPS = 3000
"""Bars a side in its strip of steps; beyond that neighbouring steps share a bar."""
MOST_SVG = 200_000
"""Characters of a figure's SVG; a larger one goes in as PNG."""


def write_report(path: str | Path, runs: RunLike | Sequence[RunLike], diff: Diff | None = None) -> None:
    """Write `report.html` for one run, or for a pair with its difference. Raises `RunError`."""
    write_atomic(Path(path), render(runs, diff))


def render(runs: RunLike | Sequence[RunLike], diff: Diff | None = None) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    several = list(runs) if isinstance(runs, Sequence) else [runs]
    sides = labelled(several)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=" and ".join(label for label, _, _ in sides),
        labels=[label for label, _, _ in sides],
        partial=[(label, run.partial) for label, _, run in sides if run.partial],
        sentences=[] if diff is None else verdict(diff),
        table=_summary(several, diff),
        diff=diff,
        stages=[] if diff is None else [(part, STAGE_LABELS[part]) for part in diff.moved],
        divergence=None if diff is None else _divergence(diff),
        architecture=Markup(architecture_svg(_span_counts(several))),
        timeline=Markup(_json(_timeline(sides))),
        figures=[
            {"anchor": anchor, "title": title, "text": text, "source": _image(figure)}
            for (anchor, title, text), figure in figures(several, diff)
        ],
        runs=[_describe(label, run) for label, _, run in sides],
        colours={"stages": STAGE_COLOURS, "kv": KV_COLOURS},
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "timeline.js").read_text(encoding="utf-8")),
        percent=percent,
    )


def _summary(runs: Sequence[RunLike], diff: Diff | None) -> list[list[dict[str, Any]]]:
    """Sections of rows: label, unit, one cell a side, error and how bad it is."""
    known = diff.metrics if diff is not None else {k: {"a": v} for k, v in scalars(runs[0].metrics).items()}
    keys = diff.keys if diff is not None else ("a",)
    sections = []
    for section in rows(known, lambda key: [known[key][side] or 0 for side in keys]):
        entries = []
        for key, label, unit in section:
            error = known[key].get("error_pct")
            cells = [number(known[key][side], key) for side in keys]
            entries.append(
                {
                    "label": label,
                    "unit": unit,
                    "cells": cells,
                    "error": percent(error),
                    "grade": _grade(error),
                }
            )
        if entries:
            sections.append(entries)
    return sections


def _grade(error: float | None) -> str:
    return "" if error is None else "good" if abs(error) < 5 else "fair" if abs(error) < 15 else "poor"


def _divergence(diff: Diff) -> dict[str, Any] | None:
    """The first divergent step as a small table: state and choice of each side."""
    found = diff.decisions["first_divergence"]
    if found is None:
        return None
    fields: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("clock (ms)", lambda side: f"{side['now_ns'] / 1e6:.3f}"),
        ("requests running / waiting", lambda side: f"{side['running']} / {side['waiting']}"),
        (
            "KV blocks free / cached / held",
            lambda side: f"{side['blocks_free']} / {side['blocks_cached']} / {side['blocks_held']}",
        ),
        ("requests in the batch", lambda side: str(len(side["work"]))),
        ("tokens in the batch", lambda side: str(sum(item["tokens"] for item in side["work"]))),
        ("admitted", lambda side: names(side["admitted"], 8) or "-"),
        ("preempted", lambda side: names(side["preempted"], 8) or "-"),
        ("rejected", lambda side: names(side["rejected"], 8) or "-"),
    )
    states = [found[key] for key in diff.keys]
    return {
        "step": found["step"],
        "why": divergence(diff),
        "changes": changes(diff),
        "rows": [
            (name, ["ended" if state is None else show(state) for state in states]) for name, show in fields
        ],
    }


def _describe(label: str, run: RunLike) -> dict[str, Any]:
    """Configuration, environment and files of one run."""
    path = getattr(run, "path", None)
    files = (
        sorted((f.name, f.stat().st_size) for f in Path(str(path)).iterdir() if f.is_file())
        if _there(path)
        else []
    )
    try:
        environment = dict(getattr(run, "environment", None) or {})
    except RunError as error:
        environment = {"missing": str(error)}
    return {
        "label": label,
        "path": str(path) if path else "",
        "files": [(name, f"{size:,}") for name, size in files if not name.startswith(".")],
        "config": [(key, _text(value)) for key, value in leaves(run.config)],
        "environment": [(key, _text(value)) for key, value in leaves(environment)],
    }


def _there(path: str | Path | None) -> bool:
    return path is not None and Path(path).is_dir()


def _text(value: object, most: int = 300) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else f"{text[:most]} …"


def _span_counts(runs: Sequence[RunLike]) -> dict[str, int] | None:
    """Spans by name over all runs, None where a run has no spans file."""
    counts: dict[str, int] = {}
    for run in runs:
        path = getattr(run, "path", None)
        if not _there(path) or not (file := Path(str(path)) / "spans.parquet").is_file():
            return None
        import pyarrow.parquet as pq

        for entry in pq.read_table(file, columns=["name"])["name"].value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts


def _timeline(sides: Sequence[tuple[str, str, RunLike]]) -> dict[str, Any]:
    """What the interactive timeline draws, microseconds: lanes of [stage, start, length] and steps of each side.

    Lanes are the same requests in the same order on all sides, so that panels can be compared by height.
    """
    requests = sides[0][2].requests.sort_values(["arrival_ns", "seq"])
    total = len(requests)
    picked = (
        range(total) if total <= MOST_REQUESTS else (i * total // MOST_REQUESTS for i in range(MOST_REQUESTS))
    )
    ids = [str(requests["id"].iloc[i]) for i in picked]
    stages = stages_of(*(run for _, _, run in sides))
    panels = []
    for label, colour, run in sides:
        lanes: dict[str, list[list[int]]] = {request: [] for request in ids}
        pieces = intervals(run.requests[run.requests["id"].isin(lanes)])
        columns = (pieces[c].tolist() for c in ("id", "stage", "start_ns", "end_ns"))
        for request, stage, start, end in zip(*columns, strict=True):
            lanes[request].append([stages.index(stage), start // 1000, (end - start) // 1000])
        panels.append(
            {
                "label": label,
                "colour": colour,
                "lanes": [lanes[i] for i in ids],
                "steps": list(_steps(run.steps)),
                "replicas": sorted(int(replica) for replica in run.steps["replica"].unique()),
            }
        )
    return {
        "ids": ids,
        "total": total,
        "stages": [
            {"name": stage, "label": STAGE_LABELS[stage], "colour": STAGE_COLOURS[stage]} for stage in stages
        ],
        "panels": panels,
    }


def _steps(steps: pd.DataFrame) -> Iterator[list[int]]:
    """[first step, last step, start, length, prompt, decode tokens, replica's place] of bars, microseconds."""
    together = max(1, -(-len(steps) // MOST_STEPS))
    for place, (_, own) in enumerate(steps.groupby("replica", sort=True)):
        ordered = own.sort_values("start_ns")
        for i in range(0, len(ordered), together):
            part = ordered.iloc[i : i + together]
            start, end = int(part["start_ns"].iloc[0]), int(part["end_ns"].iloc[-1])
            yield [
                int(part["step"].iloc[0]),
                int(part["step"].iloc[-1]),
                start // 1000,
                (end - start) // 1000,
                int(part["prefill_tokens"].sum()),
                int(part["decode_tokens"].sum()),
                place,
            ]


def _json(value: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element whatever its strings contain."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _image(figure: Figure) -> str:
    """The figure as a data URL: SVG while that is small, else PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    kind = "svg+xml"
    if buffer.tell() > MOST_SVG:
        buffer, kind = io.BytesIO(), "png"
        figure.savefig(buffer, format="png", dpi=130)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
