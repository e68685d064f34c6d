"""`python -m lab.diff RUN RUN`: where two runs part, by how much, and why. Observation path.

    python -m lab.diff runs/x/real runs/x/sim
    python -m lab.diff runs/x/real runs/x/sim --noise runs/y/real runs/z/real
    python -m lab.diff before after --json diff.json --report diff.html --out tables/
    python -m lab.diff seed0,seed1,seed2 sweep/

The first run is the reference; of a real and a simulated run it is always the real one. A side may be several runs,
with commas between them or as a directory of runs; the i-th of one side belongs to the i-th of the other. Unless told
not to, each of the two runs is simulated again with the other one's step durations, to separate duration error
from decision error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import guarded
from lab.errors import DiptychError, RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.analysis.difference import Diff
    from lab.analysis.frames import RunLike
    from lab.analysis.runs import Run

RESIMULATE = "sim.resimulate:resimulate"
"""Reached by name: the ground floor imports no backend."""

DEEPEST = 4
"""Levels below a directory at which its runs are looked for."""


def compare(
    a: Run | Sequence[Run],
    b: Run | Sequence[Run],
    replay: Path | None = None,
    *,
    resimulate: bool = True,
    noise: Sequence[Run] = (),
) -> Diff:
    """The difference of two runs, with b re-simulated on a's durations where that can be done.

    `replay` is a directory for the re-simulated run, if it is to be kept. Where it can't be done, one
    line on stderr says why and the difference comes without a counterfactual. Partial runs, different workloads,
    and runs that executed recorded plans aren't re-simulated: the verdict says so. Where the decisions part even so,
    a is re-simulated on b's durations too, and each error is split in both orders. Several runs a side: the first
    pair is re-simulated.
    """
    from lab.analysis.diff import diff
    from lab.analysis.runs import Run
    from lab.analysis.scope import scope

    left, right = (side if isinstance(side, Run) else side[0] for side in (a, b))
    first = left, right
    executed = any(run.config.get("engine", {}).get("mode") == "replay" for run in first)
    kept = all((run.config.get("run") or {}).get("record", "everything") == "everything" for run in first)
    if not resimulate or executed or not kept or not scope(left, right).whole:
        return diff(a, b, noise=noise)
    again, exchanged = _resimulated(left, right, replay), None
    if again is not None and not _same_decisions(left, again):
        exchanged = _resimulated(right, left)
    return diff(a, b, again, exchanged=exchanged, noise=noise)


def _same_decisions(a: RunLike, b: RunLike) -> bool:
    columns = ["replica", "step", "digest"]
    left, right = (run.steps[columns].sort_values(columns[:2]).reset_index(drop=True) for run in (a, b))
    return bool(left.equals(right))


def _resimulated(a: Run, b: Run, out: Path | None = None) -> RunLike | None:
    """b's rules with a's durations."""
    import importlib

    module, _, function = RESIMULATE.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
        run: RunLike = hook(b, a, out)
    except (ImportError, DiptychError) as error:
        print(f"not re-simulated, so duration and decision error stay together: {error}", file=sys.stderr)
        return None
    return run


def load_side(words: str) -> list[Run]:
    """The runs that `words` names: directories with commas between them, each a run or a directory of runs."""
    return [run for word in words.split(",") for run in _runs_at(Path(word))]


def _runs_at(path: Path) -> list[Run]:
    from lab.analysis.frames import backend
    from lab.analysis.runs import load

    try:
        return [load(path)]
    except RunError as error:
        if not path.is_dir():
            raise
        found = sorted(
            {p.parent for level in range(1, DEEPEST + 1) for p in path.glob("*/" * level + "config.yaml")}
        )
        runs = [load(where) for where in found if where.name != "replay"]
        if not runs or len({backend(run) for run in runs}) > 1:  # an experiment's two sides are no repeats
            raise error from None
        return runs


def command(arguments: argparse.Namespace) -> None:
    """Load, compare, print, and write what was asked for."""
    from lab.analysis.diff_tables import show_details, write_tables
    from lab.analysis.frames import backend
    from lab.analysis.report import write_report
    from lab.analysis.runs import load
    from lab.analysis.table import show
    from lab.collector import collector_at_rest

    a, b = load_side(arguments.reference), load_side(arguments.candidate)
    if (backend(a[0]), backend(b[0])) == ("sim", "real"):
        a, b = b, a
    noise = [load(path) for path in arguments.noise]
    with collector_at_rest():
        result = compare(a, b, resimulate=not arguments.no_resimulate, noise=noise)
    show(result, verdict_first=True)
    show_details(result)
    if arguments.json:
        result.write(arguments.json)
    if arguments.out:
        write_tables(result, [a[0], b[0]], Path(arguments.out))
        print(f"tables and pictures: {arguments.out}")
    if arguments.report:
        write_report(arguments.report, [a[0], b[0]], result)
        print(f"report: {arguments.report}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lab.diff", description="Where two runs part, and why.")
    parser.add_argument(
        "reference",
        metavar="RUN",
        help="the reference: a run directory, several with commas, or a directory of runs",
    )
    parser.add_argument("candidate", metavar="RUN", help="what to compare with it, as many runs")
    parser.add_argument(
        "--noise",
        metavar="RUN",
        nargs="+",
        default=[],
        help="repeats of the reference: how far apart they lie by chance",
    )
    parser.add_argument("--json", metavar="PATH", help="write diff.json here")
    parser.add_argument(
        "--out", metavar="DIR", help="write diff.json, every table (CSV) and picture (PNG) here"
    )
    parser.add_argument("--report", metavar="PATH", help="write a report page here")
    parser.add_argument(
        "--no-resimulate", action="store_true", help="don't separate duration from decision error"
    )
    arguments = parser.parse_args(argv)
    return guarded(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
