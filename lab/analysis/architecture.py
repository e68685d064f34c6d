"""The architecture in three layers, drawn from the boundary declarations. Observation path.

Entry and control above, execution and state in the middle, observation and validation below. A box is one
declared span: its name, the code that does the work it shows, and how often a run emitted it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lab.observe.boundaries import DECLARED, Boundary

_WIDTH, _BOX_W, _BOX_H, _GAP, _COLUMNS, _LEFT = 980, 178, 56, 10, 5, 24
_HEAD, _BETWEEN = 30, 34

OBSERVATION = (
    (
        "records",
        "lab/observe/recorder.py:Recorder",
        "Steps and requests as appended records, off the hot path.",
    ),
    (
        "spans",
        "lab/observe/spans.py:spans",
        "The records as spans, by these declarations, alike on both backends.",
    ),
    ("metrics", "lab/observe/metrics.py:summarise", "One table of formulas makes metrics.json."),
    (
        "run directory",
        "lab/observe/rundir.py:RunDirectory",
        "Every file from which this page can be computed again.",
    ),
    ("difference", "lab/analysis/diff.py:diff", "Two runs laid over each other: where they part, and why."),
)
"""The third layer has no spans of its own: it is what becomes of them. (name, code, one sentence)"""

_ARROWS = (
    "StepPlan goes down: the batch, decided · StepResult comes up: tokens and durations",
    "StepRecord and RequestRecord go down; nothing comes back: an observer never influences a decision",
)


@dataclass(frozen=True, slots=True)
class _Box:
    name: str
    code: str
    doc: str
    note: str = ""
    plane: str = "control"


def architecture_svg(counts: Mapping[str, int] | None = None) -> str:
    """The picture as inline SVG that takes its colours from the page; `counts` is spans by name, if known."""
    layers = (
        ("Entry and control", "control", [_box(b, counts) for b in DECLARED if _in_control(b)]),
        ("Execution and state", "data", [_box(b, counts) for b in DECLARED if not _in_control(b)]),
        (
            "Observation and validation",
            "observation",
            [_Box(*entry, plane="observation") for entry in OBSERVATION],
        ),
    )
    parts: list[str] = []
    y = 6
    for i, (title, kind, boxes) in enumerate(layers):
        rows = -(-len(boxes) // _COLUMNS)
        height = _HEAD + rows * (_BOX_H + _GAP) + 4
        parts.append(
            f'<rect class="layer {kind}" x="4" y="{y}" width="{_WIDTH - 8}" height="{height}" rx="8"/>'
        )
        parts.append(f'<text class="title" x="{_LEFT}" y="{y + 20}">{escape(title)}</text>')
        parts += _grid(boxes, y + _HEAD)
        y += height
        if i < len(_ARROWS):
            middle = y + _BETWEEN // 2
            parts.append(f'<path class="arrow" d="M{_LEFT + 8} {y + 4}V{y + _BETWEEN - 4}m-4 -6l4 6l4 -6"/>')
            if i == 0:
                parts.append(
                    f'<path class="arrow" d="M{_LEFT + 24} {y + _BETWEEN - 4}V{y + 4}m-4 6l4 -6l4 6"/>'
                )
            parts.append(
                f'<text class="crossing" x="{_LEFT + 40}" y="{middle + 4}">{escape(_ARROWS[i])}</text>'
            )
            y += _BETWEEN
    label = "Architecture in three layers: entry and control, execution and state, observation and validation"
    return (
        f'<svg class="architecture" viewBox="0 0 {_WIDTH} {y + 6}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _in_control(boundary: Boundary) -> bool:
    return boundary.plane == "control" and boundary.path == "request"


def _box(boundary: Boundary, counts: Mapping[str, int] | None) -> _Box:
    note = "" if counts is None else f"{counts.get(boundary.name, 0):,}"
    plane = "state" if boundary.path == "state" else boundary.plane
    return _Box(boundary.name, boundary.emitted_at, boundary.doc, note, plane)


def _grid(boxes: Sequence[_Box], top: int) -> list[str]:
    parts = []
    for i, box in enumerate(boxes):
        x = _LEFT + (i % _COLUMNS) * (_BOX_W + _GAP)
        y = top + (i // _COLUMNS) * (_BOX_H + _GAP)
        file, _, code = box.code.partition(":")
        parts.append(
            f'<g class="box {box.plane}{" unseen" if box.note == "0" else ""}"><title>{escape(box.doc)}</title>'
            f'<rect x="{x}" y="{y}" width="{_BOX_W}" height="{_BOX_H}" rx="5"/>'
            f'<text class="name" x="{x + 9}" y="{y + 18}">{escape(box.name)}</text>'
            f'<text class="count" x="{x + _BOX_W - 9}" y="{y + 18}" text-anchor="end">{escape(box.note)}</text>'
            f'<text class="code" x="{x + 9}" y="{y + 34}">{escape(code)}</text>'
            f'<text class="code" x="{x + 9}" y="{y + 48}"{_narrow(file)}>{escape(file)}</text></g>'
        )
    return parts


def _narrow(text: str) -> str:
    """Squeezes what is too long for its box."""
    return f' textLength="{_BOX_W - 18}" lengthAdjust="spacingAndGlyphs"' if len(text) > 25 else ""
