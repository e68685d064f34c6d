"""The three-layer diagram, as SVG and as Mermaid. Observation path.

Call direction: an arrow with the number of calls in the run. State residence: a drum. Control points: where a
policy was asked. Boxes, arrows and counts come from the run; only where a box stands on the page is set here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

from lab.codemap.answers import control_point, hot_path
from lab.codemap.components import LAYERS, Component, Drawn, components
from lab.codemap.watch import Watched

Cell: TypeAlias = tuple[int, int]

_GRID: dict[str, Cell] = {
    "Fleet": (0, 0),
    "Gateway": (0, 1),
    "Simulation": (0, 2),
    "serve": (0, 3),
    "EngineCore": (0, 4),
    "StepBuilder": (0, 5),
    "RankExecutor": (1, 1),
    "SimExecutor": (1, 2),
    "HostTier": (1, 3),
    "BlockPool": (1, 4),
    "ContentChain": (1, 5),
    "write_spans_of": (2, 0),
    "prometheus_text": (2, 1),
    "summarise": (2, 2),
    "RunDirectory": (2, 3),
    "Recorder": (2, 4),
    "JsonLog": (2, 5),
    "RequestBatch": (3, 0),
    "StepBatch": (3, 1),
    "load": (3, 3),
    "diff": (3, 4),
    "write_report": (3, 5),
}
"""Row and column of each component on the page; others take what is free in their layer."""

_FREE: tuple[tuple[Cell, ...], ...] = ((), ((1, 0),), ((3, 2),))
"""Cells of each layer that nobody has."""

HANDED = (
    ("Recorder", "RunDirectory", "records"),
    ("RunDirectory", "load", "files"),
    ("load", "diff", "runs"),
    ("diff", "write_report", "a diff"),
)
"""What goes from one to another without a call of the run: (from, to, what)."""

_W, _H, _GAP, _LEFT, _TOP = 176, 112, 44, 30, 34
_ROWS = (64, 282, 494, 662)
_BANDS = ((4, 212), (226, 424), (438, 800))
_HEIGHT, _WIDTH = 806, 2 * _LEFT + 6 * _W + 5 * _GAP

_STYLE = """
text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#222}
.band{stroke:#d5d5d5}.band.l0{fill:#f3f6fb}.band.l1{fill:#f4f9f4}.band.l2{fill:#fbf7f0}
.title{font-weight:600;font-size:14px}.box{fill:#fff;stroke:#555}.box.after{stroke-dasharray:4 3}
.box.hot{stroke:#C2410C;stroke-width:2.2}.name{font-weight:600;font-size:13px}.code{fill:#666;font-size:10px}
.doc{fill:#444;font-size:10px;font-style:italic}
.state{fill:#332288;font-size:10.5px}.drum{fill:#e4e0f5;stroke:#332288}.point{fill:#8a4b00;font-size:10.5px}
.mark{fill:#E69F00;stroke:#8a4b00}.call{fill:none;stroke:#0072B2;stroke-width:1.4}
.call.hot{stroke:#C2410C;stroke-width:2.2}.handed{fill:none;stroke:#777;stroke-dasharray:5 4}
.count{font-size:10.5px;fill:#0b4f78;paint-order:stroke;stroke:#fff;stroke-width:4px}
.count.hot{fill:#9a330a}.count.handed{fill:#555;stroke:#fff;stroke-dasharray:none}
"""


@dataclass(frozen=True, slots=True)
class _Line:
    source: str
    target: str
    label: str
    kind: str


def mermaid(seen: Watched) -> str:
    """The diagram for a Markdown page."""
    drawn, hot = components(seen), _hot(seen)
    out = ["flowchart TB"]
    for layer, title in enumerate(LAYERS):
        out.append(f'  subgraph L{layer}["{title}"]')
        for component in drawn.components.values():
            if component.layer == layer:
                out += _mermaid_node(component, seen)
        out.append("  end")
    for line in _lines(drawn, hot):
        arrow = "-.->" if line.kind == "handed" else "==>" if line.kind == "hot" else "-->"
        out.append(f'  {line.source} {arrow}|"{line.label}"| {line.target}')
    for component in drawn.components.values():
        for kind, policy in component.control_points.items():
            out.append(f"  {component.place.name} <-->|asks| {kind}_{policy}")
    return "\n".join(out) + "\n"


def _mermaid_node(component: Component, seen: Watched) -> Iterator[str]:
    name, at = component.place.name, component.place
    point = "<br/>global control point" if _is_point(component, seen) else ""
    yield f'    {name}["{name}<br/>{at.file}:{at.line}{point}"]'
    for number, held in enumerate(component.state):
        yield f'    {name}_{number}[("{held}")]'
        yield f"    {name} --- {name}_{number}"
    for kind, policy in component.control_points.items():
        yield f'    {kind}_{policy}{{{{"{kind}: {policy}"}}}}'


def svg(seen: Watched) -> str:
    """The diagram as a file of its own."""
    drawn, hot = components(seen), _hot(seen)
    grid = _placed(drawn)
    parts = [_background(layer) for layer in range(len(LAYERS))]
    lines = list(_lines(drawn, hot))
    ports = _Ports(lines, grid)
    parts += [ports.path(line) for line in lines]
    parts += [_box(component, seen, hot, grid) for component in drawn.components.values()]
    parts += [ports.text(line) for line in lines]
    parts.append(_legend())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" aria-label="Diptych in three layers"><style>{_STYLE}</style>'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse" markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" fill="context-stroke"/>'
        f'</marker></defs><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _hot(seen: Watched) -> set[str]:
    """The owners of the hot path's functions."""
    return {symbol.rpartition(":")[2].partition(".")[0] for symbol in hot_path(seen)}


def _is_point(component: Component, seen: Watched) -> bool:
    return control_point(seen).startswith(f"{component.place.symbol}.")


def _lines(drawn: Drawn, hot: set[str]) -> Iterator[_Line]:
    names = {symbol: component.place.name for symbol, component in drawn.components.items()}
    for (source, target), count in drawn.edges.items():
        kind = "hot" if names[source] == "serve" and names[target] in hot else "call"
        label = f"{count:,}"
        if names[target] == "SimExecutor":
            label = f"{count:,} StepPlan down, StepResult up"
        yield _Line(names[source], names[target], label, kind)
    for source, target, what in HANDED:
        yield _Line(source, target, what, "handed")


def _background(layer: int) -> str:
    top, bottom = _BANDS[layer]
    return (
        f'<rect class="band l{layer}" x="6" y="{top}" width="{_WIDTH - 12}" height="{bottom - top}" rx="9"/>'
        f'<text class="title" x="{_LEFT}" y="{top + 22}">{LAYERS[layer]}</text>'
    )


def _placed(drawn: Drawn) -> dict[str, Cell]:
    """A cell for each component. Raises `LookupError` where the page has no room for one."""
    grid, free = {}, [list(cells) for cells in _FREE]
    for component in drawn.components.values():
        name = component.place.name
        if name not in _GRID and not free[component.layer]:
            raise LookupError(
                f"the diagram has no room for '{name}' ({LAYERS[component.layer]}); give it a cell"
            )
        grid[name] = _GRID[name] if name in _GRID else free[component.layer].pop(0)
    return grid


def _corner(cell: Cell) -> tuple[int, int]:
    row, column = cell
    return _LEFT + column * (_W + _GAP), _ROWS[row]


def _box(component: Component, seen: Watched, hot: set[str], grid: Mapping[str, Cell]) -> str:
    at, (x, y) = component.place, _corner(grid[component.place.name])
    kind = " hot" if at.name in hot else " after" if component.after else ""
    out = [
        f'<g><title>{escape(at.doc)}</title><rect class="box{kind}" x="{x}" y="{y}" width="{_W}" height="{_H}" rx="6"/>'
    ]

    def text(line: int, words: str, kind: str, indent: int = 10) -> str:
        return f'<text class="{kind}" x="{x + indent}" y="{y + 18 + 14 * line}">{escape(words)}</text>'

    out.append(text(0, at.name, "name"))
    out.append(text(1, f"{at.file}:{at.line}", "code"))
    line = 2
    if component.twin:
        out.append(text(line, f"real: {component.twin.rpartition(':')[2]}", "code"))
        line += 1
    if _is_point(component, seen):
        out.append(
            text(line, f"global control point: {control_point(seen).rpartition('.')[2]}", "point", 24)
            + _diamond(x + 15, y + 14 + 14 * line)
        )
        line += 1
    if component.functions:
        for part in textwrap.wrap(", ".join(component.functions), 30):
            out.append(text(line, part, "code"))
            line += 1
    for held in component.state:
        out.append(text(line, held, "state", 24) + _drum(x + 10, y + 9 + 14 * line))
        line += 1
    for seam, policy in component.control_points.items():
        out.append(text(line, f"{seam}: {policy}", "point", 24) + _diamond(x + 15, y + 14 + 14 * line))
        line += 1
    said = textwrap.wrap(at.doc, 31)
    if line + len(said) <= 7:
        out += [text(line + i, words, "doc") for i, words in enumerate(said)]
    return "".join(out) + "</g>"


def _drum(x: int, y: int) -> str:
    return (
        f'<path class="drum" d="M{x} {y + 2}v6c0 3 10 3 10 0v-6"/>'
        f'<ellipse class="drum" cx="{x + 5}" cy="{y + 2}" rx="5" ry="2"/>'
    )


def _diamond(x: int, y: int) -> str:
    return f'<path class="mark" d="M{x} {y - 5}l5 5l-5 5l-5 -5z"/>'


def _legend() -> str:
    x, y = _LEFT + 2 * (_W + _GAP) - 24, _ROWS[3] + 12
    rows = (
        (
            f'<path class="call" marker-end="url(#tip)" d="M{x} {y}h26"/>',
            "calls, and how many in the run",
        ),
        (
            f'<path class="call hot" marker-end="url(#tip)" d="M{x} {y + 20}h26"/>',
            "the hot path: in every step",
        ),
        (
            f'<path class="handed" marker-end="url(#tip)" d="M{x} {y + 40}h26"/>',
            "handed on, without a call of the run",
        ),
        (_drum(x + 8, y + 55), "where state lives"),
        (_diamond(x + 13, y + 80), "control points: a policy decides"),
    )
    return "".join(
        f'{shape}<text class="code" x="{x + 38}" y="{y + 4 + 20 * i}">{words}</text>'
        for i, (shape, words) in enumerate(rows)
    )


class _Ports:
    """Where lines leave and meet boxes: spread over a side in the order of where they go."""

    def __init__(self, lines: list[_Line], grid: Mapping[str, Cell]) -> None:
        self._grid = grid
        self._sides: dict[tuple[str, str], list[tuple[int, _Line, str]]] = {}
        for line in lines:
            for end, (name, other) in (("a", (line.source, line.target)), ("b", (line.target, line.source))):
                side = self._side(line, end)
                self._sides.setdefault((name, side), []).append((grid[other][1], line, end))
        self._at: dict[tuple[_Line, str], tuple[float, float]] = {}
        for (name, side), ends in self._sides.items():
            x, y = _corner(grid[name])
            ends.sort(key=lambda item: item[0])
            for i, (_, line, end) in enumerate(ends, 1):
                share = i / (len(ends) + 1)
                self._at[line, end] = {
                    "top": (x + _W * share, y),
                    "bottom": (x + _W * share, y + _H),
                    "left": (x, y + _H * share),
                    "right": (x + _W, y + _H * share),
                }[side]

    def _side(self, line: _Line, end: str) -> str:
        (row, column), (to_row, to_column) = self._grid[line.source], self._grid[line.target]
        if row != to_row:
            return (
                ("bottom" if end == "a" else "top") if row < to_row else ("top" if end == "a" else "bottom")
            )
        if abs(column - to_column) > 1:
            return "top"
        return (
            ("right" if end == "a" else "left") if column < to_column else ("left" if end == "a" else "right")
        )

    def _shape(self, line: _Line) -> tuple[str, float, float]:
        """The path, and where its label stands."""
        (x, y), (u, v) = self._at[line, "a"], self._at[line, "b"]
        (row, column), (to_row, to_column) = self._grid[line.source], self._grid[line.target]
        if row == to_row and abs(column - to_column) == 1:
            return f"M{x:.0f} {y:.0f}L{u:.0f} {v:.0f}", (x + u) / 2, (y + v) / 2 - 5
        if row == to_row:
            lift = 14 + 4 * (abs(column - to_column) - 2) + 12 * (row == 0 and to_column < column)
            return (
                f"M{x:.0f} {y:.0f}C{x:.0f} {y - lift * 1.33:.0f} {u:.0f} {v - lift * 1.33:.0f} {u:.0f} {v:.0f}",
                (x + u) / 2,
                y - lift + 4,
            )
        if to_row - row == 1:
            middle = (y + v) / 2
            shape = f"M{x:.0f} {y:.0f}C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v:.0f}"
            return shape, x + (u - x) * 0.8, y + (v - y) * 0.71 + 4  # at 7/10 of the curve
        right = to_column > column
        gutter = _corner(self._grid[line.source])[0] + (_W + _GAP / 2 if right else -_GAP / 2)
        return (
            f"M{x:.0f} {y:.0f}C{x:.0f} {y + 26:.0f} {gutter:.0f} {y + 14:.0f} {gutter:.0f} {y + 52:.0f}"
            f"V{v - 52:.0f}C{gutter:.0f} {v - 14:.0f} {u:.0f} {v - 30:.0f} {u:.0f} {v:.0f}",
            gutter,
            (y + v) / 2,
        )

    def path(self, line: _Line) -> str:
        shape, _, _ = self._shape(line)
        kind = {"hot": "call hot", "call": "call", "handed": "handed"}[line.kind]
        return f'<path class="{kind}" marker-end="url(#tip)" d="{shape}"/>'

    def text(self, line: _Line) -> str:
        _, x, y = self._shape(line)
        kind = "" if line.kind == "call" else f" {line.kind}"
        return f'<text class="count{kind}" text-anchor="middle" x="{x:.0f}" y="{y:.0f}">{escape(line.label)}</text>'
