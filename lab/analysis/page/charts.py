"""Interactive charts beside the timeline: latencies, cache hits, fairness, residuals. Observation path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lab.analysis.fairness import service
from lab.analysis.frames import RunLike, finished, gaps_ns, tpot_ns
from lab.analysis.page.house import Side, chart, legend_above, table
from lab.analysis.residuals import residual_map

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from bokeh.plotting import figure
    from numpy.typing import NDArray

    from lab.analysis.difference import Diff

MOST_QUANTILES = 400
"""Points of one distribution; more samples than that are drawn at evenly spaced ranks, and at both ends."""
HIT_WINDOWS = 60
LATENCIES = {
    "TTFT": "time to the first token, over requests",
    "TPOT": "mean time a token after the first, over requests",
    "ITL": "time between tokens, over gaps",
    "E2E": "time from arrival to the last token, over requests",
}

Linked = Callable[..., Any]
"""`(height, title, unit)` -> an empty chart on the shared axis of time."""


def latencies_ms(run: RunLike) -> dict[str, NDArray[np.float64]]:
    """Samples of each of `LATENCIES`, sorted, of the finished requests."""
    import numpy as np

    done = finished(run.requests)
    found = {"TTFT": done["ttft_ns"], "TPOT": tpot_ns(done), "ITL": gaps_ns(done), "E2E": done["e2e_ns"]}
    return {name: np.sort(np.asarray(values, dtype=np.float64)) / 1e6 for name, values in found.items()}


def distributions(samples: Sequence[dict[str, NDArray[np.float64]]], sides: Sequence[Side]) -> list[figure]:
    """A cumulative distribution a latency, one curve a run."""
    from bokeh.models import HoverTool

    out = []
    for name, words in LATENCIES.items():
        pooled = [values[name] for values in samples if len(values[name])]
        far = any(values[-1] > 50 * max(values[len(values) // 2], 1e-9) > 0 for values in pooled)
        drawn = chart(
            265, f"{name}: {words}", f"{name} (ms)", "share at or below (%)",
            x_axis_type="log" if far else "linear", y_range=(0, 102), width=480,
        )  # fmt: skip
        for values, side in zip(samples, sides, strict=True):
            if not len(values[name]):
                continue
            x, share = quantiles(values[name])
            line = drawn.line(
                x="x", y="share", source=table({"x": x, "share": share}), line_color=side.colour,
                line_width=1.8, line_dash=side.dash, legend_label=side.label,
            )  # fmt: skip
            tips = [(side.label, "@share{0.0} % within @x{0,0.000} ms")]
            drawn.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="hline", line_policy="nearest"))
        legend_above(drawn)
        out.append(drawn)
    return out


def quantiles(
    values: NDArray[np.float64], most: int = MOST_QUANTILES
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Values and the share of samples at or below each, in percent."""
    import numpy as np

    ranks = np.unique(np.linspace(0, len(values) - 1, min(len(values), most)).astype(np.int64))
    x = values[ranks].astype(np.float32)
    share = (100 * np.searchsorted(values, values[ranks], "right") / len(values)).astype(np.float32)
    return np.append(x[:1], x), np.append(np.float32(0), share)


def hits(runs: Sequence[RunLike], sides: Sequence[Side], linked: Linked) -> list[figure]:
    """Prompt tokens that the prefix cache supplied, by the moment when a request was first scheduled."""
    import numpy as np
    from bokeh.models import HoverTool

    drawn = linked(
        185,
        "Prompt tokens from the prefix cache: bold, all so far; pale, by window",
        "share (%)",
        y_range=(-2, 102),
    )
    for run, side in zip(runs, sides, strict=True):
        requests = run.requests
        served = requests[requests["computed_tokens"] > 0].sort_values("first_scheduled_ns")
        if served.empty:
            continue
        moment = served["first_scheduled_ns"].to_numpy(dtype=np.float64) / 1e9
        cached, prompt = (served[c].to_numpy(dtype=np.float64) for c in ("cached_tokens", "prompt_tokens"))
        edges = np.linspace(moment[0], moment[-1], HIT_WINDOWS + 1)
        place = np.clip(np.searchsorted(edges, moment, "right") - 1, 0, HIT_WINDOWS - 1)
        tokens = np.bincount(place, prompt, HIT_WINDOWS)
        share = 100 * np.divide(
            np.bincount(place, cached, HIT_WINDOWS),
            tokens,
            where=tokens > 0,
            out=np.full(HIT_WINDOWS, np.nan),
        )
        drawn.step(
            x=np.append(edges[:-1], edges[-1]), y=np.append(share, share[-1]), mode="after",
            line_color=side.colour, line_alpha=0.4, line_width=1.2,
        )  # fmt: skip
        kept = np.unique(np.linspace(0, len(moment) - 1, min(len(moment), 800)).astype(np.int64))
        source = table(
            {
                "t": moment[kept].astype(np.float32),
                "share": (100 * cached.cumsum() / prompt.cumsum())[kept].astype(np.float32),
            }
        )
        line = drawn.line(
            x="t", y="share", source=source, line_color=side.colour, line_width=2, line_dash=side.dash,
            legend_label=side.label,
        )  # fmt: skip
        tips = [(side.label, "@share{0.0} % of prompt tokens so far"), ("until", "@t{0,0.000} s")]
        drawn.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tips, line_policy="prev"))
    legend_above(drawn)
    return [drawn]


def fairness(runs: Sequence[RunLike], sides: Sequence[Side], linked: Linked) -> list[figure]:
    """Jain's index and VTC's difference between tenants over time; nothing where there is one tenant."""
    import numpy as np
    from bokeh.models import HoverTool

    if all(run.requests["tenant"].nunique() < 2 for run in runs):
        return []
    found = [service(run.requests) for run in runs]
    charts: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        (
            "jain",
            "Jain's index of service over max-min fair shares: 1 is even",
            "index",
            {"y_range": (0, 1.05)},
        ),
        ("difference", "VTC's D: service that tenants lack against the one served most", "tokens/s", {}),
    )
    out = []
    for what, title, unit, options in charts:
        drawn = linked(168, title, unit, **options)
        for served, side in zip(found, sides, strict=True):
            columns = {"t": served.middles_s, "y": np.asarray(getattr(served, what))}
            source = table(columns)
            line = drawn.line(
                x="t", y="y", source=source, line_color=side.colour, line_width=1.6, line_dash=side.dash,
                legend_label=side.label,
            )  # fmt: skip
            drawn.scatter(x="t", y="y", source=source, color=side.colour, size=5)
            tips = [(side.label, f"@y{{0,0.000}} {unit}"), ("window around", "@t{0,0.000} s")]
            drawn.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tips))
        if what == "difference":
            drawn.y_range.start = 0
        legend_above(drawn)
        out.append(drawn)
    return out


def residual_charts(diff: Diff) -> list[figure]:
    """The mean error of a step's duration by its shape, over steps that did the same work."""
    if not diff.residuals["residual_ns"].any():
        return []
    bins = residual_map(diff.residuals)
    shapes = (("context_from", "context tokens"), ("batch_from", "requests in the batch"))
    return [_heat(bins, column, what, diff) for column, what in shapes]


def _heat(bins: pd.DataFrame, column: str, what: str, diff: Diff) -> figure:
    import numpy as np
    from bokeh.models import ColorBar, HoverTool, LinearColorMapper
    from bokeh.palettes import RdBu11

    a, b = diff.labels
    took = bins.assign(a_total=bins["a_ms"] * bins["steps"], b_total=bins["b_ms"] * bins["steps"])
    cells = took.groupby([column, "tokens_from"], as_index=False)[
        ["steps", "a_total", "b_total", "total_ms"]
    ].sum()
    error = 100 * cells["total_ms"] / cells["a_total"].where(cells["a_total"] > 0)
    rows, columns = (sorted({int(v) for v in cells[c]}) for c in (column, "tokens_from"))
    size: dict[str, Any] = {
        "x_range": [f"{v:,}" for v in columns], "y_range": [f"{v:,}" for v in rows], "width": 480,
    }  # fmt: skip
    drawn = chart(
        max(220, 110 + 24 * len(rows)), f"Step time of {b} against {a}: mean error (%)",
        "tokens in the step, from", f"{what}, from", tools="", **size,
    )  # fmt: skip
    from bokeh.models import CategoricalTickFormatter

    drawn.xaxis.formatter = drawn.yaxis.formatter = CategoricalTickFormatter()
    drawn.grid.visible = False
    largest = float(np.nanpercentile(np.abs(error.to_numpy(dtype=float)), 95)) if error.notna().any() else 0.0
    limit = max(largest, 1e-9)
    mapper = LinearColorMapper(palette=list(RdBu11), low=-limit, high=limit, nan_color="#999999")
    source = table(
        {
            "x": [f"{v:,}" for v in cells["tokens_from"]],
            "y": [f"{v:,}" for v in cells[column]],
            "error": error.to_numpy(dtype=np.float32),
            "steps": cells["steps"].to_numpy(dtype=np.int32),
            "a": (cells["a_total"] / cells["steps"]).to_numpy(dtype=np.float32),
            "b": (cells["b_total"] / cells["steps"]).to_numpy(dtype=np.float32),
            "total": cells["total_ms"].to_numpy(dtype=np.float32),
        }
    )
    boxes = drawn.rect(
        x="x", y="y", width=0.96, height=0.94, source=source, line_color=None,
        fill_color={"field": "error", "transform": mapper},
    )  # fmt: skip
    tips = [
        ("tokens, from", "@x"), (f"{what}, from", "@y"), ("steps", "@steps{0,0}"),
        ("mean error", "@error{+0.00} %"), (f"{a}, mean", "@a{0,0.000} ms"), (f"{b}, mean", "@b{0,0.000} ms"),
        ("in all", "@total{+0,0.000} ms"),
    ]  # fmt: skip
    drawn.add_tools(HoverTool(renderers=[boxes], tooltips=tips))
    drawn.toolbar_location = None
    drawn.add_layout(ColorBar(color_mapper=mapper, width=10, padding=4), "right")
    return drawn
