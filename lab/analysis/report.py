"""The report page: one file that opens offline and shows a run, or two laid over each other. Observation path.

Everything is inlined: the charting library (Bokeh), the charts' data as compressed columns, the figures as images,
the styles. The page asks nothing of the network. Without JavaScript, and on paper, the static figures say the same.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis.architecture import architecture_svg
from lab.analysis.drawing import KV_COLOURS, SIDE_COLOURS, STAGE_COLOURS, STAGE_LABELS, labelled
from lab.analysis.files import write_atomic
from lab.analysis.frames import RunLike
from lab.analysis.machine import machine
from lab.analysis.page.embed import WITHOUT, Embedded, as_json, available, embed
from lab.analysis.page.words import describe, parting, span_counts, summary
from lab.analysis.plots import figures
from lab.analysis.verdict import verdict
from lab.analysis.wording import percent

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from lab.analysis.difference import Diff

TEMPLATES = Path(__file__).parent / "templates"
DPI, DPI_INSTEAD = 130, 80
INSTEAD = {
    "cdf": "cdf",
    "lanes": "timeline",
    "batch": "batch",
    "kv": "kv",
    "queue": "queue",
    "residuals": "residuals",
}
"""Static figures that have an interactive chart: figure -> the section in which they stand for it."""


def write_report(
    path: str | Path,
    runs: RunLike | Sequence[RunLike],
    diff: Diff | None = None,
    window_s: tuple[float, float] | None = None,
) -> None:
    """Write `report.html` for one run, or for a pair with its difference. Raises `RunError`.

    With `window_s` the timeline holds that part of the run alone, in full detail.
    """
    write_atomic(Path(path), render(runs, diff, window_s))


def render(
    runs: RunLike | Sequence[RunLike], diff: Diff | None = None, window_s: tuple[float, float] | None = None
) -> str:
    """The page's HTML."""
    from markupsafe import Markup

    several = list(runs) if isinstance(runs, Sequence) else [runs]
    sides = labelled(several)
    embedded, facts = _charts(several, sides, diff, window_s) if available() else (Embedded(), None)
    static = {
        caption[0]: {
            "anchor": caption[0],
            "title": caption[1],
            "text": caption[2],
            "source": image(figure, DPI_INSTEAD if caption[0] in INSTEAD else DPI),
        }
        for caption, figure in figures(several, diff)
    }
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=" and ".join(label for label, _, _ in sides),
            labels=[label for label, _, _ in sides],
            colours={"stages": STAGE_COLOURS, "kv": KV_COLOURS, "sides": [colour for _, colour, _ in sides]},
            partial=[(label, run.partial) for label, _, run in sides if run.partial],
            sentences=[] if diff is None else verdict(diff),
            machine=[told for told in map(machine, several) if told],
            table=summary(several, diff),
            diff=diff,
            stages=[] if diff is None else [(part, STAGE_LABELS[part]) for part in diff.moved],
            divergence=None if diff is None else parting(diff),
            architecture=Markup(architecture_svg(span_counts(several))),
            charts=embedded.places,
            lanes=[] if facts is None else [(i, s, STAGE_LABELS[s]) for i, s in enumerate(facts["stages"])],
            parted=facts is not None and bool(facts["divergence"]["moments"]),
            facts=None if facts is None else Markup(as_json(facts)),
            without=WITHOUT,
            window=window_s,
            instead={INSTEAD[anchor]: static[anchor] for anchor in INSTEAD if anchor in static},
            figures=[figure for anchor, figure in static.items() if anchor not in INSTEAD],
            runs=[describe(label, run) for label, _, run in sides],
            library=Markup(embedded.library),
            script=Markup(embedded.script),
            percent=percent,
        )
    )


def environment() -> Environment:
    """Templates with the page's style and script at hand."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for file in (TEMPLATES / "report.css", *sorted(TEMPLATES.glob("*.js"))):
        made.globals[file.name.replace(".", "_")] = Markup(file.read_text(encoding="utf-8"))
    return made


def _charts(
    runs: Sequence[RunLike],
    labels: Sequence[tuple[str, str, RunLike]],
    diff: Diff | None,
    window_s: tuple[float, float] | None,
) -> tuple[Embedded, dict[str, Any]]:
    """All interactive charts of the page, and the facts that its script starts with."""
    from lab.analysis.page.charts import distributions, latencies_ms, residual_charts
    from lab.analysis.page.house import Side
    from lab.analysis.page.timeline import timeline

    sides = [
        Side(label, colour, "dashed" if colour == SIDE_COLOURS["sim"] and len(labels) > 1 else "solid")
        for label, colour, _ in labels
    ]
    over_time = timeline(runs, sides, diff, window_s)
    charts = {
        **over_time.charts,
        "cdf": distributions([latencies_ms(run) for run in runs], sides),
        "residuals": [] if diff is None else residual_charts(diff),
    }
    paths = " ".join(str(path) for run in runs if (path := getattr(run, "path", None)))
    command = f"All of a part of it: python -m lab.report {paths} --window FROM:TO (in seconds)."
    facts = {
        **over_time.facts,
        "words": [STAGE_LABELS[stage] for stage in over_time.facts["stages"]],
        "command": command,
    }
    return embed(charts, over_time.start), facts


def image(figure: Figure, dpi: int = DPI) -> str:
    """The figure as a data URL: lossless WebP, a third of a PNG's bytes and far less than its SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=dpi, pil_kwargs={"lossless": True, "quality": 60})
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
