"""The directory a run leaves behind, written so that what is there is whole. Observation path.

Every file is written under a temporary name, synced, and renamed into place; `_SUCCESS` comes last. From the
first moment to then a file `PARTIAL` says in one sentence that, and why, the run isn't complete, so even a
killed run is marked. `log.jsonl` alone grows in place, since it is there to be followed.

Whatever depends on the wall clock or the machine goes into `environment.json` and `wall_s` of `metrics.json`;
all else is equal, byte for byte, when a simulation is run again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from lab import interrupts
from lab.control.request import Request
from lab.errors import DiptychError, RunError
from lab.observe import export
from lab.observe.bill import Power
from lab.observe.boundaries import SCHEMA_VERSION
from lab.observe.claim import COMPLETE, INCOMPLETE, PARTIAL, SUCCESS, Lock, take
from lab.observe.identity import RunInfo
from lab.observe.metrics import summarise
from lab.observe.prometheus import prometheus_text
from lab.observe.recorder import Recorded


class RunDirectory:
    """One run's directory. A context manager: left by an exception, it stays marked partial and says why.

    with RunDirectory.create("out", "fcfs", now=now, key=config_text) as run:
        run.write_text("config.yaml", config_text)
        run.write_json("environment.json", environment())
        ...
        run.save(recorder, info, block_size=16, wall_s=wall)
    """

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path = path
        self._lock, self._saved = lock, False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None,
        slug: str,
        *,
        now: datetime.datetime,
        key: str,
        root: str | os.PathLike[str] = "runs",
    ) -> RunDirectory:
        """Make `path`, or a new directory `<date>-<time>-<slug>-<hash6>` under `root`.

        `key` is what the hash is of (the resolved configuration). An earlier run at `path` is replaced; a
        directory with anything else in it is refused, and so is one that another run is writing to now; it
        is held until the `with` block ends. Raises `RunError`.
        """
        try:
            chosen = Path(path) if path is not None else fresh_directory(root, slug, now=now, key=key)
            lock = take(chosen)
        except OSError as error:
            raise RunError(f"can't make the run directory '{path}': {_reason(error)}") from error
        run = cls(chosen, lock)
        run.mark_partial("it is still going, or was killed")
        return run

    def file(self, name: str) -> Path:
        """Where a file of this run lies."""
        return self.path / name

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Let `writer` fill a temporary file, then put it in place at once.

        Whatever goes wrong, an older file of that name stays as it was and the temporary one goes. Raises
        `RunError` when the file can't be written.
        """
        final = self.path / name
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        try:
            writer(temporary)
            _sync(temporary)
            os.replace(temporary, final)
            _sync(self.path)
        except OSError as error:
            raise RunError(f"can't write '{final}': {_reason(error)}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return final

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file, UTF-8."""
        return self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON, two spaces deep; NaN is a bug and raises."""
        return self.write_text(name, _json(value))

    def save(
        self,
        recorded: Recorded,
        info: RunInfo,
        *,
        block_size: int,
        wall_s: float | None = None,
        power: Mapping[int, Power] = MappingProxyType({}),
        workload: Iterable[Request] | None = None,
        partial: str | None = None,
        more: Mapping[str, Callable[[Path], object]] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Write all tables and metrics, then the marker; returns the content of `metrics.json`.

        `workload` defaults to the requests that were recorded; give it when more were to come. `partial` is
        the reason why the run ended early, in words that follow "because"; `more` are further files by name.
        What can't be made again comes first, and a file that can't be written doesn't keep the others from
        it: the first failure is raised at the end, and marked.
        """
        requests = [record.request for record in recorded.requests] if workload is None else list(workload)
        summary = summarise(recorded, block_size=block_size, wall_s=wall_s, power=power)
        text = prometheus_text(recorded, model=info.model)
        steps = recorded.steps
        writers: dict[str, Callable[[Path], object]] = {
            "requests.parquet": lambda path: export.write_requests(path, recorded.requests),
            "steps.parquet": lambda path: export.write_steps(path, steps),
            "plans.parquet": lambda path: export.write_plans(path, steps),
            "workload.parquet": lambda path: export.write_workload(path, requests),
            "fleet.parquet": lambda path: export.write_fleet(path, recorded.fleet),
        }
        writers |= {
            "metrics.json": lambda path: path.write_text(_json(summary), encoding="utf-8"),
            "metrics.prom": lambda path: path.write_text(text, encoding="utf-8"),
            "spans.parquet": lambda path: export.write_spans_of(path, recorded, info),
            **more,
        }
        failures: list[RunError] = []
        for name, writer in writers.items():
            try:
                self.write(name, writer)
            except RunError as error:
                failures.append(error)
        self._saved = True
        if failures:
            before = f"{partial.rstrip('.')}; then " if partial else ""
            self._mark_if_possible(f"{before}{failures[0]}")
            raise failures[0]
        if partial is None:
            self.finish()
        else:
            self.mark_partial(partial)
        return summary

    def mark_partial(self, reason: str) -> None:
        """Say in one sentence why this run isn't complete."""
        sentence = " ".join(reason.split()).rstrip(".")
        text = f"{INCOMPLETE}{sentence}.\n"
        try:
            self.write_text(PARTIAL, text)
        except RunError:
            # A full disk has no room for a second file, but the first one's block is ours already.
            try:
                with self.file(PARTIAL).open("r+", encoding="utf-8") as file:
                    file.write(text)
                    file.truncate()
            except OSError as error:
                raise RunError(f"can't write '{self.file(PARTIAL)}': {_reason(error)}") from error

    def finish(self) -> None:
        """Everything is written: the run is complete."""
        self.write_text(SUCCESS, f"{COMPLETE}, schema {SCHEMA_VERSION}\n")
        self.file(PARTIAL).unlink(missing_ok=True)
        _sync(self.path)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._saved:
            if isinstance(error, DiptychError):
                self._mark_if_possible(str(error))
            elif isinstance(error, KeyboardInterrupt):
                self._mark_if_possible(f"it was interrupted ({interrupts.reason(error)})")
            else:
                self._mark_if_possible(f"it failed with {type(error).__name__}: {error}")
        self._lock.release()

    def _mark_if_possible(self, reason: str) -> None:
        with contextlib.suppress(RunError):  # the marker of the beginning stands; the failure at hand matters
            self.mark_partial(reason)


def fresh_directory(root: str | os.PathLike[str], slug: str, *, now: datetime.datetime, key: str) -> Path:
    """Make a directory `<date>-<time>-<slug>-<hash6 of key>` under `root` that wasn't there.

    A number is added when the same run began in the same second. Raises `RunError`.
    """
    word = re.sub(r"[^A-Za-z0-9_.]+", "-", slug).strip("-") or "run"
    name = f"{now:%Y%m%d-%H%M%S}-{word}-{hashlib.blake2b(key.encode(), digest_size=3).hexdigest()}"
    count = 1
    while True:
        path = Path(root) / (name if count == 1 else f"{name}-{count}")
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError as error:
            if not Path(root).is_dir():
                raise RunError(f"can't make a run directory in '{root}': it is a file") from error
            count += 1
        except OSError as error:
            raise RunError(f"can't make the run directory '{path}': {_reason(error)}") from error
        else:
            return path


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    # pyarrow raises OSErrors whose text holds the system's own, without `strerror` set.
    return error.strerror or str(error).splitlines()[0]
