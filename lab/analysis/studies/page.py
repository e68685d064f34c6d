"""The page of a study: its pictures and tables in one file that opens offline. Observation path."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lab.analysis.files import write_atomic
from lab.analysis.studies.figures import pictures
from lab.analysis.studies.table import remarks, tables
from lab.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

    from lab.studies import StudyRun

STYLE = Path(__file__).parents[1] / "templates" / "report.css"
DPI = 200


def write(path: Path, frame: pd.DataFrame, runs: Sequence[StudyRun]) -> Path:
    """`figures/*.png` and `report.html` below `path`; returns the page. Raises `RunError`."""
    sections = []
    try:
        (path / "figures").mkdir(parents=True, exist_ok=True)
        for name, title, text, figure in pictures(frame, runs):
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=DPI, bbox_inches="tight")
            (path / "figures" / f"{name}.png").write_bytes(data.getvalue())
            source = base64.b64encode(data.getvalue()).decode("ascii")
            sections.append(
                f'<h2>{escape(title)}</h2>\n<figure><img alt="{escape(title)}" '
                f'src="data:image/png;base64,{source}"><figcaption>{escape(text)}</figcaption></figure>'
            )
    except OSError as error:
        raise RunError(f"can't write '{path / 'figures'}': {error.strerror or error}") from error
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in remarks(runs))
    title = f"Study: {path.name}"
    body = "\n".join([*(_table(*one) for one in tables(frame)), *sections])
    write_atomic(
        path / "report.html",
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><header><h1>{escape(title)}</h1>
<p>{len(runs)} runs of {frame["name"].nunique()} policies on {frame["workload"].nunique()} workloads.
All numbers are in results.csv beside this page.</p><ul>{said}</ul></header>
<main>
{body}
</main></body></html>
""",
    )
    return path / "report.html"


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(label)}</th>" for label in head)
    lines = [
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell)}</th>' if place == 0 else f'<td class="value">{escape(cell)}</td>'
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    ]
    return (
        f'<h2>{escape(title)}</h2>\n<div class="wide"><table class="numbers"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
