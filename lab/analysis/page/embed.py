"""Charts into HTML: Bokeh's own script and the charts' description, inlined. Observation path."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bokeh.models import CustomJS

WITHOUT = (
    "This page has no interactive charts: Bokeh was not installed where it was made (pip install bokeh)."
)


@dataclass(frozen=True)
class Embedded:
    """What a template writes: the library, the charts' script, and an element a chart."""

    library: str = ""
    script: str = ""
    places: dict[str, list[str]] = field(default_factory=dict)


def available() -> bool:
    """Whether the charting library is there."""
    return importlib.util.find_spec("bokeh") is not None


def embed(charts: Mapping[str, list[Any]], start: CustomJS | None = None) -> Embedded:
    """One document of all charts, so that they can share ranges; `start` runs when it stands."""
    from bokeh.document import Document
    from bokeh.embed import components
    from bokeh.models import CustomJS
    from bokeh.resources import Resources

    flat = {f"{name}-{i}": chart for name, several in charts.items() for i, chart in enumerate(several)}
    document = Document()
    with document.models.freeze():  # else it looks through all charts again for each one
        for chart in flat.values():
            document.add_root(chart)
    standing = CustomJS(code="window.diptych.standing()")
    document.js_on_event("document_ready", *([start] if start is not None else []), standing)
    script, places = components(flat, wrap_script=False)
    resources = Resources(mode="inline", components=["bokeh"], log_level="warn")
    return Embedded(
        "\n".join(resources.js_raw),
        script,
        {name: [places[f"{name}-{i}"] for i in range(len(several))] for name, several in charts.items()},
    )


def as_json(value: object) -> str:
    """JSON that can stand inside a script element whatever its strings contain."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
