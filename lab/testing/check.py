"""`check_policy`: search for a workload that breaks a policy, and say it in the fewest requests. Observation path."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import random
from typing import Any

from lab.errors import ConfigError, DiptychError, PolicyError
from lab.testing.advice import advise
from lab.testing.cases import Case, engine_situations, fleet_situations
from lab.testing.contracts import KINDS, Broken
from lab.testing.report import Problem, Report
from lab.testing.subject import Policy, Subject, resolve
from lab.testing.trial import trial


def check_policy(policy: Policy, *, seed: int = 0, examples: int = 25, kind: str = "") -> Report:
    """Drive a policy through workloads that have broken policies before; report what breaks.

    `policy` is a class, a factory, or what one would write on a command line: `sjf`, `eviction=lru`,
    `./mine.py:Mine`. `examples` workloads are tried of each situation, the same ones for the same `seed`.
    `kind` is needed only where a name exists in several kinds. Raises `ConfigError` if there is no such policy.
    """
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "lab.testing searches with Hypothesis, which isn't installed; pip install 'hypothesis>=6.100'."
        ) from error
    subject = resolve(policy, kind)
    report = Report(subject.name, subject.kind)
    search = _Search(subject, seed, report)
    if search.construct():
        search.run(examples)
        if report.ok:
            report.advice += advise(subject, seed)
    return report


def replay(policy: Policy, case: Case, *, seed: int = 0, kind: str = "") -> None:
    """Play one workload as `check_policy` does. Raises `PolicyError` with what breaks, from its cause."""
    subject = resolve(policy, kind)
    try:
        trial(subject, seed, case)
    except Broken as broken:
        where = f", at {broken.where}" if broken.where else ""
        said = f"{subject.name} breaks '{broken.contract}': {broken.says}{where}"
        raise PolicyError(said) from (broken.__cause__ or broken)


class _Search:
    """Looks for the smallest workload that breaks each contract."""

    def __init__(self, subject: Subject, seed: int, report: Report) -> None:
        self.subject, self.seed, self.report = subject, seed, report

    def construct(self) -> bool:
        """Whether a policy can be made at all."""
        try:
            self.subject.make()
        except DiptychError as error:
            self.report.problems.append(Problem("made", str(error), ""))
        except Exception as error:
            said = f"making one raised {type(error).__name__}: {error}"
            self.report.problems.append(Problem("made", said, ""))
        return self.report.ok

    def run(self, examples: int) -> None:
        st = importlib.import_module("hypothesis.strategies")
        situations = (fleet_situations if KINDS[self.subject.kind].fleet else engine_situations)(st)
        for name, cases in situations.items():
            self.situation(name, cases, examples)
            if self.report.problems:  # one at a time: what is found next mostly follows from it
                return

    def situation(self, name: str, cases: Any, examples: int) -> None:
        """One search. It keeps to the first contract that breaks, and shrinks for that."""
        from hypothesis import HealthCheck, Phase, Verbosity, find, settings
        from hypothesis.errors import Flaky, NoSuchExample

        best: list[tuple[Case, Broken]] = []
        hung = 0

        def breaks(case: Case) -> bool:
            nonlocal hung
            if hung >= 8:  # each takes its time, and what was found first is small
                return False
            broken = self.broken(case)
            if broken is None or (best and _mark(best[0][1]) != _mark(broken)):
                return False
            hung += broken.contract == "hangs"
            if not best or case.size <= best[0][0].size:
                best[:] = [(case, broken)]
            return True

        quiet = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        # Flaky: by chance or by address it broke only once; `best` has it all the same.
        with contextlib.suppress(NoSuchExample, Flaky):
            find(cases, breaks, settings=quiet, random=random.Random(self.seed))
        for case, broken in best:
            case, broken = self.fewer(case, broken)
            self.report.problems.append(
                Problem(broken.contract, broken.says, broken.where, name, case, self.subject.spec)
            )

    def broken(self, case: Case) -> Broken | None:
        self.report.played += 1
        try:
            trial(self.subject, self.seed, case)
        except Broken as broken:
            return broken
        return None

    def fewer(self, case: Case, broken: Broken) -> tuple[Case, Broken]:
        """Without the requests that aren't needed. Hypothesis gives up early on what breaks by chance or is slow."""
        for number in reversed(range(len(case.requests))):
            rest = case.requests[:number] + case.requests[number + 1 :]
            less = dataclasses.replace(case, requests=rest)
            again = [found for _ in range(2) if rest and (found := self.broken(less)) is not None]
            if again and _mark(again[0]) == _mark(broken):
                case, broken = less, again[0]
        return case, broken


def _mark(broken: Broken) -> tuple[str, str]:
    return (broken.contract, broken.where)
