"""Curves over time of batch, queue and KV cache, a column of the steps each. Observation path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import KV_COLOURS
from lab.analysis.page.canvas import Canvas
from lab.analysis.page.house import legend_above, table

if TYPE_CHECKING:
    from bokeh.plotting import figure

_KV_WORDS = {"held": "held by requests", "cached": "cached, reusable", "free": "free"}
_CURVES = (
    "t",
    "prefill_tokens",
    "decode_tokens",
    "waiting",
    "running",
    "held",
    "cached",
    "free",
    "cached_top",
    "free_top",
)


def _source(canvas: Canvas, side: int) -> Any:
    """The curves of one side within the window."""
    key = f"curve{side}"
    if key not in canvas.models:
        # Two points, not none: Bokeh 3.9 never comes back from an area of steps without any.
        canvas.models[key] = table({column: [0, 0] for column in _CURVES})
    return canvas.models[key]


def curves(canvas: Canvas, titles: dict[str, str], unit: str) -> list[figure]:
    """One column of the steps a chart, one curve a side."""
    from bokeh.models import AdaptiveTicker, DataRange1d, HoverTool

    out = []
    for column, title in titles.items():
        # It leaves out what lies outside of the window, as nothing of that is in the sources.
        y = DataRange1d(start=0, range_padding=0.08, min_interval=1)
        drawn = canvas.chart(168, title, unit, y_range=y)
        drawn.yaxis.ticker = drawn.ygrid.ticker = AdaptiveTicker(min_interval=1, desired_num_ticks=5)
        for i, side in enumerate(canvas.sides):
            line = drawn.step(
                x="t", y=column, mode="after", source=_source(canvas, i), line_color=side.colour,
                line_width=1.3, line_dash=side.dash, legend_label=side.label,
            )  # fmt: skip
            tips = [(side.label, f"@{column}{{0,0}} {unit}"), ("from", "@t{0,0.000000} s")]
            drawn.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tips, line_policy="prev"))
        legend_above(drawn)
        out.append(drawn)
    return out


def kv(canvas: Canvas, side: int) -> figure:
    """Blocks of the pool after each plan: held, cached, free, adding up to the pool."""
    from bokeh.models import HoverTool, Range1d

    label = canvas.sides[side].label
    y = Range1d(0, 1)
    drawn = canvas.chart(180, f"{label}: KV blocks after planning", "blocks", y_range=y)
    canvas.models |= {f"pool{side}": y, f"pool_title{side}": drawn.title}
    source = _source(canvas, side)
    tops = {"held": "held", "cached": "cached_top", "free": "free_top"}
    below: Any = 0
    for part, top in tops.items():
        drawn.varea_step(
            x="t", y1=below, y2=top, step_mode="after", source=source,
            fill_color=KV_COLOURS[part], legend_label=_KV_WORDS[part],
        )  # fmt: skip
        below = top
    line = drawn.step(x="t", y="held", mode="after", source=source, line_alpha=0)
    tips = [(_KV_WORDS[part], f"@{part}{{0,0}} blocks") for part in tops] + [("from", "@t{0,0.000000} s")]
    drawn.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tips, line_policy="prev"))
    legend_above(drawn)
    return drawn
