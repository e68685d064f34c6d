"""Labels that don't overlap: along an edge of the axes, and beside points. Observation path."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from numpy.typing import NDArray

Edge = Literal["top", "right"]
LEADER: dict[str, Any] = {"color": "#9A9A9A", "linewidth": 0.5, "clip_on": False, "zorder": 1}
SAME = 4.0
"""Points nearer than this, in printer's points, get one label."""


def spread(at: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart within [low, high], in the order of `at` and as near to it as can be.

    Where there isn't room for all they lie evenly, closer than `gap`.
    """
    order = sorted(range(len(at)), key=lambda index: at[index])
    if len(at) > 1 and gap * (len(at) - 1) > high - low:
        gap = (high - low) / (len(at) - 1)
    places = [0.0] * len(at)
    # Blocks of labels that touch: a block lies where its members want to be on average.
    blocks: list[tuple[float, list[int]]] = []  # (first label's place, members)
    for index in order:
        blocks.append((at[index], [index]))
        while True:
            _, members = blocks[-1]
            wanted = sum(at[i] - gap * n for n, i in enumerate(members)) / len(members)
            first = min(max(wanted, low), high - gap * (len(members) - 1))
            blocks[-1] = (first, members)
            if len(blocks) < 2 or blocks[-2][0] + gap * len(blocks[-2][1]) <= first + 1e-12:
                break
            last = blocks.pop()
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + last[1])
    for first, members in blocks:
        for n, index in enumerate(members):
            places[index] = first + gap * n
    return places


def rail(
    axis: Axes,
    edge: Edge,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    colours: Sequence[str],
    strong: Sequence[bool],
    size: float = 7.5,
) -> None:
    """Labels in a row outside the top or right edge, each with a thin line to its point (data coordinates)."""
    cast("Figure", axis.figure).draw_without_rendering()
    box = axis.get_window_extent()
    to_axes = axis.transData + axis.transAxes.inverted()
    places = [to_axes.transform(point) for point in points]
    along, length = (0, box.width) if edge == "top" else (1, box.height)
    gap = size * 1.25 / 72 * axis.figure.dpi / length
    spots = spread([float(place[along]) for place in places], gap, 0.0, 1.0)
    for place, spot, label, colour, bold in zip(places, spots, labels, colours, strong, strict=True):
        bend, end = 1.03, 1.06
        if edge == "top":
            line = [place[0], spot, spot], [place[1], bend, end]
        else:
            line = [place[0], bend, end], [place[1], spot, spot]
        axis.plot(*line, transform=axis.transAxes, **{**LEADER, "color": colour if bold else LEADER["color"]})
        axis.text(
            spot if edge == "top" else end + 0.005,
            end + 0.005 if edge == "top" else spot,
            label,
            transform=axis.transAxes,
            rotation=90 if edge == "top" else 0,
            ha="center" if edge == "top" else "left",
            va="bottom" if edge == "top" else "center",
            fontsize=size,
            color=colour,
            fontweight="bold" if bold else "normal",
        )


def beside(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    colours: Sequence[str],
    size: float = 7.5,
) -> None:
    """A label near each point, where it hides neither another nor a point; a thin line where it lies further off.

    Points that coincide share a label, and the colour of the first among them that isn't the commonest.
    """
    import numpy as np
    from matplotlib.patheffects import withStroke

    figure = cast("Figure", axis.figure)
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    spots = axis.transData.transform(np.asarray(points, dtype=np.float64))
    taken: list[Bbox] = []
    per_point = figure.dpi / 72
    groups = _groups(spots, SAME * per_point)
    usual = max(set(colours), key=list(colours).count)
    crowd = {group[0]: float(np.sum(np.hypot(*(spots - spots[group[0]]).T) < 60)) for group in groups}
    for group in sorted(groups, key=lambda group: -crowd[group[0]]):
        index = group[0]
        shown = textwrap.fill(", ".join(labels[i] for i in group), 30, break_long_words=False)
        special = [colours[i] for i in group if colours[i] != usual]
        text = axis.text(0, 0, shown, fontsize=size, color=[*special, usual][0], zorder=4, va="bottom")
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        extent = text.get_window_extent()
        found = _best(spots, index, extent.width, extent.height, taken, frame, per_point)
        x, y, far = found
        text.set_position(tuple(axis.transData.inverted().transform((x, y))))
        taken.append(_box(x, y, extent.width, extent.height))
        if far:
            ends = axis.transData.inverted().transform(
                [spots[index], (min(max(spots[index][0], x), x + extent.width), y + extent.height / 2)]
            )
            axis.plot(ends[:, 0], ends[:, 1], **{**LEADER, "zorder": 2})


def _groups(spots: NDArray[np.float64], near: float) -> list[list[int]]:
    """Indices of points that lie within `near` of the first of their group."""
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(spots):
        for group in groups:
            if math.hypot(x - spots[group[0]][0], y - spots[group[0]][1]) < near:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    from matplotlib.transforms import Bbox as NewBbox

    return NewBbox.from_bounds(x - 1, y - 1, width + 2, height + 2)


def _best(
    spots: NDArray[np.float64],
    index: int,
    width: float,
    height: float,
    taken: Sequence[Bbox],
    frame: Bbox,
    per_point: float,
) -> tuple[float, float, bool]:
    """Lower left corner of the label in pixels, and whether it lies so far off that a line must lead to it."""
    import numpy as np

    x0, y0 = (float(value) for value in spots[index])
    best: tuple[float, float, float, bool] | None = None
    for ring, radius in enumerate((6, 12, 20, 30, 42, 56, 72, 90)):
        for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
            dx, dy = radius * per_point * np.cos(angle), radius * per_point * np.sin(angle)
            x = x0 + dx - (width if dx < -1 else 0 if dx > 1 else width / 2)
            y = y0 + dy - height / 2
            box = _box(x, y, width, height)
            hidden = sum(_overlap(box, other) for other in taken)
            covered = sum(
                bool(box.x0 - 3 < px < box.x1 + 3 and box.y0 - 3 < py < box.y1 + 3) for px, py in spots
            )
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = hidden + 40.0 * covered + 1000.0 * outside + 2.0 * ring + 0.1 * abs(np.sin(angle))
            if best is None or cost < best[0]:
                best = (cost, x, y, ring > 1)
    assert best is not None
    return best[1:]


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0.0) * max(height, 0.0))
