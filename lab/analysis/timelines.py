"""Figures over time: what each request went through, what each step carried, who owns the KV cache.

Observation path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import (
    KV_COLOURS,
    SIDE_COLOURS,
    STAGE_COLOURS,
    STAGE_LABELS,
    blank,
    evenly,
    labelled,
    legend,
    over_time,
    styled,
    summed,
)
from lab.analysis.frames import RunLike, intervals, stages_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LANES = 60
"""Requests drawn in the swimlanes; more than that are thinned evenly."""


@styled
def swimlanes(runs: Sequence[RunLike], most: int = MOST_LANES) -> Figure:
    """Each request's stages over time; with two runs a lane holds the candidate above the reference."""
    import numpy as np
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    shown = stages_of(*runs)
    arrivals = runs[0].requests.sort_values(["arrival_ns", "seq"])
    chosen = arrivals["id"].iloc[evenly(len(arrivals), most)].tolist()
    lane = {request: i for i, request in enumerate(chosen)}
    figure, (axis,) = blank(1, 1, max(2.2, min(9.0, 0.9 + 0.11 * len(chosen))))
    height = 0.84 / len(runs)
    for i, run in enumerate(reversed(runs)):
        pieces = intervals(run.requests[run.requests["id"].isin(lane)])
        for stage in shown:
            part = pieces[pieces["stage"] == stage]
            start, end = (part[column].to_numpy() / 1e9 for column in ("start_ns", "end_ns"))
            top = part["id"].map(lane).to_numpy(dtype=float) - 0.42 + i * height
            boxes: Any = (
                np.stack(
                    [
                        np.stack([x, top + y], axis=-1)
                        for x, y in ((start, 0), (end, 0), (end, height), (start, height))
                    ],
                    axis=1,
                )
                if len(part)
                else []
            )
            alpha = 1.0 if i == len(runs) - 1 else 0.7
            axis.add_collection(
                PolyCollection(
                    boxes,  # an edge of its own colour keeps what is shorter than a pixel in sight
                    facecolors=STAGE_COLOURS[stage],
                    edgecolors=STAGE_COLOURS[stage],
                    alpha=alpha,
                    linewidths=0.5,
                )
            )
    if chosen:
        axis.autoscale_view()
        axis.set_ylim(len(chosen) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    note = (
        "" if len(chosen) == len(arrivals) else f"; {len(chosen)} of {len(arrivals)} requests, evenly thinned"
    )
    order = ""
    if len(runs) == 2:
        below, above = (label for label, _, _ in labelled(runs))
        order = f"; in each lane {above} (paler) above {below}"
    axis.set(title=f"Requests over time by stage{order}{note}", xlabel="time since the run began (s)")
    axis.set_ylabel("request, by arrival")
    handles = [Patch(color=STAGE_COLOURS[stage], label=STAGE_LABELS[stage]) for stage in shown]
    axis.legend(handles=handles, loc="upper right", ncols=1, fontsize=8)
    return figure


@styled
def batch_composition(runs: Sequence[RunLike]) -> Figure:
    """Prefill and decode tokens of the steps over time: a panel for each kind, a curve for each run."""
    figure, axes = blank(2, 1, 3.8, share=True)
    titles = {
        "prefill_tokens": "Prompt tokens in each step's batch",
        "decode_tokens": "Decode tokens in each step's batch",
    }
    _curves(axes, titles, "tokens", runs)
    return figure


@styled
def kv_occupancy(runs: Sequence[RunLike]) -> Figure:
    """KV blocks held, cached and free over time, stacked to the size of the pool, one panel a run."""
    figure, axes = blank(len(runs), 1, 1.9 * len(runs) + 0.3, share=True)
    for axis, (label, _, run) in zip(axes, labelled(runs), strict=True):
        columns, note = ("blocks_held", "blocks_cached", "blocks_free"), ""
        steps = over_time(summed(run.steps, columns), columns, "last")
        if len(steps):
            axis.stackplot(
                steps["time_s"],
                *(steps[column] for column in columns),
                labels=("held by requests", "cached, reusable", "free"),
                colors=list(KV_COLOURS.values()),
                step="post",
                linewidth=0,
            )
            pool, used = (
                int(steps[list(part)].sum(axis=1).max())
                for part in (columns, ("blocks_held", "blocks_cached"))
            )
            nearly_empty = 3 * used < pool
            axis.set_ylim(0, max(1, 1.3 * used if nearly_empty else pool))
            axis.grid(visible=False)
            note = f", lower part of {pool:,}" if nearly_empty else f" of {pool:,}"
        axis.set(title=f"{label}: KV blocks after planning{note}", ylabel="blocks")
        legend(axis, outside=True)
    axes[-1].set_xlabel("time since the run began (s)")
    return figure


@styled
def queue_depth(runs: Sequence[RunLike]) -> Figure:
    """Requests waiting and running over time: a panel for each, a curve for each run."""
    figure, axes = blank(2, 1, 3.8, share=True)
    titles = {"waiting": "Requests waiting after planning", "running": "Requests running after planning"}
    _curves(axes, titles, "requests", runs)
    return figure


def _curves(axes: Sequence[Axes], titles: dict[str, str], unit: str, runs: Sequence[RunLike]) -> None:
    """One column of the steps in each panel, one curve for each run; zero while a replica is idle."""
    from matplotlib.ticker import MaxNLocator

    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        thinned = 1
        for label, colour, run in labelled(runs):
            busy = summed(run.steps, (column,), idle=True)
            steps = over_time(busy, (column,), "max")
            if steps.empty:
                continue
            thinned = max(thinned, -(-len(busy) // len(steps)))
            style: dict[str, Any] = {
                "linestyle": "-" if colour != SIDE_COLOURS["sim"] else "--",
                "linewidth": 1.1,
            }
            axis.step(steps["time_s"], steps[column], where="post", color=colour, label=label, **style)
        note = f" (largest of every {thinned})" if thinned > 1 else ""
        axis.set(title=f"{title}{note}", ylabel=unit)
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        legend(axis)
    axes[-1].set_xlabel("time since the run began (s)")
