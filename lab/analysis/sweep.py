"""The page of a sweep: many runs beside each other, told apart by the options that differ. Observation path.

    write_sweep("sweep.html", [load(path) for path in paths])

It is made of the parts of a report: the same table of metrics, charts, style. Two of the runs laid over each other
are a report of their own (`python -m lab.report RUN RUN`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import OTHER_COLOURS, STAGE_COLOURS
from lab.analysis.files import write_atomic
from lab.analysis.frames import RunLike, scalars
from lab.analysis.page.embed import WITHOUT, Embedded, available, embed
from lab.analysis.page.many import Member, along, distributions, members, trade
from lab.analysis.report import environment, image
from lab.analysis.table import number
from lab.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = (*OTHER_COLOURS, STAGE_COLOURS["prefill"], STAGE_COLOURS["swapped"], STAGE_COLOURS["host"])
REST = "#8C8C8C"
COLUMNS = {
    "ttft_ms.p50": "TTFT p50, ms",
    "ttft_ms.p99": "p99",
    "tpot_ms.p50": "TPOT p50, ms",
    "tpot_ms.p99": "p99",
    "e2e_ms.mean": "E2E mean, ms",
    "e2e_ms.p99": "p99",
    "throughput.output_tokens_per_s": "output tokens/s",
    "goodput.attainment": "SLOs met",
    "kv.prefix_hit_ratio_tokens": "hit rate",
    "preemptions": "preempted",
    "requests.rejected": "rejected",
}
TTFT, TPOT = ("ttft_ms.mean", "mean TTFT (ms)"), ("tpot_ms.mean", "mean TPOT (ms)")
OVER = {
    "ttft_ms.p99": "TTFT p99 (ms)",
    "tpot_ms.p99": "TPOT p99 (ms)",
    "e2e_ms.mean": "mean E2E (ms)",
    "throughput.output_tokens_per_s": "output tokens a second",
}
MOST_CDFS = 12
"""Curves in the static figure of distributions."""


def write_sweep(path: str | Path, runs: Sequence[RunLike]) -> None:
    """Write one page of all these runs. Raises `RunError`."""
    write_atomic(Path(path), render_sweep(runs))


def render_sweep(runs: Sequence[RunLike]) -> str:
    """The page's HTML."""
    if len(runs) < 2:
        raise RunError(f"a sweep's page needs at least 2 runs; found {len(runs)}")
    found = members(runs, PALETTE, REST)
    embedded = embed(_charts(found)) if available() else Embedded()
    places = {name: several for name, several in embedded.places.items() if several}
    sections = [
        {"name": name, "title": title, "text": text, "image": None}
        for name, title, text in (
            (
                "over",
                "Over what was varied",
                "A line for all that is otherwise alike, in the colours of the table.",
            ),
            ("trade", "First token against the pace of the others", "Hover a point for its options."),
            ("cdf", "Latency distributions", "Of finished requests; hover a curve for its options."),
        )
        if name in places
    ]
    if not places:
        sections.append(
            {"name": "", "title": "Latency distributions", "text": "", "image": image(_still(runs, found))}
        )
    return render_many(
        title=f"Sweep: {len(runs)} runs",
        about="Runs are named by the options in which they differ. Times in ms.",
        said=[f"{m.label}: partial run" for m, run in zip(found, runs, strict=True) if run.partial],
        tables=[_table(runs, found)],
        sections=sections,
        embedded=embedded,
    )


def render_many(
    *,
    title: str,
    about: str,
    said: Sequence[str],
    tables: Sequence[dict[str, Any]],
    sections: Sequence[dict[str, Any]],
    embedded: Embedded,
) -> str:
    """A page of tables and sections, each with charts (`name`), a picture (`image`) or both."""
    from markupsafe import Markup

    return (
        environment()
        .get_template("many.html.j2")
        .render(
            title=title,
            about=about,
            said=said,
            tables=tables,
            sections=sections,
            charts=embedded.places,
            library=Markup(embedded.library),
            script=Markup(embedded.script),
            without="" if available() else WITHOUT,
        )
    )


def _charts(found: Sequence[Member]) -> dict[str, list[Any]]:
    keys = list(dict.fromkeys(key for m in found for key in m.at))
    over = [along(found, key, metric, words) for key in keys[:2] for metric, words in OVER.items()]
    pace = [trade(found, TTFT, TPOT), trade(found, TTFT, ("e2e_ms.mean", "mean E2E (ms)"))]
    return {
        "over": [drawn for drawn in over if drawn is not None],
        "trade": [drawn for drawn in pace if drawn is not None],
        "cdf": distributions(found),
    }


def _table(runs: Sequence[RunLike], found: Sequence[Member]) -> dict[str, Any]:
    metrics = [scalars(run.metrics) for run in runs]
    shown = [key for key in COLUMNS if any(own.get(key) for own in metrics)]
    rows = [
        [m.label, *("-" if key not in own else number(own[key], key) for key in shown)]
        for m, own in zip(found, metrics, strict=True)
    ]
    return {
        "title": "Runs",
        "head": ["options that differ", *(COLUMNS[key] for key in shown)],
        "rows": rows,
        "colours": {m.label: m.colour for m in found},
        "text": "Two of them laid over each other: python -m lab.report RUN RUN",
    }


def _still(runs: Sequence[RunLike], found: Sequence[Member]) -> Figure:
    """Distributions without scripts, of the first few."""
    from lab.analysis.drawing import blank, legend

    figure, axes = blank(1, 2, 3.4)
    for axis, name in zip(axes, ("TTFT", "E2E"), strict=True):
        for m in found[:MOST_CDFS]:
            values = m.samples[name]
            share = [100 * (i + 1) / len(values) for i in range(len(values))]
            axis.step(values, share, where="post", color=m.colour, label=m.label, linewidth=1.2)
        axis.set(title=name, xlabel=f"{name} (ms)", ylabel="share at or below (%)")
        legend(axis)
    return figure
