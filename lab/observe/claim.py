"""Taking a directory for a run: nobody else writes there, and nothing of an earlier run stays. Observation path.

The lock is the system's own (`flock` on the directory itself): it leaves no file, and goes with the process
that held it, however that one ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.errors import RunError

SUCCESS, PARTIAL = "_SUCCESS", "PARTIAL"
TABLES = ("workload", "requests", "steps", "plans", "fleet", "spans")
FILES = (
    "config.yaml",
    "environment.json",
    "cost.json",
    *(f"{table}.parquet" for table in TABLES),
    "metrics.json",
    "metrics.prom",
    "log.jsonl",
    "spans.otlp.jsonl",
    "timeline.perfetto-trace",
    "report.html",
)
"""What a run may write, beside its marker. A directory is reused only by removing exactly these."""

SIDES = ("real", "sim", "replay")
"""Run directories below the directory of an experiment on both backends ..."""
COMPARED = ("diff.json", "report.html", "timeline.perfetto-trace")
"""... and what compares them."""

_LEFT_OVER = re.compile(r"\..+\.\d+\.tmp")
"""What a run that was killed was writing."""

COMPLETE, INCOMPLETE = "diptych run complete", "diptych run partial: "


class Lock:
    """Holds `path` for this process until `release`, or until nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        """Raises `RunError` when another run holds it."""
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise RunError(
                    f"another run is being written to '{path}' now; wait for its end or choose another run.dir"
                ) from None
            # A file system that knows no locks: as good as it gets.
        self.release: Callable[[], object] = weakref.finalize(self, os.close, handle)


def take(path: Path) -> Lock:
    """Take `path` for a new run: absent, empty, or an earlier run's, whose files are removed. Raises `RunError`."""
    lock = _directory(path)
    if any(not _LEFT_OVER.fullmatch(child.name) for child in path.iterdir()):
        try:
            partial_reason(path)
        except RunError:
            both = any(_is_run(path / side) for side in SIDES)
            there = "it holds an experiment on both backends" if both else "it has files that are not a run's"
            what = f"{there}; expected a new or empty directory"
            raise RunError(f"can't write a run to '{path}': {what}") from None
    _remove_run(path)
    return lock


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the directory of an experiment whose sides are run directories below it. Raises `RunError`."""
    try:
        lock = _directory(path)
    except OSError as error:
        raise RunError(f"can't make the run directory '{path}': {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def clear(path: Path) -> None:
    """Remove what an earlier experiment left at `path`: its sides, what compares them, a run of its own.

    The user's own files stay. Raises `RunError`, before anything is gone, when a side's place is taken by
    something else.
    """
    runs = [path / side for side in SIDES if (path / side).exists() and _has_content(path / side)]
    try:
        for run in runs:
            try:
                partial_reason(run)
            except RunError:
                raise RunError(
                    f"can't write a run to '{run}': it has files that are not a run's; choose another run.dir"
                ) from None
        for name in COMPARED:
            (path / name).unlink(missing_ok=True)
        for run in runs:
            _remove_run(run)
            (run / PARTIAL).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the user keeps something in it
                run.rmdir()
        if _is_run(path):
            _remove_run(path)
            (path / PARTIAL).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"can't replace the earlier run at '{path}': {error.strerror or error}") from error


def part_of_another(path: Path) -> bool:
    """Whether `path` is one side of an experiment on both backends, so that a run alone mustn't replace it."""
    if not _is_run(path):
        return False
    try:
        config = (path / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        config = ""
    beside = path.absolute().parent / "diff.json"
    return bool(re.search(r"^backend: both$", config, re.M)) or (path.name in SIDES and beside.exists())


def partial_reason(path: Path) -> str | None:
    """Why the run at `path` isn't complete, or None when it is. Raises `RunError` if no run is there."""
    if _begins(path / SUCCESS, COMPLETE):
        return None
    if _begins(path / PARTIAL, INCOMPLETE):
        text = (path / PARTIAL).read_text(encoding="utf-8")
        return text.removeprefix(INCOMPLETE).strip().rstrip(".")
    raise RunError(f"'{path}' is not a run directory: it has neither '{SUCCESS}' nor '{PARTIAL}' of a run")


# -- inside --------------------------------------------------------------------------------------------


def _directory(path: Path) -> Lock:
    if path.exists() and not path.is_dir():
        raise RunError(f"can't write a run to '{path}': it is a file; expected a directory or a new name")
    path.mkdir(parents=True, exist_ok=True)
    return Lock(path)


def _remove_run(path: Path) -> None:
    # Whatever ends this half-way, the rest is known as a run, and as none that is complete: so the next may take it.
    if (path / SUCCESS).exists():
        with contextlib.suppress(OSError):  # a full disk
            text = f"{INCOMPLETE}it was being replaced by another run.\n"
            (path / PARTIAL).write_text(text, encoding="utf-8")
        (path / SUCCESS).unlink()
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for leftover in path.glob(".*.tmp"):
        leftover.unlink()


def _has_content(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def _is_run(path: Path) -> bool:
    try:
        partial_reason(path)
    except RunError:
        return False
    return True


def _begins(path: Path, text: str) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(len(text)) == text
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError):
        return False
