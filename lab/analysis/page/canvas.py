"""What the charts over time share: one range, the sides, the moments to mark. Observation path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.analysis.page.house import TIME, Side, chart

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure


@dataclass
class Canvas:
    """What the charts over time share."""

    x: Range1d
    sides: list[Side]
    marks: list[tuple[float, str]]
    """Moments to mark on all of them (s), each with its side's colour."""
    models: dict[str, Any] = field(default_factory=dict)
    """What the script fills or moves, by name."""

    def chart(self, height: int, title: str, unit: str, **options: Any) -> figure:
        from bokeh.models import Span

        drawn = chart(height, title, options.pop("x", TIME), unit, x_range=self.x, linked=True, **options)
        for moment, colour in self.marks:
            drawn.add_layout(
                Span(
                    location=moment,
                    dimension="height",
                    line_color=colour,
                    line_dash="dashed",
                    line_width=1.4,
                    level="overlay",
                )
            )
        return drawn
