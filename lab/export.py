"""`python -m lab.export RUN [RUN ...]`: a recorded run's spans, for the tools of others. Observation path.

    python -m lab.export runs/x --otlp grpc://localhost:4317         to a collector, such as Jaeger's
    python -m lab.export runs/x --otlp http://localhost:4318         the same over HTTP
    python -m lab.export runs/x/real --otlp spans.jsonl              an OTLP file
    python -m lab.export runs/x --perfetto timeline.perfetto-trace   for ui.perfetto.dev

An experiment on both backends is two runs. Several runs lie over each other in one timeline. Headers that a collector
asks for are taken from OTEL_EXPORTER_OTLP_HEADERS. `export.otlp_endpoint`, `export.otlp_file` and `export.perfetto` of
`lab.experiment` do the same when a run ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cli import guarded
from lab.errors import ConfigError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.analysis.runs import Run
    from lab.observe.identity import RunInfo
    from lab.observe.plain import PlainSpan

TIMELINE = "timeline.perfetto-trace"
"""What the timeline in a run directory is called."""


def runs_at(path: Path) -> list[Run]:
    """The run at `path`, or both sides of the experiment there. Raises `RunError`."""
    from lab.analysis.runs import load
    from lab.observe.claim import SIDES, SUCCESS

    sides = [path / side for side in SIDES[:2] if (path / side / SUCCESS).exists()]
    return [load(side) for side in sides] if len(sides) == 2 else [load(path)]


def info_of(run: Run) -> RunInfo:
    """Whose spans a run's are, as it wrote it down. Raises `RunError`."""
    from lab.observe.identity import RunInfo

    said = run.environment.get("resource")
    if not isinstance(said, dict):
        raise RunError(
            f"the run at '{run.path}' doesn't say whose its spans are: its environment.json has no 'resource'; was it "
            "written by another version?"
        )
    try:
        return RunInfo.of(said)
    except (KeyError, TypeError) as error:
        raise RunError(f"the 'resource' in '{run.path / 'environment.json'}' lacks {error}") from error


def spans_of(run: Run, info: RunInfo) -> Iterator[PlainSpan]:
    """A run's spans: from its records, or, where it kept none of its plans, from its table, without links."""
    from lab.observe.plain import plain_spans, plain_spans_of_table

    if (run.path / "plans.parquet").is_file():
        return plain_spans(run.recorded(), info)
    return plain_spans_of_table(run.path / "spans.parquet")


def write_timeline(path: Path, sides: Sequence[tuple[str, Iterable[PlainSpan]]]) -> int:
    """Write a Perfetto timeline, all of it or nothing; returns how many spans. Raises `RunError`."""
    from lab.observe import perfetto

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        count = perfetto.write_timeline(temporary, sides)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"can't write '{path}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count


def headers() -> dict[str, str]:
    """What the environment says collectors are to be told."""
    from lab.observe import send

    return send.headers(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", ""))


def _named(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its backend, where that tells them apart."""
    from lab.analysis.frames import backend

    names = [backend(run) or str(run.path) for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def command(arguments: argparse.Namespace) -> None:
    """Load, and export to wherever was asked for."""
    if not (arguments.otlp or arguments.perfetto):
        raise ConfigError("nothing to export to; expected --otlp, --perfetto or both.")
    runs = [run for path in arguments.runs for run in runs_at(path)]
    if arguments.otlp:
        _otlp(arguments.otlp, runs)
    if arguments.perfetto:
        sides: list[tuple[str, Any]] = [
            (name, spans_of(run, info_of(run))) for name, run in zip(_named(runs), runs, strict=True)
        ]
        count = write_timeline(arguments.perfetto, sides)
        print(f"{count} spans: {arguments.perfetto}")


def _otlp(target: str, runs: Sequence[Run]) -> None:
    from lab.observe.otel import export_plain
    from lab.observe.send import check_endpoint

    if "://" in target:
        wrong = check_endpoint(target)
        if wrong:
            raise ConfigError(
                f"--otlp is '{target}': {wrong}; expected an address such as grpc://localhost:4317."
            )
    elif len(runs) > 1:
        raise ConfigError(f"--otlp is the file '{target}', and there are {len(runs)} runs; expected one run.")
    for run in runs:
        info = info_of(run)
        count = export_plain(target, spans_of(run, info), info, headers())
        print(f"{count} spans of '{run.path}': {target}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.export", description="A recorded run's spans, for the tools of others."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a run directory, or that of an experiment on both"
    )
    parser.add_argument(
        "--otlp", metavar="TARGET", help="grpc://host:4317, http://host:4318, or a file (.jsonl) for one run"
    )
    parser.add_argument("--perfetto", metavar="FILE", type=Path, help="a timeline for ui.perfetto.dev")
    arguments = parser.parse_args(argv)
    return guarded(lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main())
