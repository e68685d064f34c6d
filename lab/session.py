"""One side of an experiment: a workload through one backend, into one run directory. All three paths meet here."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import __version__, interrupts
from lab.assembly import ControlPlane, EngineSpec, assemble
from lab.backend import Backend
from lab.collector import collector_at_rest
from lab.console import Console
from lab.control.blame import blame
from lab.control.core import EngineCore
from lab.control.observer import FleetEvent, Observer, Observers, RequestRecord, StepRecord
from lab.control.request import Request
from lab.errors import DiptychError, RunError
from lab.live import Watch
from lab.observe.bill import Power
from lab.observe.environment import environment
from lab.observe.identity import RunInfo, workload_id
from lab.observe.logs import JsonLog
from lab.observe.recorder import Recorder
from lab.observe.rundir import RunDirectory

if TYPE_CHECKING:
    from lab.observe.stream import Stream


@dataclass(frozen=True)
class Side:
    """What is run, on what, and what is written down about it."""

    backend: Backend
    spec: EngineSpec
    requests: Sequence[Request]
    config_text: str
    model: str
    otlp_file: bool = False
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where the workload comes from."""
    identity: str | None = None
    """What names the workload in place of its content, where requests are made as they are needed."""
    record: str = "everything"
    """How much is kept of the run (`run.record`)."""


@dataclass(frozen=True)
class Ran:
    """A side that ran to its end: where it lies, and what spans are made from."""

    path: Path
    recorder: Recorder
    info: RunInfo


def run_side(side: Side, path: Path, console: Console | None) -> Ran:
    """Run to the end and write everything. Whatever ends it early, what was recorded is written first."""
    backend = side.backend
    workload = side.identity or workload_id(side.requests)
    info = RunInfo(
        backend=backend.name,
        clock=backend.clock,
        evidence=backend.evidence,
        workload=workload,
        model=side.model,
        policy=str(side.spec.policies["policy"]["name"]),
        seed=side.spec.seed,
        run=f"{workload[:12]}-{backend.name}",
        version=__version__,
    )
    now = datetime.datetime.now()
    with (
        interrupts.OneInterrupt() as signals,
        RunDirectory.create(path, backend.name, now=now, key=side.config_text) as directory,
    ):
        directory.write_text("config.yaml", side.config_text)
        directory.write_json(
            "environment.json",
            environment(
                sys.argv,
                started=now.isoformat(timespec="seconds"),
                clock=info.clock,
                evidence=info.evidence,
                backend=dict(backend.about),
                capacity=dataclasses.asdict(backend.capacity),
                workload=side.source,
                policies=dict(side.spec.policies),
                provenance=side.spec.provenance(),
                resource=info.attributes(),
            ),
        )
        if side.record != "everything":
            return _run_streaming(side, directory, info, signals, console)
        recorder = Recorder()
        log = _Log(JsonLog(directory.file("log.jsonl"), info))
        try:
            control = assemble(
                side.spec,
                backend.capacity,
                Observers(recorder, log),
                side.requests,
                aggregate=backend.name == "sim",
                capacities=getattr(backend, "capacities", ()),
            )
            began = time.perf_counter()
            with collector_at_rest() if backend.name == "sim" else contextlib.nullcontext():
                ended = _drive(side, control, recorder, log, signals, console)
            wall = time.perf_counter() - began
        finally:
            log.close()
        ended = ended or log.failure
        more = {}
        if side.otlp_file:
            from lab.observe.otlp import write_otlp
            from lab.observe.plain import plain_spans

            more["spans.otlp.jsonl"] = lambda file: write_otlp(file, plain_spans(recorder, info), info)
        if ended is not None and console is not None:
            console.say(f"What was recorded goes to '{directory.path}', marked as partial.")
        directory.save(
            recorder,
            info,
            block_size=backend.capacity.block_size,
            wall_s=wall,
            power=_power(backend, control),
            workload=side.requests,
            partial=_because(ended),
            more=more,
        )
        _account(side, directory)
        if ended is not None:
            raise ended
    return Ran(directory.path, recorder, info)


def keep_side(side: Side) -> Recorder:
    """Run to the end and write nothing. Raises what ends it early."""
    recorder = Recorder()
    control = assemble(
        side.spec,
        side.backend.capacity,
        recorder,
        side.requests,
        aggregate=side.backend.name == "sim",
        capacities=getattr(side.backend, "capacities", ()),
    )
    drive = side.backend.drive(control, side.requests, lambda core, now: None)
    with collector_at_rest():
        drive.run()
    control.fleet.close(drive.now)
    return recorder


def _run_streaming(
    side: Side,
    directory: RunDirectory,
    info: RunInfo,
    signals: interrupts.OneInterrupt,
    console: Console | None,
) -> Ran:
    """The same for a run whose tables are written while it goes."""
    from lab.observe.stream import Stream

    capacity = side.backend.capacity
    stream = Stream(directory.path, info, block_size=capacity.block_size, steps=side.record == "steps")
    log = _Log(JsonLog(directory.file("log.jsonl"), info, level="WARNING"))
    log.wants_steps = False
    try:
        control = assemble(
            side.spec,
            capacity,
            Observers(stream, log),
            side.requests,
            aggregate=side.backend.name == "sim",
            capacities=getattr(side.backend, "capacities", ()),
        )
        began = time.perf_counter()
        with collector_at_rest():
            ended = _drive(side, control, stream, log, signals, console)
        wall = time.perf_counter() - began
        stream.close()
    finally:
        log.close()
        stream.abandon()
    _account(side, directory)
    directory.write_json(
        "metrics.json", stream.tally.result(stream.sums, stream.fleet, wall, _power(side.backend, control))
    )
    if ended is None:
        directory.finish()
        return Ran(directory.path, Recorder(), info)
    directory.mark_partial(_because(ended) or "")
    raise ended


def _account(side: Side, directory: RunDirectory) -> None:
    """What the backend has to say of its durations, such as how often they were extrapolated."""
    said: dict[str, Any] = getattr(side.backend, "account", dict)()
    if said:
        directory.write_json("cost.json", said)


def _power(backend: Backend, control: ControlPlane) -> dict[int, Power]:
    """By replica, where the backend knows what its devices draw and cost: for each place of the topology, or one."""
    known: Sequence[Power] = getattr(backend, "power", ())
    return {index: known[min(slot, len(known) - 1)] for index, slot in control.fleet.slots.items() if known}


class _Log(Observer):
    """The log on disk. Its first failure ends the run; while the run is ending, none costs anything more."""

    def __init__(self, log: JsonLog) -> None:
        self._log = log
        self.failure: RunError | None = None
        self.ending = False

    def on_step(self, step: StepRecord) -> None:
        self._guarded(self._log.on_step, step)

    def on_request(self, record: RequestRecord) -> None:
        self._guarded(self._log.on_request, record)

    def on_fleet(self, event: FleetEvent) -> None:
        self._guarded(self._log.on_fleet, event)

    def close(self) -> None:
        self.ending = True
        self._guarded(self._log.close)

    def _guarded(self, call: Callable[..., None], *told: object) -> None:
        try:
            call(*told)
        except RunError as error:
            self.failure = self.failure or error
            if not self.ending:
                raise


def _drive(
    side: Side,
    control: ControlPlane,
    recorder: Recorder | Stream,
    log: _Log,
    signals: interrupts.OneInterrupt,
    console: Console | None,
) -> BaseException | None:
    """Let the backend run. Whatever ends it early is returned, with every live request recorded."""
    total = len(side.requests)
    label = {"real": "Real engine", "sim": "Simulator"}[side.backend.name]
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(console.live(label, total)) if console is not None else None
        watch = Watch(control, recorder, total)

        def progress(core: EngineCore, now: int) -> None:
            if view is not None and view.due():
                view.show(watch.look(now))

        drive = side.backend.drive(control, side.requests, progress)
        try:
            drive.run()
        except (KeyboardInterrupt, SystemExit, Exception) as error:
            # A bug of ours must not cost the record either, nor an impatient second Ctrl-C.
            signals.saving()
            log.ending = True
            for core in control.fleet.cores:
                core.interrupt(drive.now)
            return _exited(error, side) if isinstance(error, SystemExit) else error
        finally:
            signals.saving()
            log.ending = True
            control.fleet.close(drive.now)
        if console is not None:
            seen = watch.look(drive.now)
            console.say(
                f"{label}: {total} requests in {seen.steps} steps, {seen.now / 1e9:.1f} s of run time"
            )
    return None


def _exited(error: SystemExit, side: Side) -> DiptychError:
    """A policy that calls `sys.exit` has failed like one that raises: its own line is at fault."""
    while isinstance(error.__cause__, SystemExit):  # SimPy raises a copy
        error = error.__cause__
    chosen = side.spec.policies
    return blame(
        error,
        f"policy '{chosen['policy']['name']}'",
        "a policy may not end the process",
        eviction=str(chosen.get("eviction", {}).get("name", "")),
    )


def _because(ended: BaseException | None) -> str | None:
    if ended is None:
        return None
    if isinstance(ended, KeyboardInterrupt):
        return f"it was interrupted ({interrupts.reason(ended)})"
    return (
        str(ended) if isinstance(ended, DiptychError) else f"it failed with {type(ended).__name__}: {ended}"
    )
