"""The pictures of a study, for a page and for print. Observation path.

In all of them the five best, and `fcfs` (or `lru`) as what one compares with, have a colour; all others are grey, and
every one is named where it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import blank, styled
from lab.analysis.fairness import service
from lab.analysis.runs import load
from lab.analysis.studies.labels import beside, rail
from lab.analysis.studies.table import E2E, HITS, is_cache, mean_by_name
from lab.config import SEAMS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lab.studies import StudyRun

BEST = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's colour-blind safe colours, for the best five in order."""
GREY, BASE = "#8C8C8C", "#000000"
BASELINES = tuple(SEAMS.values())
"""What is chosen when nothing is said: `fcfs`, `lru`, ..."""
BOUNDS = ("belady",)

Picture = tuple[str, str, str, "Figure"]
"""File name, title, what is to be seen, the figure."""


def pictures(frame: pd.DataFrame, runs: Sequence[StudyRun]) -> Iterator[Picture]:
    """Every picture that this study's results can fill."""
    workloads = list(dict.fromkeys(frame["workload"]))
    if is_cache(frame):
        if "kv.blocks" in frame and frame["kv.blocks"].nunique() > 1:
            yield (
                "hits",
                "Hits and the size of the cache",
                "Prefix hits a block access. Shaded: what nobody can reach, since Belady knows the future. "
                "Right: where each stands between fifo (0) and Belady (100), mean over the sizes at which the "
                "two differ.",
                hits(frame),
            )
        return
    for workload in workloads:
        yield (
            f"latency-{workload}",
            f"Latency of all requests: {workload}",
            "Part of the requests that had their last (left) and first (right) token within a time. Names stand "
            "above in the order of the 90th percentile.",
            latency(frame, runs, workload),
        )
    yield (
        "ttft-tpot",
        "First token against the pace of the others",
        "Means over requests; nearer to the lower left corner is better. The line joins those that nobody beats "
        "in both.",
        trade(frame),
    )
    for workload in workloads:
        if frame.loc[frame["workload"] == workload].get("fairness.jain", default()).notna().any():
            yield (
                f"fairness-{workload}",
                f"Fairness between tenants: {workload}",
                "VTC's difference D: service that tenants lack against the one served most, as far as they asked "
                "for it; over time, and its mean (dot) and maximum (bar's end). Jain's index of service over "
                "max-min fair shares: 1 is even; the fairest by it stands on top.",
                fairness(frame, runs, workload),
            )
    if len(workloads) > 1:
        yield (
            "ranks",
            "What is best depends on the workload",
            "Rank by mean E2E, the best on top. Coloured: the five whose rank changes most.",
            ranks(frame),
        )


def default() -> Any:
    """An empty column."""
    import pandas as pd

    return pd.Series(dtype=float)


@styled
def latency(frame: pd.DataFrame, runs: Sequence[StudyRun], workload: str) -> Figure:
    """Two cumulative distributions, a line a policy; runs of several seeds are pooled."""
    import numpy as np

    order = list(mean_by_name(frame[frame["workload"] == workload]).sort_values(E2E).index)
    colours = highlighted(order)
    e2e: dict[str, list[Any]] = {name: [] for name in order}
    ttft: dict[str, list[Any]] = {name: [] for name in order}
    for run in runs:
        if run.workload == workload:
            done = load(run.path).requests.query("outcome == 'finished'")
            e2e[run.name].append((done["end_ns"] - done["arrival_ns"]).to_numpy() / 1e9)
            ttft[run.name].append((done["first_token_ns"] - done["arrival_ns"]).to_numpy() / 1e9)
    figure, panels = blank(1, 2, 5.2)
    for axis, samples, what in zip(panels, (e2e, ttft), ("E2E", "TTFT"), strict=True):
        marks = []
        for name in reversed(order):
            values = np.sort(np.concatenate([*samples[name], np.empty(0)]))
            if len(values) == 0:
                marks.append((1.0, 0.0))
                continue
            strong = colours[name] != GREY
            axis.plot(
                values,
                np.arange(1, len(values) + 1) / len(values),
                color=colours[name],
                linewidth=1.6 if strong else 0.7,
                alpha=1.0 if strong else 0.55,
                linestyle="--" if name in BASELINES else "-",
                zorder=3 if strong else 2,
            )
            marks.append((float(np.percentile(values, 90)), 0.9))
        _logarithmic(axis, "x")
        axis.set_xlabel(f"{what}, s")
        axis.set_ylim(0, 1.0)
        lowest = min(np.percentile(np.concatenate(part), 1) for part in samples.values() if part)
        axis.set_xlim(left=max(lowest, 1e-3))
        shown = list(reversed(order))
        rail(axis, "top", marks, shown, [colours[n] for n in shown], [colours[n] != GREY for n in shown])
    panels[0].set_ylabel("part of the requests")
    return figure


@styled
def trade(frame: pd.DataFrame) -> Figure:
    """Mean TTFT against mean TPOT, a panel a workload."""
    workloads = list(dict.fromkeys(frame["workload"]))
    columns = min(2, len(workloads))
    lines = -(-len(workloads) // columns)
    figure, panels = blank(lines, columns, 4.4 * lines)
    for axis, workload in zip(panels, workloads, strict=False):
        means = mean_by_name(frame[frame["workload"] == workload])
        points = means[["ttft_ms.mean", "tpot_ms.mean"]].dropna()
        x, y = points["ttft_ms.mean"] / 1e3, points["tpot_ms.mean"]
        best = [
            name
            for name in points.index
            if not ((x <= x[name]) & (y <= y[name]) & ((x < x[name]) | (y < y[name]))).any()
        ]
        best.sort(key=lambda name: x[name])
        colours = [BEST[0] if name in best else BASE if name in BASELINES else GREY for name in points.index]
        axis.plot(x[best], y[best], color=BEST[0], linewidth=0.8, alpha=0.6, drawstyle="steps-post", zorder=1)
        axis.scatter(x, y, s=16, c=colours, zorder=3)
        for side, values in (("x", x), ("y", y)):
            if values.max() > 3 * values.min() > 0:
                _logarithmic(axis, side)
        axis.margins(0.16, 0.12)
        axis.set_title(workload)
        axis.set_xlabel("mean TTFT, s")
        axis.set_ylabel("mean TPOT, ms")
    for axis in panels[len(workloads) :]:
        axis.set_visible(False)
    figure.draw_without_rendering()
    for axis, workload in zip(panels, workloads, strict=False):
        means = mean_by_name(frame[frame["workload"] == workload])
        points = means[["ttft_ms.mean", "tpot_ms.mean"]].dropna()
        places = list(zip(points["ttft_ms.mean"] / 1e3, points["tpot_ms.mean"], strict=True))
        colours = [_colour(collection, i) for collection in axis.collections[:1] for i in range(len(points))]
        axis.set_xlim(axis.get_xlim())
        axis.set_ylim(axis.get_ylim())
        beside(axis, places, list(points.index), colours)
    return figure


@styled
def fairness(frame: pd.DataFrame, runs: Sequence[StudyRun], workload: str) -> Figure:
    """D over time, its mean and maximum, and Jain's index."""
    import numpy as np

    means = mean_by_name(frame[frame["workload"] == workload])
    order = list(means.sort_values("fairness.jain", ascending=False).index)
    colours = highlighted(order)
    figure, (over, bars, index) = _columns(1, (2.2, 1.5, 1.0), max(4.2, 0.19 * len(order) + 1.2))
    for name in reversed(order):
        found = [
            service(load(run.path).requests) for run in runs if (run.workload, run.name) == (workload, name)
        ]
        strong = colours[name] != GREY
        over.plot(
            found[0].middles_s,
            np.mean([one.difference for one in found], axis=0),
            color=colours[name],
            linewidth=1.6 if strong else 0.6,
            alpha=1.0 if strong else 0.5,
            linestyle="--" if name in BASELINES else "-",
            label=name if strong else None,
            zorder=3 if strong else 2,
        )
    over.set_xlabel("time, s")
    over.set_ylabel("D, tokens/s")
    over.set_ylim(0, 1.2 * over.get_ylim()[1])  # room for the names
    handles, names = over.get_legend_handles_labels()
    over.legend(handles[::-1], names[::-1], fontsize=7.5, loc="upper left", ncol=2)
    rows = list(range(len(order)))
    shades = [colours[name] for name in order]
    bars.hlines(
        rows,
        means.loc[order, "fairness.difference_mean"],
        means.loc[order, "fairness.difference_max"],
        shades,
        linewidth=1.5,
    )
    bars.scatter(means.loc[order, "fairness.difference_mean"], rows, c=shades, s=18, zorder=3)
    bars.set_xlabel("D: mean to maximum")
    bars.set_xlim(left=0)
    index.scatter(means.loc[order, "fairness.jain"], rows, c=shades, s=18, zorder=3)
    index.set_xlabel("Jain's index, mean")
    for axis in (bars, index):
        axis.set_ylim(len(order) - 0.4, -0.6)
        axis.set_yticks(rows, order if axis is bars else [""] * len(order), fontsize=7.5)
    for label, colour in zip(bars.get_yticklabels(), shades, strict=True):
        label.set_color(colour)
    return figure


@styled
def hits(frame: pd.DataFrame) -> Figure:
    """Hit ratio by capacity, and the mean part of the way from fifo to Belady."""
    workloads = list(dict.fromkeys(frame["workload"]))
    figure, panels = _columns(len(workloads), (2.0, 1.0), 4.4 * len(workloads))
    rails = []
    for workload, axis, bars in zip(workloads, panels[::2], panels[1::2], strict=True):
        part = frame[frame["workload"] == workload]
        table = part.pivot_table(index="kv.blocks", columns="name", values=HITS)
        order = [
            name
            for name in table.mean().sort_values(ascending=False, kind="stable").index
            if name not in BOUNDS
        ]
        colours = highlighted(order)
        for bound in table.columns.intersection(BOUNDS):
            axis.plot(table.index, table[bound], color="#555555", linewidth=1, zorder=2)
            axis.fill_between(table.index, table[bound], 1.0, color="#EBEBEB", linewidth=0, zorder=0)
            middle = len(table) // 2
            axis.annotate(
                bound,
                (table.index[middle], table[bound].iloc[middle]),
                (-8, 6),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="#333333",
            )
        for name in reversed(order):
            strong = colours[name] != GREY
            axis.plot(
                table.index,
                table[name],
                color=colours[name],
                linewidth=1.6 if strong else 0.7,
                alpha=1.0 if strong else 0.6,
                linestyle="--" if name in BASELINES else "-",
                marker="o",
                markersize=3 if strong else 1.5,
                zorder=4 if strong else 3,
            )
        axis.set_xscale("log")
        axis.set_xticks(table.index, [str(size) for size in table.index])
        axis.minorticks_off()
        axis.set_xlim(table.index[0] / 1.05, table.index[-1] * 1.05)
        axis.set_ylim(0, min(1.0, 1.12 * float(table.max().max())))
        axis.set_title(workload)
        axis.set_xlabel("blocks of cache")
        axis.set_ylabel("prefix hits a block access")
        rails.append((axis, table, order, colours))
        if "percent_of_belady" in part:
            way = mean_by_name(part)["percent_of_belady"].reindex(order).dropna().sort_values(ascending=False)
            rows = range(len(way))
            bars.barh(list(rows), way, color=[colours[name] for name in way.index], height=0.7)
            bars.set_yticks(list(rows), list(way.index), fontsize=7.5)
            bars.set_ylim(len(way) - 0.4, -0.6)
            bars.axvline(0, color="#555555", linewidth=0.8)
            bars.set_xlabel("% of the way from fifo to Belady")
            for label in bars.get_yticklabels():
                label.set_color(colours[label.get_text()])
    for axis, table, order, colours in rails:
        alike: dict[tuple[float, ...], list[str]] = {}  # curves that coincide share a label
        for name in reversed(order):
            alike.setdefault(tuple(table[name].round(4)), []).append(name)
        marks = [(float(table.index[-1]), curve[-1]) for curve in alike]
        shades = [max((colours[n] for n in names), key=lambda c: c != GREY) for names in alike.values()]
        shown = [", ".join(reversed(names)) for names in alike.values()]
        rail(axis, "right", marks, shown, shades, [shade != GREY for shade in shades])
    return figure


@styled
def ranks(frame: pd.DataFrame) -> Figure:
    """Rank by mean E2E on each workload."""
    workloads = list(dict.fromkeys(frame["workload"]))
    means = frame.pivot_table(index="name", columns="workload", values=E2E)[workloads].dropna()
    means = means.sort_index()  # equals stand in the same order everywhere, and have the same number
    table, number = means.rank(method="first").astype(int), means.rank(method="min").astype(int)
    change = (number.max(axis=1) - number.min(axis=1)).sort_values(ascending=False, kind="stable")
    colours = dict.fromkeys(table.index, GREY) | dict(zip(change.index, BEST, strict=False))
    colours |= {name: BASE for name in table.index if name in BASELINES}
    figure, (axis,) = blank(1, 1, max(3.0, 0.24 * len(table) + 1.0))
    places = range(len(workloads))
    for name in table.index:
        strong = colours[name] != GREY
        axis.plot(
            places,
            table.loc[name],
            color=colours[name],
            linewidth=2.2 if strong else 0.9,
            alpha=1.0 if strong else 0.6,
            marker="o",
            markersize=6 if strong else 3.5,
            linestyle="--" if name in BASELINES else "-",
            zorder=3 if strong else 2,
        )
        for place, side in ((0, -1), (len(workloads) - 1, 1)):
            rank = number.loc[name, workloads[place]]
            axis.text(
                place + 0.06 * side,
                table.loc[name, workloads[place]],
                f"{rank}  {name}" if side > 0 else f"{name}  {rank}",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=8,
                color=colours[name],
                fontweight="bold" if strong else "normal",
            )
    axis.set_xlim(-0.75, len(workloads) - 0.25)
    axis.set_ylim(len(table) + 0.6, 0.4)
    axis.set_xticks(list(places), workloads)
    axis.xaxis.tick_top()
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    return figure


def highlighted(order: Sequence[str]) -> dict[str, str]:
    """A colour for each name, of which the best comes first: five colours, black for a baseline, else grey."""
    free = iter(BEST)
    found = {}
    for name in order:
        found[name] = BASE if name in BASELINES else next(free, GREY)
    return found


# --- details -------------------------------------------------------------------------------------------


def _columns(rows: int, widths: Sequence[float], height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(9.6, height), layout="constrained")
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=list(widths))
    return figure, list(axes.flat)


def _logarithmic(axis: Axes, which: str) -> None:
    """Ticks at 1, 2 and 5 of each decade, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    side = axis.xaxis if which == "x" else axis.yaxis
    side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    side.set_major_formatter(StrMethodFormatter("{x:g}"))
    side.set_minor_formatter(NullFormatter())


def _colour(collection: Any, index: int) -> str:
    from matplotlib.colors import to_hex

    return str(to_hex(collection.get_facecolors()[index]))
