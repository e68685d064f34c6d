"""python -m lab.experiment policy=fcfs: one workload, one policy, on the real engine and on the simulator.

The main job. It loads the model, calibrates the simulator on it (once a machine), runs the workload on both
backends under the same policies, prints one table of both with the errors, says where the decisions part and
what the error is made of, and leaves a run directory for each side and a report page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lab import plugins, ranks
from lab.assembly import EngineSpec
from lab.collector import collector_at_rest
from lab.config import Config, sampling
from lab.control.request import stream_of
from lab.errors import DiptychError, RunError

if TYPE_CHECKING:
    from lab.backend import Backend, OpenBackend
    from lab.console import Console
    from lab.control.request import Request
    from lab.replayed import Job
    from lab.session import Ran

ABOUT = "Run one workload under one policy on the real engine and on the simulator, and compare."


def experiment(cfg: Config) -> int:
    """One experiment, for any `backend`, or all those of `studies`. Returns the exit code; raises `DiptychError`."""
    from lab.console import Console

    if ranks.follows(cfg, os.environ):
        return cast("Callable[[Config], int]", plugins.load_object("backend", ranks.WORKER))(cfg)
    if cfg.studies:
        from lab.studies import run_studies

        return run_studies(cfg)
    console = Console()
    with collector_at_rest():
        job = _job(cfg)
    path = _directory(job.cfg, job.config_text, job.slug)
    try:
        return _carry_out(job, path, console)
    except BaseException:
        if job.cfg.run.dir is None:
            with contextlib.suppress(OSError):  # there is something in it, which stays
                path.rmdir()
        raise


def _carry_out(job: Job, path: Path, console: Console) -> int:
    """The job, into `path`."""
    from lab.observe import claim

    cfg, requests, source, config_text = job.cfg, job.requests, job.source, job.config_text
    if cfg.backend != "both" and claim.part_of_another(path):
        raise RunError(
            f"'{path}' is one side of an experiment on both backends, and backend={cfg.backend} would replace "
            "it alone; choose another run.dir."
        )
    if cfg.backend == "cache":
        from lab.cache_study import run_cache_study

        run_cache_study(cfg, requests, source, config_text, path, console)
        return 0

    from lab.session import Side, run_side

    both = cfg.backend == "both"
    with contextlib.ExitStack() as stack:
        opened: list[Backend] = []
        if both:
            stack.enter_context(claim.held(path))
        for name in ["real", "sim"] if both else [cfg.backend]:
            open_backend = cast("OpenBackend", plugins.load_object("backend", name))
            opened.append(open_backend(cfg, console, opened[0] if opened else None))
            stack.callback(opened[-1].close)
        if both:
            claim.clear(path)
        finished: dict[str, Ran] = {}
        for backend in opened:
            side = Side(
                backend=backend,
                spec=job.spec,
                requests=_ending(requests, cfg, backend),
                config_text=config_text,
                model=cfg.model.name,
                otlp_file=cfg.export.otlp_file,
                record=cfg.run.record,
                source=source,
            )
            finished[backend.name] = run_side(side, path / backend.name if both else path, console)
        _conclude(cfg, {name: ran.path for name, ran in finished.items()}, path)
        try:
            if cfg.export.perfetto if cfg.export.perfetto is not None else set(finished) != {"sim"}:
                _timeline(finished, path)
        finally:  # a full disk doesn't keep the spans from a collector
            _export(cfg, finished)
    return 0


def _job(cfg: Config) -> Job:
    """What is to be run: the configuration's own workload, or a recorded run again."""
    from lab.replayed import Job, replayed

    if cfg.engine.mode == "replay":
        return replayed(cfg)
    requests, source = workload(cfg)
    spec = EngineSpec.of(dataclasses.asdict(cfg))
    policy = Path(re.sub(r"\.py(?=:|$)", "", cfg.policy.name)).name  # of a loose file, without where it lies
    return Job(cfg, requests, source, spec, config_yaml(cfg), f"{policy}-{cfg.trace.name}")


def _timeline(finished: Mapping[str, Ran], path: Path) -> None:
    """What Perfetto shows: both sides over each other."""
    from lab.export import TIMELINE, write_timeline
    from lab.observe.plain import plain_spans

    sides = [(name, plain_spans(ran.recorder, ran.info, links=False)) for name, ran in finished.items()]
    write_timeline(path / TIMELINE, sides)
    print(f"timeline for ui.perfetto.dev: {path / TIMELINE}")


def _export(cfg: Config, finished: Mapping[str, Ran]) -> None:
    """Send the spans where they were wanted. The runs are complete by now: no failure costs one of them."""
    from lab.export import headers
    from lab.observe.otel import export_to

    targets = [target for target in (cfg.export.otlp_endpoint, "console" * cfg.export.console) if target]
    more = headers()
    failed: dict[str, str] = {}
    for target in targets:
        for name, ran in finished.items():
            try:
                export_to(target, ran.recorder, ran.info, more)
            except DiptychError as error:
                failed[name] = str(error)
    if failed:
        reason = next(iter(failed.values())).rstrip(".")
        raise RunError(f"spans of {' and '.join(failed)}: {reason}; the run itself is complete.")


def workload(cfg: Config) -> tuple[list[Request], dict[str, Any]]:
    """The requests that the configuration asks for, in order of arrival, and where they come from."""
    from lab.choices import trace_options, traces

    loaded = traces()[cfg.trace.name].load(cfg.trace.name, trace_options(cfg))
    drawn = sampling(cfg)
    found = [_completed(request, cfg, drawn) for request in loaded.requests]
    return found, {"trace": loaded.name, **loaded.source}


def _completed(request: Request, cfg: Config, sampling: Any) -> Request:
    """A trace's request with what the configuration adds: sampling, objectives, salt."""
    slo = cfg.slo

    def objective(own: int | None, default_ms: float | None) -> int | None:
        return own if own is not None or default_ms is None else round(default_ms * 1e6)

    # Each request draws from a stream of its own: with one for all, equal prompts would get equal samples.
    own_seed = stream_of("sampling", sampling.seed, request.id) >> 1
    changes: dict[str, Any] = {
        "sampling": dataclasses.replace(sampling, seed=own_seed, min_tokens=0),
        "n": cfg.sampling.n,
        "ttft_slo": objective(request.ttft_slo, slo.ttft_ms),
        "tpot_slo": objective(request.tpot_slo, slo.tpot_ms),
    }
    if cfg.kv.salt_per_tenant:
        changes["cache_salt"] = request.tenant
    return dataclasses.replace(request, **changes)


def _ending(requests: list[Request], cfg: Config, backend: Backend) -> list[Request]:
    """How outputs end: at the trace's lengths, or (`output_lengths=stop`) where the model itself stops."""
    if cfg.output_lengths == "forced":
        return requests
    least, stop = cfg.sampling.min_tokens, tuple(cfg.sampling.stop)
    return [
        dataclasses.replace(
            r,
            output_len=None,
            max_tokens=r.output_limit,
            stop_ids=backend.stop_ids,
            stop=stop,
            sampling=dataclasses.replace(r.sampling, min_tokens=min(least, r.output_limit)),
        )
        for r in requests
    ]


def config_yaml(cfg: Config) -> str:
    """The resolved configuration as text. Where the run lies is no part of it."""
    from lab.compose import to_yaml

    return to_yaml(dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=None, baseline=None)))


def _directory(cfg: Config, key: str, slug: str) -> Path:
    from lab.observe.rundir import fresh_directory

    if cfg.run.dir is not None:
        return Path(cfg.run.dir)
    return fresh_directory(Path(cfg.run.root), slug, now=datetime.datetime.now(), key=key)


def _conclude(cfg: Config, finished: Mapping[str, Path], path: Path) -> None:
    """Compare, print, and write the report page. A simulation alone must not wait for pandas and plots."""
    from lab.analysis.lateness import lateness
    from lab.analysis.machine import machine
    from lab.analysis.runs import Run, load
    from lab.analysis.table import show

    runs = [load(where) for where in finished.values()]
    result = None
    if set(finished) == {"real", "sim"}:
        from lab.diff import compare

        result = compare(runs[0], runs[1], path / "replay")
        result.write(path / "diff.json")
    show(result or runs[0])
    said = dict.fromkeys(
        filter(None, (say(run) for run in runs for say in (Run.all_rejected, lateness, machine)))
    )
    for sentence in said:
        print(sentence)
    for name, where in finished.items():
        print(f"{name}: {where}")
    if cfg.run.report if cfg.run.report is not None else set(finished) != {"sim"}:
        from lab.analysis.report import write_report

        report = path / "report.html"
        write_report(report, runs, result)
        print(f"report: {report}")
    if cfg.run.baseline is not None:
        from lab.regress import record

        print(f"baseline: {record(cfg.run.baseline, [path])}")


def main(argv: list[str] | None = None) -> int:
    from lab.cli import main as command

    return command(experiment, about=ABOUT, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
