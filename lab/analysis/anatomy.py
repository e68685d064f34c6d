"""Figures that take latencies and the KV cache apart: stages, phases, hits, blocks. Observation path.

As all figures here they are values (`lab/analysis/plots.py` has them all); the notebooks draw with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import (
    KV_COLOURS,
    OTHER_COLOURS,
    STAGE_COLOURS,
    STAGE_LABELS,
    blank,
    labelled,
    legend,
    set_from_zero,
    styled,
)
from lab.analysis.frames import STAGES, RunLike, finished
from lab.analysis.tidy import phases, stages

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS = {
    "plan": "#0072B2",
    "transfer": "#56B4E9",
    "prepare": "#F0E442",
    "forward": "#009E73",
    "sample": "#E69F00",
    "compact": "#CC79A7",
    "commit": "#D55E00",
}


@styled
def time_by_stage(runs: Sequence[RunLike]) -> Figure:
    """Where a finished request's time goes on average: a bar a run, its stages end to end."""
    rows = {}
    for label, _, run in labelled(runs):
        done = finished(run.requests).index
        pieces = stages(run)
        total = pieces[pieces["id"].isin(done)].groupby("stage")["duration_ms"].sum()
        rows[label] = total.reindex(list(STAGES), fill_value=0.0) / max(1, len(done))
    figure, (axis,) = blank(1, 1, 0.9 + 0.5 * len(rows))
    _bars(axis, rows, STAGE_COLOURS, STAGE_LABELS)
    axis.set(title="Mean time of a request by stage", xlabel="time (ms)")
    return figure


@styled
def slowest_requests(run: RunLike, most: int = 12) -> Figure:
    """The requests with the largest E2E, slowest on top, each by stage."""
    slow = finished(run.requests).nlargest(most, "e2e_ns")
    table = stages(run).pivot_table(
        index="id", columns="stage", values="duration_ms", aggfunc="sum", fill_value=0.0, observed=True
    )
    rows = {str(name): table.loc[name].reindex(list(STAGES), fill_value=0.0) for name in slow.index}
    figure, (axis,) = blank(1, 1, 0.9 + 0.22 * max(1, len(rows)))
    _bars(axis, rows, STAGE_COLOURS, STAGE_LABELS)
    axis.set(title=f"The {len(rows)} slowest requests by stage", xlabel="time since arrival (ms)")
    return figure


@styled
def time_by_phase(runs: Sequence[RunLike]) -> Figure:
    """Where a step's time goes on average, control plane and data plane: steps with a prefill apart from others."""
    rows = {}
    for label, _, run in labelled(runs):
        table = phases(run)
        for has, kind in ((True, "with prefill"), (False, "decode only")):
            part = table[(table["prefill_tokens"] > 0) == has]
            if len(part):
                rows[f"{label}, {kind}"] = part.groupby("phase")["duration_ms"].mean()
    figure, (axis,) = blank(1, 1, 0.9 + 0.4 * max(1, len(rows)))
    shown = {name: name for name in PHASE_COLOURS}
    _bars(axis, rows, PHASE_COLOURS, shown)
    axis.set(title="Mean time of a step by phase", xlabel="time (ms)")
    return figure


def _bars(
    axis: Axes, rows: Mapping[str, pd.Series[float]], colours: Mapping[str, str], labels: Mapping[str, str]
) -> None:
    """Horizontal bars of parts end to end, the first row on top; parts that nobody has are left out."""
    names, left = list(rows), [0.0] * len(rows)
    for part, colour in colours.items():
        widths = [float(rows[name].get(part, 0.0)) for name in names]
        if any(widths):
            axis.barh(names, widths, left=left, color=colour, label=labels[part], height=0.62)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    legend(axis, outside=True)


@styled
def cache_hits(runs: Sequence[RunLike]) -> Figure:
    """Prompt tokens that the prefix cache supplied: of each request, and of all up to it."""
    figure, axes = blank(1, len(runs), 2.6)
    for axis, (label, colour, run) in zip(axes, labelled(runs), strict=True):
        served = run.requests[run.requests["computed_tokens"] > 0].sort_values("first_scheduled_ns")
        time = served["first_scheduled_ns"] / 1e9
        share = served["cached_tokens"] / served["prompt_tokens"]
        overall = served["cached_tokens"].cumsum() / served["prompt_tokens"].cumsum()
        axis.scatter(time, 100 * share, s=10, color="#999999", linewidths=0, label="each request")
        axis.plot(time, 100 * overall, color=colour, linewidth=1.6, label="all so far, by token")
        axis.set(title=f"{label}: prefix cache", xlabel="first scheduled (s)", ylabel="prompt tokens hit (%)")
        axis.set_ylim(-3, 103)
        set_from_zero(axis)
        legend(axis)
    return figure


@styled
def block_flows(run: RunLike) -> Figure:
    """KV blocks taken, given back and evicted, summed up over time; below, what the pool holds."""
    figure, axes = blank(2, 1, 4.2, share=True)
    steps = run.steps.sort_values(["start_ns", "replica"])
    time = steps["start_ns"] / 1e9
    flows = {
        "taken afresh": steps["allocated"],
        "given back": steps["released_plan"] + steps["released_commit"],
        "evicted": steps["evicted"],
    }
    for (name, flow), colour in zip(flows.items(), OTHER_COLOURS, strict=False):
        axes[0].step(time, flow.cumsum(), where="post", color=colour, label=name, linewidth=1.3)
    axes[0].set(title="KV blocks so far", ylabel="blocks")
    axes[1].stackplot(
        time,
        *(steps[f"blocks_{part}"] for part in KV_COLOURS),
        colors=list(KV_COLOURS.values()),
        labels=["held by requests", "cached, reusable", "free"],
        step="post",
        linewidth=0,
    )
    axes[1].set(title="The pool after planning", xlabel="time since the run began (s)", ylabel="blocks")
    for axis in axes:
        set_from_zero(axis, both=True)
        legend(axis, outside=True)
    return figure


@styled
def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    log: bool = False,
) -> Figure:
    """Named lines of (x, y); `x` and `y` are the axes' words, with units. `log`: the x axis in powers of two."""
    figure, (axis,) = blank(1, 1, 2.9)
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.4}
    for (name, (xs, ys)), colour in zip(lines.items(), _colours(len(lines)), strict=True):
        axis.plot(xs, ys, label=name, color=colour, **style)
    if log:
        axis.set_xscale("log", base=2)
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.set_ylim(bottom=0)
    legend(axis, outside=len(lines) > 3)
    return figure


def _colours(count: int) -> list[str]:
    return [OTHER_COLOURS[i % len(OTHER_COLOURS)] for i in range(count)]
