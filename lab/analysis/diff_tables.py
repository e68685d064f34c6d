"""A difference in tables: printed below the verdict, and written to files. Observation path."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lab.analysis.around import place
from lab.analysis.difference import Diff
from lab.analysis.frames import STAGE_WORDS, RunLike
from lab.analysis.residuals import FACTS, residual_map
from lab.analysis.table import WIDTH
from lab.errors import RunError

if TYPE_CHECKING:
    from rich.table import Table

_MOST = 6


def show_details(diff: Diff, file: TextIO | None = None) -> None:
    """Print every table that has something to say. Colour on a terminal only."""
    from rich.console import Console

    console = Console(file=file or sys.stdout)
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    for title, table in details(diff, plain=not console.is_terminal):
        console.print(f"\n{title}", markup=False, highlight=False)
        console.print(table)


def details(diff: Diff, *, plain: bool = False) -> Iterator[tuple[str, Table]]:
    """(title, table): the divergence, attribution, split, percentiles, terms, distances."""
    a, b = diff.labels

    def table(*columns: str) -> Table:
        from rich import box
        from rich.table import Table as New

        new = New(box=box.ASCII2 if plain else box.SIMPLE_HEAD, header_style="" if plain else "bold")
        for i, column in enumerate(columns):
            new.add_column(column, justify="right" if i else "left", overflow="fold")
        return new

    row: dict[Any, Any]
    found = diff.decisions["first_divergence"]
    if found is not None and found["difference"] is not None:
        out = table(f"step {found['step']}", a, b)
        for cells_of in _divergence(diff, found):
            out.add_row(*cells_of)
        yield "First divergent decision", out
    if diff.alignment["matched"]:
        out = table("mean a request, ms", "E2E", "share", "TTFT", "share")
        for part in diff.moved:
            cells = [diff.attribution[what]["stages"][part] for what in ("e2e", "ttft")]
            out.add_row(
                STAGE_WORDS[part],
                *(text for c in cells for text in (f"{c['mean_ms']:+.3f}", f"{100 * c['share']:.1f} %")),
            )
        e2e, ttft = (diff.attribution[what] for what in ("e2e", "ttft"))
        out.add_row("total", f"{e2e['mean_ms']:+.3f}", "", f"{ttft['mean_ms']:+.3f}", "")
        out.add_row("residual, ns", str(e2e["residual_ns"]), "", str(ttft["residual_ns"]), "")
        yield f"Where the difference comes from: {b} - {a}", out
    if diff.counterfactual:
        out = table("metric", "total", "durations", "decisions", "interaction")
        for name, cell in diff.counterfactual.items():
            mixed = f"{cell['interaction']:+.3f}" if "interaction" in cell else "-"
            out.add_row(name, *(f"{cell[part]:+.3f}" for part in ("total", "duration", "decision")), mixed)
        yield "Duration error and decision error", out
    if len(diff.percentiles):
        out = table("latency", "percentile", f"{a}, ms", f"{b}, ms", "error, %", "95 % band", "over")
        for row in diff.percentiles[diff.percentiles["percentile"].isin((50, 90, 99))].to_dict("records"):
            band = (
                "-"
                if row["low_pct"] != row["low_pct"]
                else f"{row['low_pct']:+.1f} .. {row['high_pct']:+.1f}"
            )
            over = f"{row['runs']} pairs" if row["basis"] == "seeds" else row["basis"] or "-"
            numbers = f"{row['a_ms']:,.3f}", f"{row['b_ms']:,.3f}", f"{row['error_pct']:+.2f}"
            out.add_row(str(row["latency"]).upper(), f"p{row['percentile']:g}", *numbers, band, str(over))
        yield "Distributions", out
    if len(diff.terms):
        out = table("phase", "of the residual", "proportional to", "explains", "ns a unit", "factor")
        for row in diff.terms.head(4).to_dict("records"):
            factor = "-" if row["factor"] != row["factor"] else f"{row['factor']:.3g}"
            out.add_row(
                str(row["phase"]),
                f"{100 * row['share']:.1f} %",
                FACTS[str(row["fact"])],
                f"{100 * row['explained']:.1f} %",
                f"{row['delta_ns']:+,.1f}",
                factor,
            )
        yield f"Step time, over {len(diff.residuals)} steps that did the same work: {b} - {a}", out
    yield _distances(diff, table)


def _divergence(diff: Diff, found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    sides = [found[key] for key in diff.keys]

    def row(name: str, show: Any) -> tuple[str, str, str]:
        return (name, show(sides[0]), show(sides[1]))

    def some(names: Sequence[str]) -> str:
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        return f"{len(names)}: {' '.join(names[:_MOST])}{more}" if names else "0"

    yield row("clock, ms", lambda s: f"{s['now_ns'] / 1e6:.3f}")
    yield row("queue before", lambda s: some(s["queue"]))
    yield row("running before", lambda s: some(s["running_set"]))
    yield row(
        "KV blocks free + cached / held",
        lambda s: f"{s['blocks_free']} + {s['blocks_cached']} / {s['blocks_held']}",
    )
    yield row("chose", lambda s: some([f"{w['request']}[{w['start']}+{w['tokens']}]" for w in s["work"]]))
    yield row(
        "tokens", lambda s: f"{sum(w['tokens'] for w in s['work'])} of {s['limits']['token_budget'] or '?'}"
    )
    for verb in ("admitted", "preempted", "rejected"):
        if any(side[verb] for side in sides):
            yield row(verb, lambda s, verb=verb: some(s[verb]))
    for key, side in zip(diff.keys, sides, strict=True):
        for name in found["difference"]["work"][key][:2]:
            cells = {key: f"chosen: {place(side, name)}"}
            for reason in found["reasons"]:
                if reason["request"] == name:
                    cells[reason["side"]] = f"not: {reason['why']}"
            yield (name, cells.get(diff.keys[0], ""), cells.get(diff.keys[1], ""))


def _distances(diff: Diff, table: Any) -> tuple[str, Table]:
    from lab.analysis.distances import flat

    out: Table = table("distance", "value", "noise floor", "times the noise")
    floors = (diff.noise or {}).get("distances", {})
    for name, value in flat(diff.distances).items():
        floor = floors.get(name)
        ratio = "-" if floor is None or floor["ratio"] is None else f"{floor['ratio']:.1f}"
        out.add_row(name, f"{value:.4g}", "-" if floor is None else f"{floor['floor']:.4g}", ratio)
    return "Distances between the timelines (0: equal; *_pct: percent)", out


def tables(diff: Diff) -> dict[str, Any]:
    """Every table of a difference as a DataFrame, by name."""
    import pandas as pd

    from lab.analysis.distances import flat

    floors = (diff.noise or {}).get("distances", {})
    rows = [
        {"distance": name, "value": value, **{k: floors.get(name, {}).get(k) for k in ("floor", "ratio")}}
        for name, value in flat(diff.distances).items()
    ]
    return {
        "requests": diff.requests.rename_axis("id").reset_index(),
        "waits": diff.waits,
        "steps": diff.aligned.pairs,
        "percentiles": diff.percentiles,
        "residuals": diff.residuals,
        "residual_map": residual_map(diff.residuals),
        "terms": diff.terms,
        "metrics": pd.DataFrame(diff.metrics).T.rename_axis("metric").reset_index(),
        "counterfactual": pd.DataFrame(diff.counterfactual or {}).T.rename_axis("metric").reset_index(),
        "distances": pd.DataFrame(rows, columns=["distance", "value", "floor", "ratio"]),
    }


def write_tables(diff: Diff, runs: Sequence[RunLike], folder: Path) -> None:
    """diff.json, `<table>.csv` and `<figure>.png` into a directory. Raises `RunError` when that can't be done."""
    from lab.analysis.plots import figures

    diff.write(folder / "diff.json")
    try:
        for name, frame in tables(diff).items():
            frame.to_csv(folder / f"{name}.csv", index=False)
        for (anchor, _, _), figure in figures(runs, diff):
            figure.savefig(folder / f"{anchor}.png", dpi=130)
    except OSError as error:
        raise RunError(f"can't write to '{folder}': {error.strerror or error}") from error
