"""`python -m lab.regress`: is this run worse than the baseline, by more than noise? Observation path.

    python -m lab.regress record NAME RUN [RUN ...]     keep these repeats as experiments/baselines/NAME.json
    python -m lab.regress check NAME RUN [RUN ...]      hold these repeats against it
    python -m lab.regress again NAME                    run the baseline's own command again, and check that

It exits with 1 where something is worse or a schedule has changed, else with 0. `lab.experiment run.baseline=NAME`
records too. A RUN of an experiment on both backends also has the simulator's errors compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import guarded
from lab.errors import ConfigError, RunError

if TYPE_CHECKING:
    from lab.analysis.baseline import Baseline
    from lab.analysis.regression import Regression, Row


def record(name: str, runs: Sequence[Path], folder: Path | None = None) -> Path:
    """Keep runs as a baseline; returns its file. One that is there already is replaced. Raises `RunError`."""
    from lab.analysis.baseline import FOLDER, gather, where

    path = where(name, folder or FOLDER)
    gather(path.stem, runs).write(path)
    return path


def check(arguments: argparse.Namespace) -> int:
    """Compare, print the table; the exit code."""
    from lab.analysis.baseline import gather

    found = _baseline(arguments)
    return _compared(found, gather("candidate", arguments.runs), arguments)


def again(arguments: argparse.Namespace) -> int:
    """Run what the baseline ran, as often as asked, in a temporary directory; compare."""
    import tempfile

    from lab.analysis.baseline import gather
    from lab.experiment import main as experiment

    found = _baseline(arguments)
    if not found.about["words"]:
        raise RunError(f"baseline '{found.name}' doesn't know its command; check a run of yours against it.")
    with tempfile.TemporaryDirectory(prefix="diptych-regress-") as temporary:
        paths = [Path(temporary) / str(number) for number in range(arguments.repeats)]
        for path in paths:
            with contextlib.redirect_stdout(io.StringIO()):
                code = experiment([*found.about["words"], f"run.dir={path}", "run.report=false"])
            if code:
                return code
        return _compared(found, gather("candidate", paths), arguments)


def show(result: Regression) -> str:
    """The verdict table as text."""
    lines = [f"{'':<12}{'':<36}{'baseline':>13}{'candidate':>13}{'change':>9}  {'interval':<19}verdict"]
    for row in result.rows:
        change, interval = _change(row)
        lines.append(
            f"{row.kind:<12}{row.name:<36}{_cell(row.baseline):>13}{_cell(row.candidate):>13}{change:>9}  "
            f"{interval:<19}{row.verdict}"
        )
        if row.note:
            lines.append(f"{'':<12}{row.note}")
    return "\n".join([*lines, *(f"- {note}" for note in result.notes)])


def _cell(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,.4g}"


def _change(row: Row) -> tuple[str, str]:
    if row.change is None or row.low is None or row.high is None:
        return "", ""
    scale, mark = (1.0, "") if row.unit else (100.0, " %")
    interval = "" if row.low == row.high else f"[{scale * row.low:+.2f}, {scale * row.high:+.2f}]"
    return f"{scale * row.change:+.2f}{mark}", interval


def _compared(baseline: Baseline, candidate: Baseline, arguments: argparse.Namespace) -> int:
    from lab.analysis.regression import regress

    result = regress(
        baseline,
        candidate,
        tolerance=arguments.tolerance / 100,
        points=arguments.points,
        confidence=arguments.confidence / 100,
    )
    print(
        f"baseline '{baseline.name}': {len(baseline.runs)} runs of {baseline.about['policy']} on "
        f"{baseline.about['backend']}; candidate: {len(candidate.runs)}"
    )
    print(show(result))
    bad = [row.name for row in result.failed]
    print(f"regression: {', '.join(bad)}" if bad else "no regression")
    return 1 if bad else 0


def _baseline(arguments: argparse.Namespace) -> Baseline:
    from lab.analysis.baseline import FOLDER, read, where

    return read(where(arguments.name, arguments.folder or FOLDER))


def _command(arguments: argparse.Namespace) -> int:
    for name, low, high in (("tolerance", 0, 1000), ("points", 0, 1000), ("confidence", 50, 99.999)):
        value = getattr(arguments, name, low)
        if not low <= value <= high:
            raise ConfigError(f"--{name} is {value:g}; expected {low} to {high}.")
    if arguments.what == "record":
        path = record(arguments.name, arguments.runs, arguments.folder)
        print(f"baseline: {path}")
        return 0
    return check(arguments) if arguments.what == "check" else again(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.regress", description="Hold a run against a stored baseline."
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="record | check | again")
    for verb, about in (
        ("record", "keep runs as a baseline"),
        ("check", "hold runs against a baseline"),
        ("again", "run a baseline's command again, and check that"),
    ):
        one = verbs.add_parser(verb, help=about, description=about)
        one.add_argument("name", metavar="NAME", help="of the baseline, or a path to its JSON")
        one.add_argument(
            "--folder", type=Path, metavar="DIR", help="where baselines lie (experiments/baselines)"
        )
        if verb != "again":
            one.add_argument(
                "runs", metavar="RUN", nargs="+", type=Path, help="a run directory; several: repeats"
            )
        if verb != "record":
            one.add_argument(
                "--tolerance", type=float, default=2.0, metavar="PERCENT", help="that doesn't matter (2)"
            )
            one.add_argument(
                "--points", type=float, default=1.0, metavar="POINTS", help="... of an error (1)"
            )
            one.add_argument(
                "--confidence", type=float, default=99.0, metavar="PERCENT", help="of intervals (99)"
            )
        if verb == "again":
            one.add_argument("--repeats", type=int, default=1, metavar="N", help="how often (1)")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _command(arguments))


if __name__ == "__main__":
    sys.exit(main())
