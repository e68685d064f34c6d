"""What all figures share: colours, style, labels, axes, and steps as curves over time. Observation path.

Colours come from Okabe and Ito's colour-blind safe set and mean the same thing in every figure; the page's
own timeline uses them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from lab.analysis.frames import RunLike, backend, name, sides

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_COLOURS = {"real": "#0072B2", "sim": "#D55E00"}
OTHER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STAGE_COLOURS = {
    "queue": "#B8B8B8",
    "preempted": "#CC79A7",
    "swapped": "#56B4E9",
    "prefill": "#E69F00",
    "decode": "#009E73",
    "cache": "#F0E442",
    "transfer": "#0072B2",
    "host": "#8C6D46",
}
KV_COLOURS = {"held": "#332288", "cached": "#88CCEE", "free": "#ECECEC"}

STAGE_LABELS = {
    "queue": "queue",
    "preempted": "queue after preemption",
    "swapped": "queue, swapped out",
    "prefill": "prefill",
    "decode": "decode",
    "cache": "prefix-cache hits",
    "transfer": "KV transfers",
    "host": "host",
}


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
    if len(runs) == 2:
        keys, labels = sides(*runs)
        colours = [SIDE_COLOURS.get(key, OTHER_COLOURS[i]) for i, key in enumerate(keys)]
        return list(zip(labels, colours, runs, strict=True))
    out: list[tuple[str, str, RunLike]] = []
    for i, run in enumerate(runs):
        alone = len(runs) == 1
        label = name(run) if alone else f"{name(run)} ({'abcd'[i]})"
        out.append((label, SIDE_COLOURS.get(backend(run) if alone else "", OTHER_COLOURS[i]), run))
    return out


def blank(rows: int, columns: int, height: float, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(9.6, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share)
    return figure, list(axes.flat)


def duration_ms(steps: pd.DataFrame) -> pd.Series[float]:
    return (steps["end_ns"] - steps["start_ns"]) / 1e6


def summed(steps: pd.DataFrame, columns: Sequence[str], *, idle: bool = False) -> pd.DataFrame:
    """`start_ns` and columns over time, added up over the replicas: each one's last step counts until its next.

    With `idle` a replica counts zero from the end of a step to the start of its next.
    """
    import pandas as pd

    own = ["start_ns", *columns]
    parts = []
    for _, part in steps.groupby("replica", sort=True):
        ordered = part.sort_values("start_ns")
        curve = ordered[own]
        if idle:
            pause = ordered["end_ns"] < ordered["start_ns"].shift(-1, fill_value=1 << 62)
            zeros = pd.DataFrame({"start_ns": ordered.loc[pause, "end_ns"], **dict.fromkeys(columns, 0)})
            curve = pd.concat([curve, zeros]).sort_values("start_ns", kind="stable")
        parts.append(curve)
    if len(parts) < 2:
        return parts[0] if parts else steps[own]
    changes = [part.assign(**{c: part[c].diff().fillna(part[c]) for c in columns}) for part in parts]
    together = pd.concat(changes).sort_values("start_ns", kind="stable")
    together[list(columns)] = together[list(columns)].cumsum().round().astype("int64")
    return together.drop_duplicates("start_ns", keep="last")


def over_time(ordered: pd.DataFrame, columns: Sequence[str], how: str, most: int = 1500) -> pd.DataFrame:
    """`time_s` and columns, at most `most` rows: runs of steps are reduced by `how` (`max`, `last`)."""
    import numpy as np

    frame = ordered[list(columns)].assign(time_s=ordered["start_ns"] / 1e9)
    if len(frame) <= most:
        return frame
    bucket = np.arange(len(frame)) // -(-len(frame) // most)
    grouped = frame.groupby(bucket)
    return grouped.agg(dict.fromkeys(columns, how) | {"time_s": "first"})


def evenly(count: int, most: int) -> list[int]:
    """Positions of at most `most` of `count` rows, evenly spread."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def set_from_zero(axis: Axes, *, both: bool = False) -> None:
    axis.set_xlim(left=0)
    if both:
        axis.set_ylim(bottom=0)


def legend(axis: Axes, *, outside: bool = False, place: Literal["best", "lower right"] = "best") -> None:
    """A legend where something is labelled; an axis without data says so instead of staying empty."""
    handles, _ = axis.get_legend_handles_labels()
    if not handles:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", va="center", color="#777777")
    elif outside:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axis.legend(fontsize=8, loc=place)
