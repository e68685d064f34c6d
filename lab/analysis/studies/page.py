"""The page of a study: its tables, pictures and charts in one file that opens offline. Observation path.

Made of a report's parts: style, tables, charts that tell on hovering whose curve or point it is. The pictures beside
them are those of print, and lie as files in `figures/`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import STAGE_COLOURS
from lab.analysis.files import write_atomic
from lab.analysis.page.charts import latencies_ms
from lab.analysis.page.embed import Embedded, available, embed
from lab.analysis.page.many import Member, distributions, trade
from lab.analysis.runs import load
from lab.analysis.studies.figures import BASELINES, highlighted, pictures
from lab.analysis.studies.table import E2E, is_cache, mean_by_name, remarks, tables
from lab.analysis.sweep import TPOT, TTFT, render_many
from lab.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

    from lab.studies import StudyRun

DPI = 200
"""Of the pictures as files; in the page they are half as fine."""


def write(path: Path, frame: pd.DataFrame, runs: Sequence[StudyRun]) -> Path:
    """`figures/*.png` and `report.html` below `path`; returns the page. Raises `RunError`."""
    charts: dict[str, list[Any]] = {}
    sections: list[dict[str, Any]] = []
    colours: list[dict[str, str]] = []
    if available() and not is_cache(frame):
        for workload in dict.fromkeys(frame["workload"]):
            found = _members(frame, runs, str(workload))
            name = f"live-{len(sections)}"
            # The best last: it is drawn above the others.
            live = (trade(found[::-1], TTFT, TPOT), *distributions(found[::-1], BASELINES))
            charts[name] = [chart for chart in live if chart is not None]
            colours.append({member.label: member.colour for member in found})
            text = "Hover a point or a curve to see whose it is; dashed: what is chosen when nothing is said."
            title = f"Policies beside each other: {workload}"
            sections.append({"name": name, "title": title, "text": text, "image": None})
    try:
        (path / "figures").mkdir(parents=True, exist_ok=True)
        for name, title, text, figure in pictures(frame, runs):
            figure.savefig(path / "figures" / f"{name}.png", format="png", dpi=DPI, bbox_inches="tight")
            sections.append({"name": "", "title": title, "text": text, "image": _inlined(figure)})
    except OSError as error:
        raise RunError(f"can't write '{path / 'figures'}': {error.strerror or error}") from error
    page = render_many(
        title=f"Study: {path.name}",
        about=f"{len(runs)} runs of {frame['name'].nunique()} policies on {frame['workload'].nunique()} workloads. "
        "All numbers are in results.csv beside this page.",
        said=list(remarks(runs)),
        tables=[
            {"title": title, "head": head, "rows": rows, "colours": own, "text": ""}
            for (title, head, rows), own in zip_longest(tables(frame), colours)
        ],
        sections=sections,
        embedded=embed(charts) if charts else Embedded(),
    )
    write_atomic(path / "report.html", page)
    return path / "report.html"


def _members(frame: pd.DataFrame, runs: Sequence[StudyRun], workload: str) -> list[Member]:
    """One member a policy: its runs' latencies pooled, the mean of its numbers."""
    import numpy as np

    means = mean_by_name(frame[frame["workload"] == workload]).sort_values(E2E)
    colours = highlighted([str(name) for name in means.index])
    out = []
    for name in means.index:
        own = [latencies_ms(load(run.path)) for run in runs if (run.workload, run.name) == (workload, name)]
        samples = (
            {what: np.sort(np.concatenate([one[what] for one in own])) for what in own[0]} if own else {}
        )
        row = means.loc[name]
        numbers = {key: float(row[key]) for key in (TTFT[0], TPOT[0], E2E) if row[key] == row[key]}
        # The baseline's black is for paper: here the page may be dark.
        colour = STAGE_COLOURS["swapped"] if name in BASELINES else colours[str(name)]
        out.append(Member(str(name), str(name), colour, numbers, samples))
    return out


def _inlined(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(
        data,
        format="webp",
        dpi=DPI / 2,
        bbox_inches="tight",
        pil_kwargs={"lossless": True, "quality": 60},
    )
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
