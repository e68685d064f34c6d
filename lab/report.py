"""`python -m lab.report RUN...`: the page of a run, of two laid over each other, or of a sweep. Observation path.

    python -m lab.report runs/x                      # a run, or an experiment with its two sides
    python -m lab.report runs/x/real runs/y/real     # two runs and their difference
    python -m lab.report runs/                       # every run below a directory, beside each other
    python -m lab.report runs/x --window 12.5:14     # all requests and steps of a part of the run

A page holds 5,000 requests at most and merges steps of long runs; `--window` (seconds) shows all there is in a part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import guarded
from lab.errors import RunError

if TYPE_CHECKING:
    from lab.analysis.runs import Run


def command(arguments: argparse.Namespace) -> None:
    """Find the runs, compare them if they are two, write the page."""
    from lab.analysis.frames import backend
    from lab.analysis.report import write_report
    from lab.analysis.sweep import write_sweep
    from lab.diff import compare

    window = _window(arguments.window)
    paths = [Path(word) for word in arguments.runs]
    runs = [run for path in paths for run in _runs_at(path)]
    out = Path(arguments.out) if arguments.out else paths[0] / "report.html" if len(paths) == 1 else None
    out = out or Path("report.html")
    if len(runs) > 2:
        if window is not None:
            raise RunError(f"--window is for one run or two, not for the {len(runs)} found here")
        write_sweep(out, runs)
    elif len(runs) == 2:
        if (backend(runs[0]), backend(runs[1])) == ("sim", "real"):
            runs.reverse()
        write_report(out, runs, compare(runs[0], runs[1], resimulate=not arguments.no_resimulate), window)
    else:
        write_report(out, runs, None, window)
    print(f"report: {out}")


def _runs_at(path: Path) -> list[Run]:
    """The run there, the two sides of the experiment there, or every run below."""
    from lab.analysis.runs import load

    try:
        return [load(path)]
    except RunError as error:
        sides = [path / name for name in ("real", "sim")]
        if all((side / "config.yaml").is_file() for side in sides):
            return [load(side) for side in sides]
        below = sorted({file.parent for file in path.rglob("config.yaml")}) if path.is_dir() else []
        found = [load(where) for where in below if where.name != "replay" and _served(where)]
        if not found:
            raise error from None
        return found


def _served(path: Path) -> bool:
    """Whether requests were served there: a cache study keeps neither requests nor steps."""
    return (path / "requests.parquet").is_file() and (path / "steps.parquet").is_file()


def _window(word: str | None) -> tuple[float, float] | None:
    if word is None:
        return None
    low, colon, high = word.partition(":")
    try:
        found = float(low or 0), float(high)
    except ValueError:
        found = (0.0, 0.0)
    if not colon or not 0 <= found[0] < found[1] < 1e9:
        raise RunError(f"--window is '{word}'; expected FROM:TO in seconds, like 12.5:14")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.report", description="Write the page of a run, of two, or of a sweep."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, or one with runs below it")
    parser.add_argument(
        "--window", metavar="FROM:TO", help="show only this part of the run, in seconds, all of it"
    )
    parser.add_argument(
        "--out", metavar="PATH", help="write the page here (default: report.html in the directory given)"
    )
    parser.add_argument(
        "--no-resimulate", action="store_true", help="don't separate duration from decision error"
    )
    arguments = parser.parse_args(argv)
    return guarded(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
