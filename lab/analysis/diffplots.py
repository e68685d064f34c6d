"""Figures of a difference: percentiles with bands, residuals by shape, distances beside noise. Observation path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import OTHER_COLOURS, blank, evenly, legend, styled
from lab.analysis.residuals import residual_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lab.analysis.difference import Diff

_LATENCIES = {"ttft": "TTFT", "e2e": "E2E", "tpot": "TPOT", "itl": "ITL"}
_MOST_STEPS = 6000
_GREY = "#555555"


@styled
def percentile_errors(diff: Diff) -> Figure:
    """Q-Q of each latency above, and below it the error of each percentile with its band."""
    figure, axes = blank(2, 4, 4.8)
    a, b = diff.labels
    for i, (latency, name) in enumerate(_LATENCIES.items()):
        table = diff.percentiles[diff.percentiles["latency"] == latency]
        top, bottom = axes[i], axes[i + 4]
        top.set(title=f"{name}: percentiles", xlabel=f"{a} (ms)", ylabel=f"{b} (ms)")
        bottom.set(title=f"{name}: error by percentile", xlabel="percentile", ylabel=f"{b} against {a} (%)")
        if table.empty:
            legend(top)
            legend(bottom)
            continue
        colour = OTHER_COLOURS[0]
        ends = table[["a_ms", "b_ms"]].to_numpy()
        low, high = float(ends.min()), float(ends.max())
        top.plot([low, high], [low, high], color=_GREY, linewidth=0.8)
        top.plot(table["a_ms"], table["b_ms"], color=colour, marker=".", markersize=4, linewidth=0.8)
        if low > 0 and high / low > 50:
            top.set(xscale="log", yscale="log")
        bottom.axhline(0, color=_GREY, linewidth=0.8)
        bottom.plot(table["percentile"], table["error_pct"], color=colour, linewidth=1.4)
        if table["low_pct"].notna().any():
            over = {"seeds": "seeds", "requests": "requests"}[str(table["basis"].iloc[0])]
            bottom.fill_between(
                table["percentile"].to_numpy(dtype=float),
                table["low_pct"].to_numpy(dtype=float),
                table["high_pct"].to_numpy(dtype=float),
                color=colour,
                alpha=0.2,
                linewidth=0,
                label=f"95 % over {over}",
            )
            legend(bottom)
    return figure


@styled
def residual_heat(diff: Diff) -> Figure:
    """The mean error of a step's duration over tokens and context, and over tokens and batch, where work was equal."""
    import numpy as np
    import seaborn as sns

    figure, axes = blank(1, 2, 3.6)
    bins = residual_map(diff.residuals)
    largest = float(np.nanpercentile(np.abs(bins["error_pct"]), 95)) if len(bins) else 0.0
    limit = max(largest, 1e-9)
    for axis, (column, what) in zip(
        axes, (("context_from", "context tokens"), ("batch_from", "requests in the batch")), strict=True
    ):
        axis.set(title=f"Step time of {diff.labels[1]} against {diff.labels[0]}")
        if bins.empty:
            legend(axis)
            continue
        grouped = bins.assign(took=bins["a_ms"] * bins["steps"]).groupby([column, "tokens_from"])
        sums = grouped[["total_ms", "took"]].sum()
        error = (100 * sums["total_ms"] / sums["took"]).unstack().sort_index(ascending=False)
        sns.heatmap(
            error,
            ax=axis,
            cmap="RdBu_r",
            center=0,
            vmin=-limit,
            vmax=limit,
            annot=error.size <= 60,
            fmt="+.0f" if limit >= 10 else "+.1f",
            annot_kws={"fontsize": 7},
            linewidths=0.4,
        )
        axis.grid(visible=False)
        axis.set(xlabel="tokens in the step, from", ylabel=f"{what}, from")
        axis.set_title(f"Step time of {diff.labels[1]} against {diff.labels[0]}: mean error")
        axis.collections[0].colorbar.ax.set_title("%", fontsize=8)  # type: ignore[union-attr]
    return figure


@styled
def split_bars(diff: Diff) -> Figure:
    """Each headline metric's error, cut into what durations and what decisions did, percent of the reference."""
    figure, (axis,) = blank(1, 1, 2.6)
    split = diff.counterfactual or {}
    names, parts = [], {"duration": [], "decision": []}  # type: ignore[var-annotated]
    for name, cell in split.items():
        base = diff.metrics[name][diff.keys[0]]
        if not base:
            continue
        names.append(name.replace("_ms", "").replace("throughput.", ""))
        for part, values in parts.items():
            values.append(100 * cell[part] / abs(base))
    height = 0.38
    for i, (part, colour) in enumerate(zip(parts, OTHER_COLOURS, strict=False)):
        places = [place + (i - 0.5) * height for place in range(len(names))]
        bars = axis.barh(places, parts[part], height=height, color=colour, label=part)
        axis.bar_label(bars, labels=[f"{v:+.2f}" for v in parts[part]], padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.axvline(0, color=_GREY, linewidth=0.8)
    axis.grid(visible=False, axis="y")
    axis.set(
        title=f"Error of {diff.labels[1]}: from step durations, and from decisions",
        xlabel=f"percent of {diff.labels[0]}",
    )
    legend(axis)
    return figure


@styled
def alignment_path(diff: Diff) -> Figure:
    """Which step of one run corresponds to which of the other, by how alike their work was."""
    figure, axes = blank(1, 2, 3.0)
    pairs = diff.aligned.pairs.iloc[evenly(len(diff.aligned.pairs), _MOST_STEPS)]
    colours = {"equal": OTHER_COLOURS[0], "work": OTHER_COLOURS[2], "similar": OTHER_COLOURS[1]}
    words = {"equal": "equal so far", "work": "the same work", "similar": "similar work"}
    for kind, colour in colours.items():
        part = pairs[pairs["plan"] == kind]
        if part.empty:
            continue
        style: dict[str, Any] = {"s": 6, "color": colour, "linewidths": 0}
        axes[0].scatter(part["step_a"], part["step_b"], label=words[kind], **style)
        axes[1].scatter(part["step_a"], part["similarity"], **style, label=words[kind])
    axes[0].set(title="Steps aligned", xlabel=f"step of {diff.labels[0]}", ylabel=f"step of {diff.labels[1]}")
    axes[1].set(
        title="How alike their work is", xlabel=f"step of {diff.labels[0]}", ylabel="common / all tokens"
    )
    axes[1].set_ylim(0, 1.05)
    legend(axes[0])
    return figure


@styled
def distances_and_noise(diff: Diff) -> Figure:
    """Every distance, and beside it how far repeats of the reference lie apart."""
    from lab.analysis.distances import flat

    found = flat(diff.distances)
    floors = (diff.noise or {}).get("distances", {})
    names = [n for n in found if not n.endswith("_pct")]
    figure, (axis,) = blank(1, 1, 0.6 + 0.24 * len(names))
    places = range(len(names))
    axis.scatter([found[n] for n in names], places, color=OTHER_COLOURS[0], s=26, label="distance")
    known = [(p, floors[n]["floor"]) for p, n in zip(places, names, strict=True) if n in floors]
    if known:
        axis.scatter(
            [floor for _, floor in known],
            [place for place, _ in known],
            color=OTHER_COLOURS[1],
            marker="|",
            s=120,
            label="noise floor (median of repeats)",
        )
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=1e-3)
    axis.set_xlim(left=0)
    note = "" if known else "; no repeats, so no noise floor"
    axis.set(title=f"Distances, 0 for equal runs{note}", xlabel="distance (ratio)")
    legend(axis)
    return figure
