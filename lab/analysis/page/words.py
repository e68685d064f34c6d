"""What a page says in words and tables: the summary, the first divergence, what the runs are. Observation path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis.causes import changes, divergence
from lab.analysis.frames import RunLike, leaves, scalars
from lab.analysis.table import number, rows
from lab.analysis.wording import names, percent
from lab.errors import RunError

if TYPE_CHECKING:
    from lab.analysis.difference import Diff


def summary(runs: Sequence[RunLike], diff: Diff | None) -> list[list[dict[str, Any]]]:
    """Sections of rows: label, unit, one cell a side, error and how bad it is."""
    if diff is not None:
        known, keys = diff.metrics, diff.keys
    else:
        keys = tuple("abcdefgh"[: len(runs)])  # type: ignore[assignment]
        tables = [scalars(run.metrics) for run in runs]
        names_ = dict.fromkeys(key for table in tables for key in table)
        known = {
            key: {side: table.get(key) for side, table in zip(keys, tables, strict=True)} for key in names_
        }
    sections = []
    for section in rows(known, lambda key: [known[key][side] or 0 for side in keys]):
        entries = []
        for key, label, unit in section:
            error = known[key].get("error_pct")
            entries.append(
                {
                    "label": label,
                    "unit": unit,
                    "cells": [number(known[key][side], key) for side in keys],
                    "error": percent(error),
                    "grade": _grade(error),
                }
            )
        if entries:
            sections.append(entries)
    return sections


def _grade(error: float | None) -> str:
    return "" if error is None else "good" if abs(error) < 5 else "fair" if abs(error) < 15 else "poor"


def parting(diff: Diff) -> dict[str, Any] | None:
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


def describe(label: str, run: RunLike) -> dict[str, Any]:
    """Configuration, environment and files of one run."""
    path = getattr(run, "path", None)
    files = (
        sorted((f.name, f.stat().st_size) for f in Path(str(path)).iterdir() if f.is_file())
        if there(path)
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


def there(path: str | Path | None) -> bool:
    """Whether a run lies on the disk."""
    return path is not None and Path(path).is_dir()


def _text(value: object, most: int = 300) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else f"{text[:most]} …"


def span_counts(runs: Sequence[RunLike]) -> dict[str, int] | None:
    """Spans by name over all runs, None where a run has no spans file."""
    counts: dict[str, int] = {}
    for run in runs:
        path = getattr(run, "path", None)
        if not there(path) or not (file := Path(str(path)) / "spans.parquet").is_file():
            return None
        import pyarrow.parquet as pq

        for entry in pq.read_table(file, columns=["name"])["name"].value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts
