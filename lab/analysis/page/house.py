"""How all interactive charts look: one style, aligned frames, legible tools. Observation path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure

TIME = "time since the run began (s)"
LEFT, RIGHT = 96, 30
"""Pixels beside each chart's frame: the same for all, so that moments stand below each other."""


@dataclass(frozen=True)
class Side:
    """One of the runs that a page shows."""

    label: str
    colour: str
    dash: str
    """`solid` for the reference, `dashed` for what is laid over it: told apart without colours too."""


def table(columns: Mapping[str, Any]) -> ColumnDataSource:
    """Columns as the browser gets them: arrays stay binary."""
    from bokeh.models import ColumnDataSource

    return ColumnDataSource(data=dict(columns))


def chart(
    height: int, title: str, x: str, y: str, *, linked: bool = False, tools: str | None = None, **options: Any
) -> figure:
    """An empty chart in the house's style; `x` and `y` are the axes' words, with units.

    A `linked` one shares its axis of time with others: it is as wide as they are, and zooms along time alone.
    """
    from bokeh.models import BasicTickFormatter, NumeralTickFormatter, WheelZoomTool
    from bokeh.plotting import figure

    if tools is None:
        tools = "xpan,xbox_zoom,reset" if linked else "pan,box_zoom,reset"
    drawn = figure(
        height=height,
        title=title,
        tools=tools,
        toolbar_location="right" if tools else None,
        sizing_mode="stretch_width",
        min_border_left=LEFT if linked else 60,
        min_border_right=RIGHT if linked else 14,
        min_border_top=4,
        min_border_bottom=4,
        output_backend="canvas",
        active_drag="xpan" if tools.startswith("xpan") else "auto",
        **options,
    )
    if tools:
        # The wheel alone scrolls the page; pinching on a touchpad arrives as Ctrl + wheel.
        wheel = WheelZoomTool(dimensions="width" if linked else "both", modifiers={"ctrl": True})
        drawn.add_tools(wheel)
        drawn.toolbar.active_scroll = wheel
        drawn.toolbar.autohide = True
    drawn.toolbar.logo = None
    drawn.title.text_font_size = "13px"
    drawn.title.text_font_style = "normal"
    drawn.axis.axis_label_text_font_style = "normal"
    drawn.axis.axis_label_text_font_size = "12px"
    drawn.axis.major_label_text_font_size = "11px"
    drawn.axis.minor_tick_line_color = None
    drawn.xaxis.axis_label = x
    drawn.yaxis.axis_label = y
    drawn.yaxis.formatter = NumeralTickFormatter(format="0,0.[000]")
    drawn.xaxis.formatter = (
        BasicTickFormatter(use_scientific=False) if linked else NumeralTickFormatter(format="0,0.[000]")
    )
    drawn.grid.grid_line_color = "#E6E6E6"
    drawn.outline_line_color = "#DCDFE3"
    return drawn


def note(drawn: figure, text: str) -> None:
    """A few words in the chart's upper left corner."""
    from bokeh.models import Label

    drawn.add_layout(
        Label(
            x=6,
            y=4,
            x_units="screen",
            y_units="screen",
            text=text,
            text_font_size="11px",
            text_color="#444444",
            background_fill_color="#ffffff",
            background_fill_alpha=0.7,
        )
    )


def legend_above(drawn: figure) -> None:
    """The legend between title and frame, where it hides no data; a click hides a curve. No curves, no legend."""
    if not drawn.legend:
        return
    legend = drawn.legend[0]
    legend.orientation, legend.location, legend.click_policy = "horizontal", "top_right", "hide"
    legend.label_text_font_size, legend.label_height, legend.glyph_height = "11px", 14, 12
    legend.padding, legend.margin, legend.spacing = 0, 2, 14
    legend.border_line_color = legend.background_fill_color = None
    drawn.center.remove(legend)
    drawn.add_layout(legend, "above")
