"""The charts over time, linked to one range: lanes, steps, batch, KV cache, queue, hits, fairness. Observation path.

Bokeh draws axes, tools and tooltips. What lies inside the window is filled in by `templates/timeline.js` from
the columns of `lab/analysis/page/columns.py`, each time the window moves: so a chart never holds more marks than
pixels can show, and zooming in shows single steps and requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import STAGE_COLOURS
from lab.analysis.frames import RunLike
from lab.analysis.page.canvas import Canvas
from lab.analysis.page.charts import fairness, hits
from lab.analysis.page.columns import Shape, fitted, in_stage
from lab.analysis.page.curves import curves, kv
from lab.analysis.page.house import Side, chart, note, table

if TYPE_CHECKING:
    from bokeh.models import CustomJS
    from bokeh.plotting import figure

    from lab.analysis.difference import Diff

OVERVIEW_WINDOWS = 500


@dataclass
class Timeline:
    """Charts by where they stand in the page, and what the page's script is started with."""

    charts: dict[str, list[Any]]
    start: CustomJS
    facts: dict[str, Any] = field(default_factory=dict)


def timeline(
    runs: Sequence[RunLike], sides: list[Side], diff: Diff | None, window_s: tuple[float, float] | None = None
) -> Timeline:
    """All charts over time of one run, or of two laid over each other."""
    from bokeh.models import CustomJS, Range1d

    shared, tables = fitted(runs, window_s)
    end = shared.end_ns / 1e9
    low, high = (0.0, end) if shared.window_ns is None else (t / 1e9 for t in shared.window_ns)
    pad = 0.005 * (high - low)
    x = Range1d(low - pad, high + pad, bounds=(low - 2 * pad, high + 2 * pad), min_interval=2e-6)
    parted = _divergence(diff, low, high)
    canvas = Canvas(x, sides, [(moment, sides[i].colour) for i, moment in parted["moments"]])
    charts = {
        "overview": [_overview(canvas, runs, shared)],
        "lanes": [_lanes(canvas, shared), _steps(canvas, runs)],
        "batch": curves(
            canvas,
            {"prefill_tokens": "Prompt tokens in the batch", "decode_tokens": "Decode tokens in the batch"},
            "tokens",
        ),
        "kv": [kv(canvas, i) for i in range(len(sides))],
        "queue": curves(canvas, {"waiting": "Requests waiting", "running": "Requests running"}, "requests"),
        "hits": hits(runs, sides, canvas.chart),
        "fairness": fairness(runs, sides, canvas.chart),
    }
    packed = {f"{name}{i}": table(own) for i, side in enumerate(tables) for name, own in side.items()}
    facts = {
        "ids": shared.ids,
        "total": shared.total,
        "tick": shared.tick_ns / 1e9,
        "low": low,
        "high": high,
        "pad": pad,
        "stages": list(shared.stages),
        "sides": [side.label for side in sides],
        "block": (runs[0].config.get("kv") or {}).get("block_size") or 0,
        "divergence": parted,
    }
    models = {"x": x, **canvas.models, **packed}
    for name, model in canvas.models.items():
        model.name = name
    names = ", ".join(models)
    start = CustomJS(args=models, code=f"window.diptych.start({{{names}}})")
    return Timeline(charts, start, facts)


def _divergence(diff: Diff | None, low: float, high: float) -> dict[str, Any]:
    """Step and moments (side, s) at which the decisions part, if that is in sight."""
    found = None if diff is None else diff.decisions["first_divergence"]
    if diff is None or found is None:
        return {"step": None, "replica": 0, "moments": []}
    states = [found[key] for key in diff.keys]
    moments = [(i, state["now_ns"] / 1e9) for i, state in enumerate(states) if state is not None]
    return {
        "step": int(found["step"]),
        "replica": int(found.get("replica") or 0),
        "moments": [(i, moment) for i, moment in moments if low <= moment <= high],
    }


def _overview(canvas: Canvas, runs: Sequence[RunLike], shared: Shape) -> figure:
    """Requests by stage over the whole run, one side upwards, the other downwards; its box is the window."""
    import numpy as np
    from bokeh.models import CustomJSTickFormatter, Range1d, RangeTool

    low, high = (0, shared.end_ns) if shared.window_ns is None else shared.window_ns
    edges = np.linspace(low, high, OVERVIEW_WINDOWS + 1).astype(np.int64)
    whole = Range1d(canvas.x.start, canvas.x.end)
    drawn = chart(
        120, "Requests in each stage, mean of all: drag the box or its edges to choose the window", "", "requests",
        x_range=whole, linked=True, tools="",
    )  # fmt: skip
    for i, run in enumerate(runs):
        means = in_stage(run, shared, edges)
        sign = 1 if i == 0 else -1
        below = np.zeros(len(edges), dtype=np.float32)
        for stage in reversed(shared.stages):
            above = (below + sign * np.append(means[stage], means[stage][-1:])).astype(np.float32)
            if means[stage].any():
                drawn.varea_step(
                    x=(edges / 1e9).astype(np.float32), y1=below, y2=above, step_mode="after",
                    fill_color=STAGE_COLOURS[stage],
                )  # fmt: skip
            below = above
    if len(runs) > 1:
        drawn.hspan(y=[0], line_color="#555555", line_width=1)
        note(drawn, f"{canvas.sides[0].label} above, {canvas.sides[1].label} below")
    drawn.yaxis.formatter = CustomJSTickFormatter(code="return Math.abs(tick).toLocaleString('en')")
    tool = RangeTool(x_range=canvas.x)
    tool.overlay.fill_color, tool.overlay.fill_alpha = "#0072B2", 0.12
    tool.overlay.line_color, tool.overlay.line_alpha = "#0072B2", 0.9
    drawn.add_tools(tool)
    canvas.models["overview"] = whole
    return drawn


def _lanes(canvas: Canvas, shared: Shape) -> figure:
    """A lane a request, by arrival; the reference in its upper half, the candidate in its lower half."""
    from bokeh.models import (
        AdaptiveTicker,
        BoxAnnotation,
        CustomJSTickFormatter,
        Label,
        LinearColorMapper,
        Range1d,
    )

    y = Range1d(max(1, len(shared.ids)) - 0.4, -0.6)
    drawn = canvas.chart(400, "Requests, in order of arrival", "request", x="", y_range=y)
    palette = [STAGE_COLOURS[stage] for stage in shared.stages]
    colour = {
        "field": "stage",
        "transform": LinearColorMapper(palette=palette, low=-0.5, high=len(palette) - 0.5),
    }
    for i in range(len(canvas.sides)):
        source = table(dict.fromkeys(("left", "right", "y", "high", "stage", "i"), ()))
        bars = drawn.hbar(
            left="left", right="right", y="y", height="high", source=source,
            fill_color=colour, line_color=None, fill_alpha=1.0,
        )  # fmt: skip
        _hover(drawn, [bars], f"piece({i}, value)")
        canvas.models[f"bars{i}"] = source
    drawn.ygrid.visible = False
    drawn.yaxis.ticker = AdaptiveTicker(min_interval=1, desired_num_ticks=9)
    drawn.yaxis.formatter = CustomJSTickFormatter(code="return window.diptych.laneName(tick, ticks)")
    if canvas.marks:
        drawn.add_layout(
            Label(
                x=max(moment for moment, _ in canvas.marks),
                y=4,
                y_units="screen",
                x_offset=5,
                text="decisions part here",
                text_font_size="11px",
                text_color="#444444",
                background_fill_color="#ffffff",
                background_fill_alpha=0.8,
            )
        )
    chosen = BoxAnnotation(
        left=0, right=0, fill_color="#000000", fill_alpha=0.10, visible=False, level="underlay"
    )
    drawn.add_layout(chosen)
    canvas.models |= {"rows": y, "lanes": drawn, "chosen": chosen}
    return drawn


def _steps(canvas: Canvas, runs: Sequence[RunLike]) -> figure:
    """A bar a step, a row a replica and side; its height is divided between prompt and decode tokens."""
    from bokeh.models import CustomJS, FixedTicker, Range1d, TapTool

    replicas = sorted({int(r) for run in runs for r in run.steps["replica"].unique()} or {0})
    rows = [(side, replica) for replica in replicas for side in range(len(canvas.sides))]
    y = Range1d(len(rows) - 0.4, -0.6)
    height = min(300, 74 + 26 * len(rows))
    drawn = canvas.chart(height, "Steps: click one to see its batch", "", y_range=y)
    for i in range(len(canvas.sides)):
        source = table(dict.fromkeys(("left", "right", "top", "middle", "bottom", "i"), ()))
        sizes: dict[str, Any] = {"left": "left", "right": "right", "source": source, "line_color": None}
        plain = {"nonselection_fill_alpha": 1.0, "selection_line_color": "#000000"}
        decode = drawn.quad(
            top="middle", bottom="bottom", fill_color=STAGE_COLOURS["decode"], **sizes, **plain
        )
        prefill = drawn.quad(
            top="top", bottom="middle", fill_color=STAGE_COLOURS["prefill"], **sizes, **plain
        )
        _hover(drawn, [decode, prefill], f"step({i}, value)")
        tapped = CustomJS(args={"s": source}, code=f"window.diptych.tap({i}, s.selected.indices[0], s)")
        source.selected.js_on_change("indices", tapped)
        canvas.models[f"steps_drawn{i}"] = source
    drawn.add_tools(TapTool())
    drawn.ygrid.visible = False
    names = [
        canvas.sides[side].label + (f" {replica}" if len(replicas) > 1 else "") for side, replica in rows
    ]
    drawn.yaxis.ticker = FixedTicker(ticks=list(range(len(rows))))
    drawn.yaxis.major_label_overrides = {k: name[-12:] for k, name in enumerate(names)}
    return drawn


def _hover(drawn: figure, renderers: list[Any], call: str) -> None:
    """A tooltip whose text `tell.js` writes, line by line; what runs say of themselves is text there, never HTML."""
    from bokeh.models import CustomJSHover, HoverTool

    drawn.add_tools(
        HoverTool(
            renderers=renderers,
            tooltips='<div style="white-space:pre-line;font-size:12px;max-width:420px">@i{custom}</div>',
            formatters={"@i": CustomJSHover(code=f"return window.diptych.{call}")},
            point_policy="follow_mouse",
            attachment="horizontal",
        )
    )
