"""One side of an experiment: a workload through one backend, into one run directory. All three paths meet here."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import __version__
from lab.assembly import EngineSpec, assemble
from lab.backend import Backend
from lab.console import Console
from lab.control.core import EngineCore
from lab.control.gateway import Gateway
from lab.control.observer import Observers
from lab.control.request import Request
from lab.errors import DiptychError
from lab.observe.environment import environment
from lab.observe.identity import RunInfo, workload_id
from lab.observe.logs import JsonLog
from lab.observe.recorder import Recorder
from lab.observe.rundir import RunDirectory
from lab.observe.spans import spans

SHOW_EVERY = 4
"""Steps between two looks at the progress display."""


@dataclass(frozen=True)
class Side:
    """What is run, on what, and what is written down about it."""

    backend: Backend
    spec: EngineSpec
    requests: Sequence[Request]
    config_text: str
    model: str
    otlp_file: bool = False
    export_to: Sequence[str] = ()
    """Where else spans go: `console`, or OTLP/HTTP endpoints."""
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where the workload comes from."""


def run_side(side: Side, path: Path, console: Console | None) -> Path:
    """Run to the end and write everything. Whatever ends it early, what was recorded is written first."""
    backend = side.backend
    workload = workload_id(side.requests)
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
    with RunDirectory.create(path, backend.name, now=now, key=side.config_text) as directory:
        directory.write_text("config.yaml", side.config_text)
        directory.write_json(
            "environment.json",
            environment(
                sys.argv,
                started=now.isoformat(timespec="seconds"),
                backend=dict(backend.about),
                capacity=dataclasses.asdict(backend.capacity),
                workload=side.source,
                policies=dict(side.spec.policies),
            ),
        )
        recorder = Recorder()
        with JsonLog(directory.file("log.jsonl"), info) as log:
            gateway, core = assemble(side.spec, backend.capacity, Observers(recorder, log))
            began = time.perf_counter()
            ended = _drive(side, gateway, core, recorder, console)
            wall = time.perf_counter() - began
        if side.otlp_file:
            from lab.observe.otel import write_otlp

            directory.write("spans.otlp.jsonl", lambda file: write_otlp(file, spans(recorder, info), info))
        directory.save(
            recorder,
            info,
            block_size=backend.capacity.block_size,
            wall_s=wall,
            workload=side.requests,
            partial=_because(ended),
        )
        if ended is not None:
            raise ended
        for target in side.export_to:
            from lab.observe.otel import export_to

            export_to(target, spans(recorder, info), info)
    return directory.path


def _drive(
    side: Side, gateway: Gateway, core: EngineCore, recorder: Recorder, console: Console | None
) -> BaseException | None:
    """Let the backend run. Whatever ends it early is returned, with every live request recorded."""
    total = len(side.requests)
    label = {"real": "Real engine", "sim": "Simulator"}[side.backend.name]
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(console.progress(label, total)) if console is not None else None

        def progress(core: EngineCore, now: int) -> None:
            if update is not None and core.steps % SHOW_EVERY == 0:
                note = f"step {core.steps}, {core.running} running, {core.waiting} waiting, KV {_kv(core)} %"
                update(len(recorder.requests), f"{note}, {now / 1e9:.1f} s")

        drive = side.backend.drive(gateway, core, side.requests, progress)
        try:
            drive.run()
        except (KeyboardInterrupt, Exception) as error:  # a bug of ours must not cost the record either
            core.interrupt(drive.now)
            return error
        if update is not None:
            update(total, f"{core.steps} steps, {drive.now / 1e9:.1f} s of run time")
    return None


def _kv(core: EngineCore) -> int:
    return round(100 * core.pool.held / core.pool.total)


def _because(ended: BaseException | None) -> str | None:
    if ended is None:
        return None
    if isinstance(ended, KeyboardInterrupt):
        return "it was interrupted (Ctrl-C)"
    return (
        str(ended) if isinstance(ended, DiptychError) else f"it failed with {type(ended).__name__}: {ended}"
    )
