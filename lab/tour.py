"""`python -m lab.tour`: the map of this code, from its declarations and from a run that was watched. Observation path.

    python -m lab.tour                               the three paths and the course's answers
    python -m lab.tour --svg map.svg                 the three layers as a picture
    python -m lab.tour --mermaid -                   ... for a Markdown page, to the terminal
    python -m lab.tour --trace                       one request of the watched run, span by span
    python -m lab.tour --trace r000003 runs/x/real   ... of a run of yours

The run is a simulation of a fraction of a second; it is printed as a command and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cli import guarded
from lab.errors import ConfigError


def command(arguments: argparse.Namespace) -> None:
    """Print the map, or write or print what was asked for in its place."""
    if arguments.run is not None and arguments.trace is None:
        raise ConfigError(f"a run ('{arguments.run}') is walked with --trace [REQUEST]; the map needs none.")
    if arguments.run is not None:
        from lab.analysis.runs import load
        from lab.codemap.walk import info_of, walk

        run = load(arguments.run)
        print(walk(run.recorded(), info_of(run), arguments.trace))
        return
    from lab.codemap.watch import watched

    seen = watched()
    if arguments.trace is not None:
        from lab.codemap.walk import walk

        print(walk(seen.ran.recorder, seen.ran.info, arguments.trace))
        return
    if arguments.svg is None and arguments.mermaid is None:
        from lab.codemap.text import tour

        print(tour(seen))
        return
    from lab.codemap.picture import mermaid, svg

    for path, draw in ((arguments.svg, svg), (arguments.mermaid, mermaid)):
        if path == "-":
            print(draw(seen), end="")
        elif path is not None:
            from lab.analysis.files import write_atomic

            write_atomic(Path(path), draw(seen))
            print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.tour",
        description="The map of this code: who calls whom, where state lives, which point controls.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run directory, with --trace")
    parser.add_argument("--svg", metavar="PATH", help="write the three-layer diagram here (-: print it)")
    parser.add_argument("--mermaid", metavar="PATH", help="the same as Mermaid")
    parser.add_argument(
        "--trace", metavar="REQUEST", nargs="?", const="", help="walk one request through the source"
    )
    arguments = parser.parse_args(argv)
    return guarded(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
