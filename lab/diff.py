"""`python -m lab.diff RUN RUN`: where two runs part, by how much, and why. Observation path.

    python -m lab.diff runs/x/real runs/x/sim
    python -m lab.diff before after --json diff.json --report diff.html

The first run is the reference; of a real and a simulated run it is always the real one. Unless told not to,
the second run is simulated again with the first one's step durations, to separate duration error from
decision error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab.cli import guarded
from lab.errors import DiptychError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.analysis.diff import Diff
    from lab.analysis.runs import Run

RESIMULATE = "sim.backend:resimulate"
"""Reached by name: the ground floor imports no backend."""


def compare(a: Run, b: Run, replay: Path | None = None, *, resimulate: bool = True) -> Diff:
    """The difference of two runs, with b re-simulated on a's durations where that can be done.

    `replay` is where the re-simulated run goes (default: a temporary directory). Where it can't be done, one
    line on stderr says why and the difference comes without a counterfactual. Partial runs, different workloads,
    and runs that executed recorded plans aren't re-simulated: the verdict says so.
    """
    import tempfile

    from lab.analysis.diff import diff
    from lab.analysis.scope import scope

    executed = any(run.config.get("engine", {}).get("mode") == "replay" for run in (a, b))
    if not resimulate or executed or not scope(a, b).whole:
        return diff(a, b)
    with tempfile.TemporaryDirectory(prefix="diptych-replay-") as temporary:
        again = _resimulated(a, b, replay or Path(temporary) / "replay")
        return diff(a, b, again)


def _resimulated(a: Run, b: Run, out: Path) -> Run | None:
    import importlib

    module, _, function = RESIMULATE.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
        run: Run = hook(b, a, out)
    except (ImportError, DiptychError) as error:
        print(f"not re-simulated, so duration and decision error stay together: {error}", file=sys.stderr)
        return None
    return run


def command(arguments: argparse.Namespace) -> None:
    """Load, compare, print, and write what was asked for."""
    from lab.analysis.frames import backend
    from lab.analysis.report import write_report
    from lab.analysis.runs import load
    from lab.analysis.table import show

    a, b = load(arguments.reference), load(arguments.candidate)
    if (backend(a), backend(b)) == ("sim", "real"):
        a, b = b, a
    result = compare(a, b, resimulate=not arguments.no_resimulate)
    show(result)
    if arguments.json:
        result.write(arguments.json)
    if arguments.report:
        write_report(arguments.report, [a, b], result)
        print(f"report: {arguments.report}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lab.diff", description="Where two runs part, and why.")
    parser.add_argument("reference", metavar="RUN", help="the reference: a run directory")
    parser.add_argument("candidate", metavar="RUN", help="the run to compare with it")
    parser.add_argument("--json", metavar="PATH", help="write diff.json here")
    parser.add_argument("--report", metavar="PATH", help="write a report page here")
    parser.add_argument(
        "--no-resimulate", action="store_true", help="don't separate duration from decision error"
    )
    arguments = parser.parse_args(argv)
    return guarded(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
