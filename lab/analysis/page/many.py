"""Charts of many runs at once: what a sweep or a study found. Observation path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.analysis.frames import RunLike, leaves, scalars
from lab.analysis.page.charts import LATENCIES, latencies_ms, quantiles
from lab.analysis.page.house import chart, table

if TYPE_CHECKING:
    import numpy as np
    from bokeh.plotting import figure
    from numpy.typing import NDArray

MOST_CURVES = 40
"""Distributions in one chart; of more runs they are thinned evenly."""
POINTS = 120
"""Of each of them."""
_UNSAID = ("run.", "export.", "seed_of", "studies")
"""Options that say where results go, not what was run."""


@dataclass(frozen=True)
class Member:
    """One run among many."""

    label: str
    group: str
    """Members of a group share a colour, and a line where something is varied along it."""
    colour: str
    metrics: Mapping[str, float]
    samples: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Latencies (ms), as `latencies_ms` has them."""
    at: Mapping[str, float] = field(default_factory=dict)
    """Numbers that were varied."""


def varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options that aren't the same in all of these configurations but are in each, names of plug-ins first."""
    flat = [dict(leaves(config)) for config in configs]
    common = [key for key in flat[0] if all(key in other for other in flat)] if flat else []
    found = [
        key for key in common if not key.startswith(_UNSAID) and len({repr(other[key]) for other in flat}) > 1
    ]
    return sorted(found, key=lambda key: (not key.endswith(".name"), key))


def members(runs: Sequence[RunLike], palette: Sequence[str], rest: str) -> list[Member]:
    """The runs of a sweep, named by what differs between them; colours go to what isn't a number."""
    configs = [run.config for run in runs]
    flat = [dict(leaves(config)) for config in configs]
    keys = varied(configs)
    numbers = [k for k in keys if all(_is_number(one[k]) for one in flat)]
    names = [k for k in keys if k not in numbers]
    groups: dict[str, str] = {}
    out = []
    for run, own in zip(runs, flat, strict=True):
        group = ", ".join(_said(key, own[key]) for key in names)
        groups.setdefault(group, palette[len(groups)] if len(groups) < len(palette) else rest)
        said = ", ".join(_said(key, own[key]) for key in keys)
        path = getattr(run, "path", None)
        out.append(
            Member(
                label=said or (path.name if path else "run"),
                group=group,
                colour=groups[group],
                metrics=scalars(run.metrics),
                samples=latencies_ms(run),
                at={key: float(own[key]) for key in numbers},
            )
        )
    return out


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _said(key: str, value: object) -> str:
    return str(value) if key.endswith(".name") else f"{key.removeprefix('trace.')}={value}"


def trade(found: Sequence[Member], x: tuple[str, str], y: tuple[str, str]) -> figure | None:
    """One metric against another, (key, words): a point a run, a line through a group that varies a number."""
    from bokeh.models import HoverTool

    known = [m for m in found if x[0] in m.metrics and y[0] in m.metrics]
    if len(known) < 2:
        return None
    drawn = chart(
        340,
        f"{y[1]} against {x[1]}: lower left is better",
        x[1],
        y[1],
        width=480,
        x_axis_type=_scale([m.metrics[x[0]] for m in known]),
        y_axis_type=_scale([m.metrics[y[0]] for m in known]),
    )
    for path in _lines(known):
        drawn.line(
            [m.metrics[x[0]] for m in path],
            [m.metrics[y[0]] for m in path],
            line_color=path[0].colour,
            line_alpha=0.5,
        )
    source = table(
        {
            "x": [m.metrics[x[0]] for m in known],
            "y": [m.metrics[y[0]] for m in known],
            "label": [m.label for m in known],
            "colour": [m.colour for m in known],
        }
    )
    dots = drawn.scatter(x="x", y="y", source=source, color="colour", size=9, line_color="white")
    tips = [("", "@label"), (x[1], "@x{0,0.000}"), (y[1], "@y{0,0.000}")]
    drawn.add_tools(HoverTool(renderers=[dots], tooltips=tips))
    return drawn


def along(found: Sequence[Member], key: str, metric: str, words: str) -> figure | None:
    """A metric over a number that was varied, a line a group."""
    from bokeh.models import HoverTool

    known = sorted((m for m in found if key in m.at and metric in m.metrics), key=lambda m: m.at[key])
    if len({m.at[key] for m in known}) < 2:
        return None
    drawn = chart(260, f"{words} over {key}", key, words, width=480)
    drawn.y_range.start = 0
    groups: dict[tuple[str, str], list[Member]] = {}
    for m in known:
        others = ", ".join(f"{k}={v:g}" for k, v in m.at.items() if k != key)
        groups.setdefault((m.group, others), []).append(m)
    for path in groups.values():
        source = table(
            {
                "x": [m.at[key] for m in path],
                "y": [m.metrics[metric] for m in path],
                "label": [m.label for m in path],
            }
        )
        drawn.line(x="x", y="y", source=source, line_color=path[0].colour, line_width=1.5)
        dots = drawn.scatter(x="x", y="y", source=source, color=path[0].colour, size=6)
        drawn.add_tools(HoverTool(renderers=[dots], tooltips=[("", "@label"), (words, "@y{0,0.000}")]))
    return drawn


def distributions(found: Sequence[Member], dashed: Sequence[str] = ()) -> list[figure]:
    """Cumulative distributions, a chart a latency, a curve a member; hovering tells whose it is."""
    from bokeh.models import HoverTool

    shown = [m for m in found if m.samples]
    shown = shown[:: -(-len(shown) // MOST_CURVES) or 1]
    out = []
    for name, words in LATENCIES.items():
        known = [m for m in shown if len(m.samples.get(name, ()))]
        if not known:
            continue
        drawn = chart(
            300,
            f"{name}: {words}",
            f"{name} (ms)",
            "share at or below (%)",
            width=480,
            x_axis_type=_scale(
                [float(m.samples[name][(99 * len(m.samples[name])) // 100]) for m in known], 20
            ),
            y_range=(0, 102),
        )
        curves = [quantiles(m.samples[name], POINTS) for m in known]
        source = table(
            {
                "xs": [x.tolist() for x, _ in curves],
                "ys": [y.tolist() for _, y in curves],
                "label": [m.label for m in known],
                "colour": [m.colour for m in known],
                "dash": ["dashed" if m.label in dashed else "solid" for m in known],
            }
        )
        lines = drawn.multi_line(
            xs="xs",
            ys="ys",
            source=source,
            line_color="colour",
            line_dash="dash",
            line_width=1.5,
            line_alpha=0.8,
            hover_line_width=3.5,
            hover_line_alpha=1.0,
            hover_line_color="colour",
        )
        tips = [("", "@label"), (f"{name} (ms)", "$x{0,0.000}"), ("share (%)", "$y{0.0}")]
        drawn.add_tools(HoverTool(renderers=[lines], tooltips=tips, line_policy="interp"))
        out.append(drawn)
    return out


def _lines(found: Sequence[Member]) -> list[list[Member]]:
    """Members of a group in the order of the one number that is varied; none where there are several numbers."""
    keys = {key for m in found for key in m.at}
    if len(keys) != 1:
        return []
    (key,) = keys
    groups: dict[str, list[Member]] = {}
    for m in sorted(found, key=lambda m: m.at[key]):
        groups.setdefault(m.group, []).append(m)
    return [path for path in groups.values() if len(path) > 1]


def _scale(values: Sequence[float], times: float = 10) -> str:
    """Logarithmic where the values lie far apart."""
    return "log" if min(values) > 0 and max(values) > times * min(values) else "linear"
