"""Figures of one run or of a pair, as functions that return a matplotlib `Figure`. Observation path.

Notebooks and the report draw with the same functions. No pyplot state, no display: a figure is a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lab.analysis.anatomy import (
    block_flows,
    cache_hits,
    curves,
    slowest_requests,
    time_by_phase,
    time_by_stage,
)
from lab.analysis.diffplots import (
    alignment_path,
    distances_and_noise,
    percentile_errors,
    residual_heat,
    split_bars,
)
from lab.analysis.drawing import (
    OTHER_COLOURS,
    SIDE_COLOURS,
    STAGE_COLOURS,
    STAGE_LABELS,
    blank,
    duration_ms,
    evenly,
    labelled,
    legend,
    set_from_zero,
    styled,
)
from lab.analysis.frames import RunLike, finished, gaps_ns
from lab.analysis.timelines import batch_composition, kv_occupancy, queue_depth, swimlanes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lab.analysis.difference import Diff

__all__ = [
    "aligned_steps",
    "attribution_bars",
    "batch_composition",
    "block_flows",
    "cache_hits",
    "curves",
    "figures",
    "kv_occupancy",
    "latency_cdfs",
    "queue_depth",
    "request_errors",
    "slowest_requests",
    "step_time",
    "swimlanes",
    "time_by_phase",
    "time_by_stage",
]

MOST_POINTS = 4000
"""Points in one scatter; more than that are thinned evenly, so that a page stays small."""


@styled
def latency_cdfs(runs: Sequence[RunLike]) -> Figure:
    """Cumulative distributions of TTFT, E2E and ITL, one curve a run."""
    import seaborn as sns

    figure, axes = blank(1, 3, 3.1)
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
        set_from_zero(axis)
        legend(axis, place="lower right")
    return figure


@styled
def step_time(runs: Sequence[RunLike]) -> Figure:
    """Step duration against tokens; for a pair also aligned steps against each other, and the residuals.

    Steps are aligned while the plan digests agree: there both sides executed the same work.
    """
    figure, axes = blank(1, 3 if len(runs) == 2 else 1, 3.2)
    sides = labelled(runs)
    for label, colour, run in sides:
        steps = run.steps.iloc[evenly(len(run.steps), MOST_POINTS)]
        tokens, duration = steps["prefill_tokens"] + steps["decode_tokens"], duration_ms(steps)
        marker = "o" if colour != SIDE_COLOURS["sim"] else "x"
        axes[0].scatter(
            tokens, duration, s=9, color=colour, marker=marker, alpha=0.45, linewidths=0.8, label=label
        )
    axes[0].set(
        title="Step duration by batch tokens", xlabel="tokens in the batch", ylabel="step duration (ms)"
    )
    set_from_zero(axes[0], both=True)
    legend(axes[0])
    if len(runs) != 2:
        return figure
    pairs = aligned_steps(*runs)
    shown = pairs.iloc[evenly(len(pairs), MOST_POINTS)]
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
        legend(axis)
    return figure


def aligned_steps(a: RunLike, b: RunLike) -> pd.DataFrame:
    """Steps with equal digests: step, tokens, prefill_tokens, context_tokens, duration_ms_a, duration_ms_b."""
    keys = ["replica", "step", "digest"]
    columns = [*keys, "prefill_tokens", "decode_tokens", "context_tokens"]
    left = a.steps[columns].assign(duration_ms_a=duration_ms(a.steps))
    right = b.steps[keys].assign(duration_ms_b=duration_ms(b.steps))
    both = left.merge(right, on=keys)
    return both.assign(tokens=both["prefill_tokens"] + both["decode_tokens"])


@styled
def request_errors(diff: Diff) -> Figure:
    """Each request's E2E and TTFT on one side against the other, and its E2E difference over arrival time."""
    figure, axes = blank(1, 3, 3.2)
    a, b = diff.labels
    table = diff.requests.iloc[evenly(len(diff.requests), MOST_POINTS)]
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
    figure, axes = blank(1, 2, 2.3)
    a, b = diff.labels
    for axis, what in zip(axes, ("e2e", "ttft"), strict=True):
        found = diff.attribution[what]
        stages = [stage for stage in diff.moved if what == "e2e" or stage != "decode"]
        values = [found["stages"][stage]["mean_ms"] for stage in stages] + [found["mean_ms"]]
        colours = [STAGE_COLOURS[stage] for stage in stages] + ["#444444"]
        names = [STAGE_LABELS[stage] for stage in stages] + ["total"]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(
            bars,
            labels=[f"{value:+,.3f}" if 0 < abs(value) < 1000 else f"{value:+,.0f}" for value in values],
            padding=3,
            fontsize=8,
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
        yield from _of_difference(diff)


def _of_difference(diff: Diff) -> Iterator[tuple[Caption, Figure]]:
    text = "Percentile against percentile, and the error of each; the band is what chance leaves open."
    yield ("percentiles", "Percentiles", text), percentile_errors(diff)
    if diff.residuals["residual_ns"].any():
        text = "How far off a step's duration is, by the step's shape, over steps that did the same work."
        yield ("residuals", "Step-time residuals by shape", text), residual_heat(diff)
    if diff.counterfactual and any(cell["total"] for cell in diff.counterfactual.values()):
        text = "What is left of each error when one side runs with the other's step durations."
        yield ("split", "Duration error and decision error", text), split_bars(diff)
    if diff.decisions["first_divergent_step"] is not None:
        text = "After the first difference steps are aligned by the tokens that they computed, in order."
        yield ("alignment", "Steps aligned by their work", text), alignment_path(diff)
    text = "How far apart the two timelines are, and how far apart repeats of the reference are."
    yield ("distances", "Distances and noise", text), distances_and_noise(diff)
