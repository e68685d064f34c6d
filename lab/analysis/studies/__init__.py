"""What a study of many runs shows: one tidy table, pictures, and a page with both. Observation path.

    conclude("zoo/schedulers", runs, console)

Pandas and matplotlib are imported when the runs are over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.console import Console
    from lab.studies import StudyRun


def conclude(path: Path, runs: Sequence[StudyRun], console: Console) -> None:
    """Write the table, the pictures and `report.html` of one study to `path`, and print the table."""
    if not runs:
        return
    from lab.analysis.studies import page, table

    console.say(f"Table and pictures of {path.name} ...")
    frame = table.collect(runs)
    table.write(path, frame)
    table.show(frame)
    for said in table.remarks(runs):
        print(said)
    print(f"table: {path / 'results.csv'}")
    print(f"report: {page.write(path, frame, runs)}")
