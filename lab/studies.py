"""Many runs in place of one: every policy of a kind on every workload, as `studies` in a configuration says.

    python -m lab.experiment +experiment=policy_zoo run.dir=zoo

Each run is an experiment of its own with a run directory of its own, `<run.dir>/<study>/<workload>/<name>`, in one
of several processes. A run that is there, complete and with an equal configuration, isn't made again, so the same
command goes on where an earlier one was stopped (a policy whose code has changed isn't noticed: remove its
directories). Whatever ends one run, and be it its process, costs that run alone. Observation path.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import multiprocessing
import os
import re
import shlex
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lab import plugins
from lab.choices import choice_schema
from lab.config import Config, StudyConfig
from lab.console import Console
from lab.errors import ConfigError, DiptychError
from lab.observe import claim
from lab.validation import validate

STOP_S = 10.0
"""How long a worker may take to write down what it has when it is stopped."""
_PROGRESS = re.compile(r".* \.\.\.|[\w ]+: \d+/\d+ .*")
_OWN = ("studies", "run.dir", "run.root")


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One run of a study: what it is called by, where it lies, and its whole configuration."""

    study: str
    workload: str
    name: str
    """Of the plug-in that is varied."""
    axes: tuple[tuple[str, Any], ...]
    """Values of the study's axes, the seed among them where the study has seeds."""
    path: Path
    config_text: str
    impossible: str = ""
    """Why it can't even be configured."""

    def __str__(self) -> str:
        return " ".join(
            [self.study, self.workload, self.name, *(f"{key}={value}" for key, value in self.axes)]
        )

    @property
    def done(self) -> bool:
        """Whether this very run is complete."""
        try:
            if claim.partial_reason(self.path) is not None:
                return False
            return (self.path / "config.yaml").read_text(encoding="utf-8") == self.config_text
        except (OSError, UnicodeDecodeError, DiptychError):
            return False


@dataclass(slots=True)
class Outcome:
    """How a run went: `error` is one sentence, `trace` whatever else there is to say of it."""

    error: str = ""
    trace: str = ""
    said: list[str] = field(default_factory=list)


def run_studies(cfg: Config) -> int:
    """All runs of all studies, their tables and pictures. Returns the exit code: 1 where a run failed."""
    from lab.analysis.studies import conclude

    console = Console()
    root = _root(cfg)
    with claim.held(root):
        runs = list(plan(cfg, root))
        missing = [run for run in runs if not run.done]
        if len(missing) < len(runs):
            console.say(f"{len(runs) - len(missing)} of {len(runs)} runs are there already.")
        try:
            failed = run_all(missing, workers(cfg, runs), console)
        except KeyboardInterrupt:
            kept = sum(run.done for run in runs)
            console.say(f"{kept} of {len(runs)} runs are kept; to go on: {_again(cfg, root)}")
            raise
        for study in cfg.studies:
            conclude(root / study, [run for run in runs if run.study == study and run not in failed], console)
        _report_failures(root, failed, len(runs), console)
    print(f"studies: {root}")
    return 1 if failed else 0


def plan(cfg: Config, root: Path) -> Iterator[StudyRun]:
    """Every run of every study. Raises `ConfigError`; a plug-in that can't be loaded fails its own runs only."""
    from lab import compose
    from lab.experiment import config_yaml

    taken: set[Path] = set()
    with compose.composer(cfg.origin.config_dir) as composer:
        for study_name, study in cfg.studies.items():
            seam = study.vary.seam
            names = _all(seam) if study.vary.names == "all" else list(study.vary.names)
            sections = {name: _section(seam, name) for name in names}
            for workload, axes, words in _points(study_name, study, cfg.origin.words):
                point = composer.config(words)
                point.studies, point.run.dir = {}, None
                validate(point)
                if point.backend == "both":
                    raise ConfigError(
                        f"study '{study_name}' has backend=both; expected real, sim or cache: one run a directory."
                    )
                before, after = re.split(rf"^{seam}:\n(?:  .*\n)+", config_yaml(point), flags=re.M)
                for name in names:
                    if name in study.vary.without:
                        continue
                    path = root / study_name / _plain(workload) / _plain(name)
                    path = path.joinpath(*(_plain(f"{key}={value}") for key, value in axes))
                    if path in taken:
                        raise ConfigError(
                            f"study '{study_name}' has two runs that would both lie in '{path}'."
                        )
                    taken.add(path)
                    section, wrong = sections[name]
                    text = before + section + after if section else ""
                    yield StudyRun(study_name, workload, name, axes, path, text, wrong)


def _points(
    study_name: str, study: StudyConfig, typed: Sequence[str]
) -> Iterator[tuple[str, tuple[tuple[str, Any], ...], list[str]]]:
    """Workload, values of the axes, and the words of a run there, without the name that is varied."""
    axes = {**study.axes, **({"seed": list(study.seeds)} if study.seeds else {})}
    fixed = {study.vary.seam, f"{study.vary.seam}.name", *axes}
    mine = [word for word in typed if not _key(word).startswith(_OWN)]
    for word in mine:
        if _key(word) in fixed:
            raise ConfigError(
                f"'{word}': study '{study_name}' varies {_key(word)} itself; change it under "
                f"studies.{study_name}, as in studies.{study_name}.vary.names=[...]."
            )
    files = [word for word in mine if word.startswith("+")]
    last = [word for word in mine if not word.startswith("+")]
    for workload, own in study.workloads.items():
        for values in itertools.product(*axes.values()):
            chosen = tuple(zip(axes, values, strict=True))
            words: dict[str, str] = {}
            here = [f"{key}={value}" for key, value in chosen]
            for word in (*files, *study.overrides, *own, *here, *last):
                words.pop(_key(word), None)  # the later one counts, and Hydra takes a group only once
                words[_key(word)] = word
            yield workload, chosen, list(words.values())


def workers(cfg: Config, runs: Sequence[StudyRun]) -> int:
    """How many at once: one a core, but one alone where a run measures time, unless a study says."""
    asked = [study.workers for study in cfg.studies.values() if study.workers is not None]
    if asked:
        return max(asked)
    measured = any(re.search(r"^backend: (?!sim$|cache$)", run.config_text, re.M) for run in runs)
    return 1 if measured else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def run_all(runs: Sequence[StudyRun], count: int, console: Console) -> dict[StudyRun, Outcome]:
    """Make these runs with `count` processes; returns those that failed. Ctrl-C stops all of them."""
    failed = {run: Outcome(run.impossible) for run in runs if run.impossible}
    waiting = [run for run in reversed(runs) if not run.impossible]
    total, said = len(waiting), set[str]()
    if not waiting:
        return failed
    team = [_Worker() for _ in range(min(count, len(waiting)))]
    done = 0
    try:
        with console.progress(f"Studies, {len(team)} at once", total) as update:
            while waiting or any(worker.busy for worker in team):
                for worker in team:
                    if worker.busy is None and waiting:
                        worker.give(waiting.pop())
                ready = wait([worker.connection for worker in team if worker.busy])
                for worker in team:
                    if worker.busy is None or worker.connection not in ready:
                        continue
                    run, outcome = worker.answer()
                    if outcome.error:
                        failed[run] = outcome
                    for line in outcome.said:
                        if line not in said:
                            console.say(line)
                        said.add(line)
                    done += 1
                    update(done, str(run))
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            worker.stop()
    return failed


class _Worker:
    """A process that makes one run after another. If it dies, the run that it was at has failed."""

    def __init__(self) -> None:
        self.busy: StudyRun | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        # Ctrl-C on a terminal goes to the whole group; with the signal blocked from birth it is the parent,
        # and nobody else, who hears it and ends the others by SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()

    def give(self, run: StudyRun) -> None:
        self.busy = run
        with contextlib.suppress(BrokenPipeError):  # it died idle: `answer` will say so
            self.connection.send((str(run.path), run.config_text))

    def answer(self) -> tuple[StudyRun, Outcome]:
        run, self.busy = self.busy, None
        assert run is not None
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            outcome = Outcome(f"its process was ended {how}")
            self.connection.close()
            self._start()
        return run, outcome

    def stop(self) -> None:
        self.process.join(STOP_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _serve(connection: Connection[Any, Any]) -> None:
    """The worker's side: run what comes until nothing comes any more."""
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            path, text = connection.recv()
            connection.send(_run(path, text))


def _run(path: str, text: str) -> Outcome:
    from lab.compose import from_yaml
    from lab.experiment import experiment

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            cfg = from_yaml(text)
            cfg.run.dir = path
            validate(cfg)
            experiment(cfg)
        except DiptychError as error:
            return Outcome(" ".join(str(error).split()))
        except Exception as error:
            reason = " ".join(str(error).split())
            return Outcome(f"{type(error).__name__}: {reason}", traceback.format_exc())
    return Outcome(said=[line for line in said.getvalue().splitlines() if not _PROGRESS.fullmatch(line)])


# --- details -----------------------------------------------------------------------------------------------


def _section(seam: str, name: str) -> tuple[str, str]:
    """What `config.yaml` says of one plug-in, the same in every run of it; or "" and why it can't be chosen."""
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_yaml(
            OmegaConf.create({seam: OmegaConf.structured(choice_schema(seam, name))})
        ), ""
    except DiptychError as error:
        return "", str(error)


def _all(seam: str) -> list[str]:
    """Every name of a seam, but not the second of two that mean the same."""
    targets = {name: providers[0].target for name, providers in plugins.providers(seam).items()}
    return [name for name in targets if name == next(n for n in targets if targets[n] == targets[name])]


def _root(cfg: Config) -> Path:
    if cfg.run.dir is not None:
        return Path(cfg.run.dir)
    from lab.observe.rundir import fresh_directory

    named = [word.partition("=")[2] for word in cfg.origin.words if word.startswith("+experiment=")]
    now = datetime.datetime.now()
    return fresh_directory(Path(cfg.run.root), named[-1] if named else "studies", now=now, key=repr(cfg))


def _again(cfg: Config, root: Path) -> str:
    words = [word for word in cfg.origin.words if not _key(word).startswith("run.")]
    return shlex.join(["python", "-m", "lab.experiment", *words, f"run.dir={root}"])


def _report_failures(root: Path, failed: dict[StudyRun, Outcome], total: int, console: Console) -> None:
    """What failed, and why, at the end where it is seen; tracebacks go to a file."""
    file = root / "failures.txt"
    file.unlink(missing_ok=True)
    if not failed:
        return
    console.say(f"{len(failed)} of {total} runs failed:")
    for run, outcome in failed.items():
        console.say(f"  {run}: {outcome.error}")
    traces = [f"{run}: {outcome.error}\n{outcome.trace}" for run, outcome in failed.items()]
    file.write_text("\n".join(traces), encoding="utf-8")
    console.say(f"More about them: {file}")


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _plain(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.") or "-"
