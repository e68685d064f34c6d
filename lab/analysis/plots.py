"""Figures of one run or of a pair, as functions that return a matplotlib `Figure`. Observation path.

Notebooks and the report draw with the same functions. No pyplot state, no display: a figure is a value.
Colours come from Okabe and Ito's colour-blind safe set and mean the same thing in every figure; the page's
own timeline uses them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from lab.analysis.frames import STAGES, RunLike, backend, finished, gaps_ns, intervals, name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lab.analysis.diff import Diff

SIDE_COLOURS = {"real": "#0072B2", "sim": "#D55E00"}
OTHER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STAGE_COLOURS = {"queue": "#B8B8B8", "preempted": "#CC79A7", "prefill": "#E69F00", "decode": "#009E73"}
KV_COLOURS = {"held": "#332288", "cached": "#88CCEE", "free": "#ECECEC"}

MOST_LANES = 60
"""Requests drawn in the swimlanes; more than that are thinned evenly."""
MOST_POINTS = 4000
"""Points in one scatter; more than that are thinned evenly, so that a page stays small."""

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "diptych",
}


P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under the house style, and leave matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return inside


def labelled(runs: Sequence[RunLike]) -> list[tuple[str, str, RunLike]]:
    """(label, colour, run): real and sim keep their colours, anything else takes the next free one."""
    out: list[tuple[str, str, RunLike]] = []
    sides = [backend(run) for run in runs]
    by_backend = all(sides) and len(set(sides)) == len(sides)
    for i, run in enumerate(runs):
        if by_backend:
            out.append((sides[i], SIDE_COLOURS[sides[i]], run))
        else:
            label = name(run) if len(runs) == 1 else f"{name(run)} ({'abcd'[i]})"
            out.append((label, OTHER_COLOURS[i], run))
    return out


@styled
def latency_cdfs(runs: Sequence[RunLike]) -> Figure:
    """Cumulative distributions of TTFT, E2E and ITL, one curve a run."""
    import seaborn as sns

    figure, axes = _figure(1, 3, 3.1)
    for axis, what in zip(axes, ("TTFT", "E2E", "ITL"), strict=True):
        for label, colour, run in labelled(runs):
            done = finished(run.requests)
            values = gaps_ns(done) if what == "ITL" else done[f"{what.lower()}_ns"].to_numpy()
            if len(values):
                style = "-" if colour != SIDE_COLOURS["sim"] else "--"
                sns.ecdfplot(
                    x=values / 1e6, ax=axis, color=colour, label=label, linestyle=style, linewidth=1.6
                )
        samples = "token gaps" if what == "ITL" else "requests"
        axis.set(
            title=f"{what} over {samples}", xlabel=f"{what} (ms)", ylabel="share at or below", ylim=(0, 1.02)
        )
        _set_from_zero(axis)
        _legend(axis, place="lower right")
    return figure


@styled
def swimlanes(runs: Sequence[RunLike], most: int = MOST_LANES) -> Figure:
    """Each request's stages over time; with two runs a lane holds the candidate above the reference."""
    import numpy as np
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    arrivals = runs[0].requests.sort_values(["arrival_ns", "seq"])
    chosen = arrivals["id"].iloc[_evenly(len(arrivals), most)].tolist()
    lane = {request: i for i, request in enumerate(chosen)}
    figure, (axis,) = _figure(1, 1, max(2.2, min(9.0, 0.9 + 0.11 * len(chosen))))
    height = 0.84 / len(runs)
    for i, run in enumerate(reversed(runs)):
        pieces = intervals(run.requests[run.requests["id"].isin(lane)])
        for stage in STAGES:
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
                    boxes, facecolors=STAGE_COLOURS[stage], alpha=alpha, edgecolors="white", linewidths=0.2
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
    handles = [Patch(color=STAGE_COLOURS[stage], label=_STAGE_LABELS[stage]) for stage in STAGES]
    axis.legend(handles=handles, loc="upper right", ncols=1, fontsize=8)
    return figure


_STAGE_LABELS = {
    "queue": "queue",
    "preempted": "queue after preemption",
    "prefill": "prefill",
    "decode": "decode",
}


@styled
def batch_composition(runs: Sequence[RunLike]) -> Figure:
    """Prefill and decode tokens of the steps over time: a panel for each kind, a curve for each run."""
    figure, axes = _figure(2, 1, 3.8, share=True)
    titles = {
        "prefill_tokens": "Prompt tokens in each step's batch",
        "decode_tokens": "Decode tokens in each step's batch",
    }
    _curves(axes, titles, "tokens", runs)
    return figure


@styled
def kv_occupancy(runs: Sequence[RunLike]) -> Figure:
    """KV blocks held, cached and free over time, stacked to the size of the pool, one panel a run."""
    figure, axes = _figure(len(runs), 1, 1.9 * len(runs) + 0.3, share=True)
    for axis, (label, _, run) in zip(axes, labelled(runs), strict=True):
        columns, note = ("blocks_held", "blocks_cached", "blocks_free"), ""
        steps = _over_time(run.steps, columns, "last")
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
        _legend(axis, outside=True)
    axes[-1].set_xlabel("time since the run began (s)")
    return figure


@styled
def queue_depth(runs: Sequence[RunLike]) -> Figure:
    """Requests waiting and running over time: a panel for each, a curve for each run."""
    figure, axes = _figure(2, 1, 3.8, share=True)
    titles = {"waiting": "Requests waiting after planning", "running": "Requests running after planning"}
    _curves(axes, titles, "requests", runs)
    return figure


def _curves(axes: Sequence[Axes], titles: dict[str, str], unit: str, runs: Sequence[RunLike]) -> None:
    """One column of the steps in each panel, one curve for each run; zero while a replica is idle."""
    from matplotlib.ticker import MaxNLocator

    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        thinned = 1
        for label, colour, run in labelled(runs):
            busy = _with_idle(run.steps, column)
            steps = _over_time(busy, (column,), "max")
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
        _legend(axis)
    axes[-1].set_xlabel("time since the run began (s)")


@styled
def step_time(runs: Sequence[RunLike]) -> Figure:
    """Step duration against tokens; for a pair also aligned steps against each other, and the residuals.

    Steps are aligned while the plan digests agree: there both sides executed the same work.
    """
    figure, axes = _figure(1, 3 if len(runs) == 2 else 1, 3.2)
    sides = labelled(runs)
    for label, colour, run in sides:
        steps = run.steps.iloc[_evenly(len(run.steps), MOST_POINTS)]
        tokens, duration = steps["prefill_tokens"] + steps["decode_tokens"], _duration_ms(steps)
        marker = "o" if colour != SIDE_COLOURS["sim"] else "x"
        axes[0].scatter(
            tokens, duration, s=9, color=colour, marker=marker, alpha=0.45, linewidths=0.8, label=label
        )
    axes[0].set(
        title="Step duration by batch tokens", xlabel="tokens in the batch", ylabel="step duration (ms)"
    )
    _set_from_zero(axes[0], both=True)
    _legend(axes[0])
    if len(runs) != 2:
        return figure
    pairs = aligned_steps(*runs)
    shown = pairs.iloc[_evenly(len(pairs), MOST_POINTS)]
    (x_name, _, _), (y_name, _, _) = sides
    residual = shown["duration_ms_b"] - shown["duration_ms_a"]
    points: dict[str, Any] = {"s": 9, "alpha": 0.6, "linewidths": 0}
    kind = shown["prefill_tokens"] > 0
    for has_prefill, stage, label in ((False, "decode", "decode only"), (True, "prefill", "with prefill")):
        part = kind == has_prefill
        colour = STAGE_COLOURS[stage]
        axes[1].scatter(
            shown["duration_ms_a"][part], shown["duration_ms_b"][part], color=colour, label=label, **points
        )
        axes[2].scatter(shown["tokens"][part], residual[part], color=colour, label=label, **points)
    limit = float(shown[["duration_ms_a", "duration_ms_b"]].to_numpy().max()) * 1.05 if len(shown) else 1.0
    axes[1].plot([0, limit], [0, limit], color="#555555", linewidth=0.8)
    axes[1].set(title=f"{len(pairs)} steps with equal decisions", xlim=(0, limit), ylim=(0, limit))
    axes[1].set(xlabel=f"{x_name} step (ms)", ylabel=f"{y_name} step (ms)")
    axes[2].axhline(0, color="#555555", linewidth=0.8)
    axes[2].set(
        title=f"Residual: {y_name} - {x_name}", xlabel="tokens in the batch", ylabel="difference (ms)"
    )
    for axis in axes[1:]:
        _legend(axis)
    return figure


def aligned_steps(a: RunLike, b: RunLike) -> pd.DataFrame:
    """Steps with equal digests: step, tokens, prefill_tokens, context_tokens, duration_ms_a, duration_ms_b."""
    keys = ["replica", "step", "digest"]
    columns = [*keys, "prefill_tokens", "decode_tokens", "context_tokens"]
    left = a.steps[columns].assign(duration_ms_a=_duration_ms(a.steps))
    right = b.steps[keys].assign(duration_ms_b=_duration_ms(b.steps))
    both = left.merge(right, on=keys)
    return both.assign(tokens=both["prefill_tokens"] + both["decode_tokens"])


@styled
def request_errors(diff: Diff) -> Figure:
    """Each request's E2E and TTFT on one side against the other, and its E2E difference over arrival time."""
    figure, axes = _figure(1, 3, 3.2)
    a, b = diff.labels
    table = diff.requests.iloc[_evenly(len(diff.requests), MOST_POINTS)]
    points: dict[str, Any] = {"s": 12, "alpha": 0.6, "linewidths": 0, "color": OTHER_COLOURS[0]}
    for axis, what in zip(axes, ("e2e", "ttft"), strict=False):
        x, y = (table[f"{what}_ns_{key}"] / 1e6 for key in diff.keys)
        limit = max(float(x.max()), float(y.max())) * 1.05 if len(table) else 1.0
        axis.plot([0, limit], [0, limit], color="#555555", linewidth=0.8)
        axis.scatter(x, y, **points)
        axis.set(title=f"{what.upper()} of each request", xlim=(0, limit), ylim=(0, limit))
        axis.set(xlabel=f"{a} (ms)", ylabel=f"{b} (ms)")
    axes[2].axhline(0, color="#555555", linewidth=0.8)
    axes[2].scatter(table["arrival_ns"] / 1e9, table["e2e_delta_ns"] / 1e6, **points)
    axes[2].set(title=f"E2E difference: {b} - {a}", xlabel="arrival (s)", ylabel="difference (ms)")
    return figure


@styled
def attribution_bars(diff: Diff) -> Figure:
    """The mean difference of a request's E2E and TTFT by stage, signed; bars of one panel add up to its total."""
    figure, axes = _figure(1, 2, 2.3)
    a, b = diff.labels
    for axis, what in zip(axes, ("e2e", "ttft"), strict=True):
        found = diff.attribution[what]
        stages = [
            stage
            for stage in STAGES
            if what == "e2e" or stage != "decode" or found["stages"][stage]["total_ms"]
        ]
        values = [found["stages"][stage]["mean_ms"] for stage in stages] + [found["mean_ms"]]
        colours = [STAGE_COLOURS[stage] for stage in stages] + ["#444444"]
        names = [_STAGE_LABELS[stage] for stage in stages] + ["total"]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(
            bars, labels=[f"{value:+.3f}" if value else "0" for value in values], padding=3, fontsize=8
        )
        axis.invert_yaxis()
        axis.margins(x=0.22)
        axis.axvline(0, color="#555555", linewidth=0.8)
        axis.grid(visible=False, axis="y")
        axis.set(title=f"{what.upper()}: {b} - {a} by stage", xlabel="mean difference a request (ms)")
    return figure


Caption = tuple[str, str, str]
"""(anchor, title, one sentence)."""


def figures(runs: Sequence[RunLike], diff: Diff | None = None) -> Iterator[tuple[Caption, Figure]]:
    """Every figure that these runs allow, with what it shows; the order is the report's."""
    pair = len(runs) == 2
    if diff is not None:
        text = "Where the mean difference of a request comes from; the stages add up to the total exactly."
        yield ("attribution", "Attribution by stage", text), attribution_bars(diff)
    plain: list[tuple[Caption, Callable[[Sequence[RunLike]], Figure]]] = [
        (
            (
                "cdf",
                "Latency distributions",
                "How the latencies are distributed over requests and token gaps.",
            ),
            latency_cdfs,
        ),
        (("lanes", "Requests over time", "What each request waited for and when it ran."), swimlanes),
        (
            ("batch", "Batch composition", "How many prompt and decode tokens each step carried."),
            batch_composition,
        ),
        (("kv", "KV cache", "Who owns the blocks of the KV pool over time."), kv_occupancy),
        (("queue", "Queue and running set", "How many requests wait and run after each plan."), queue_depth),
        (
            (
                "steps",
                "Step time" + (": predicted against measured" if pair else ""),
                "How long steps take by their size"
                + (", and how the two sides compare on steps that carried the same work." if pair else "."),
            ),
            step_time,
        ),
    ]
    for caption, draw in plain:
        yield caption, draw(runs)
    if diff is not None:
        text = "Each matched request on both sides; points on the line took equally long."
        yield ("requests", "Error by request", text), request_errors(diff)


def _figure(rows: int, columns: int, height: float, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(9.6, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share)
    return figure, list(axes.flat)


def _duration_ms(steps: pd.DataFrame) -> pd.Series[float]:
    return (steps["end_ns"] - steps["start_ns"]) / 1e6


def _with_idle(steps: pd.DataFrame, column: str) -> pd.DataFrame:
    """Start and value of each step, with a zero where the next one doesn't follow at once."""
    import pandas as pd

    ordered = steps[["start_ns", "end_ns", column]].sort_values("start_ns")
    pause = ordered["end_ns"] < ordered["start_ns"].shift(-1, fill_value=1 << 62)
    zeros = pd.DataFrame({"start_ns": ordered.loc[pause, "end_ns"], column: 0})
    return pd.concat([ordered[["start_ns", column]], zeros]).sort_values("start_ns", kind="stable")


def _over_time(steps: pd.DataFrame, columns: Sequence[str], how: str, most: int = 1500) -> pd.DataFrame:
    """`time_s` and columns, at most `most` rows: runs of steps are reduced by `how` (`max`, `last`)."""
    import numpy as np

    ordered = steps.sort_values("start_ns")
    frame = ordered[list(columns)].assign(time_s=ordered["start_ns"] / 1e9)
    if len(frame) <= most:
        return frame
    bucket = np.arange(len(frame)) // -(-len(frame) // most)
    grouped = frame.groupby(bucket)
    return grouped.agg(dict.fromkeys(columns, how) | {"time_s": "first"})


def _evenly(count: int, most: int) -> list[int]:
    """Positions of at most `most` of `count` rows, evenly spread."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _set_from_zero(axis: Axes, *, both: bool = False) -> None:
    axis.set_xlim(left=0)
    if both:
        axis.set_ylim(bottom=0)


def _legend(axis: Axes, *, outside: bool = False, place: Literal["best", "lower right"] = "best") -> None:
    """A legend where something is labelled; an axis without data says so instead of staying empty."""
    handles, _ = axis.get_legend_handles_labels()
    if not handles:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", va="center", color="#777777")
    elif outside:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axis.legend(fontsize=8, loc=place)
