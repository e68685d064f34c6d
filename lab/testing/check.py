"""`check_policy`: search for a workload that breaks a policy, and say it in the fewest requests. Observation path."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import random
import types
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lab import importing, plugins
from lab.errors import ConfigError, DiptychError, PolicyError, UnknownNameError
from lab.testing.cases import Ask, Case, engine_situations, fleet_situations
from lab.testing.fleet import play_fleet
from lab.testing.play import CONTRACTS, KINDS, Broken, Decided, Watch, play_engine, rng

KIND_WORDS = types.MappingProxyType(
    {
        "policy": "a scheduling policy",
        "eviction": "an eviction policy",
        "compression": "a compression policy",
        "preemption": "a preemption policy",
        "predictor": "a length predictor",
        "admission": "an admission policy",
        "routing": "a routing policy",
        "scaling": "a scaling policy",
    }
)
FLEET = ("admission", "routing", "scaling")
FEW, MANY = 150, 450
"""Requests, one after another, after which a policy's memory is looked at."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken contract, and the smallest workload found that shows it (None: none is needed)."""

    contract: str
    says: str
    where: str
    situation: str = ""
    case: Case | None = None
    spec: str = ""

    def __str__(self) -> str:
        lines = [f"{self.contract}: {CONTRACTS[self.contract]}.", f"  {self.says}"]
        lines += [f"  at {self.where}"] * bool(self.where)
        if self.case is not None:
            code = f"replay({self.spec}, {self.case.code()})"
            lines += ["", f"  The smallest workload found ({self.situation}):"]
            lines += [f"    {line}" for line in self.case.table().splitlines()]
            lines += ["", "  To see it again:"]
            lines += [f"    {line}" for line in ("from lab.testing import Ask, Case, replay", "")]
            lines += [f"    {line}" for line in code.splitlines()]
        return "\n".join(lines)


@dataclass(slots=True)
class Report:
    """What `check_policy` found. `str()` is for people."""

    name: str
    kind: str
    problems: list[Problem] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    """What works, and should be better: cost and memory."""
    played: int = 0
    """Workloads tried."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise `PolicyError` with the whole report if a contract broke."""
        if self.problems:
            raise PolicyError(str(self))

    def __str__(self) -> str:
        what = KIND_WORDS[self.kind]
        if self.ok:
            lines = [f"{self.name} keeps every contract of {what} ({self.played} workloads played)."]
        else:
            count = len(self.problems)
            lines = [f"{self.name} breaks {count} contract{'s' * (count > 1)} of {what}."]
        for number, problem in enumerate(self.problems, 1):
            first, *rest = str(problem).splitlines()
            lines += ["", f"{number}. {first}", *(f" {line}".rstrip() for line in rest)]
        if self.advice:
            lines += ["", "Advice:", *(f"- {line}" for line in self.advice)]
        return "\n".join(lines)


Policy = Any
"""A class, a function without arguments that makes one, or a name as on a command line."""


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
    make, kind, name, spec = _resolved(policy, kind)
    report = Report(name, kind)
    search = _Search(make, kind, seed, spec, report)
    if search.construct():
        search.run(examples)
        if report.ok:
            search.advise()
    return report


def replay(policy: Policy, case: Case, *, seed: int = 0, kind: str = "") -> None:
    """Play one workload as `check_policy` does. Raises `PolicyError` with what breaks, from its cause."""
    make, kind, name, _ = _resolved(policy, kind)
    try:
        _trial(make, kind, seed, case)
    except Broken as broken:
        where = f", at {broken.where}" if broken.where else ""
        said = f"{name} breaks '{broken.contract}': {broken.says}{where}"
        raise PolicyError(said) from (broken.__cause__ or broken)


def _resolved(policy: Policy, kind: str) -> tuple[Callable[[], Any], str, str, str]:
    """(how to make one, kind, what to call it, how to write it in Python)."""
    if isinstance(policy, str):
        said, _, word = policy.rpartition("=")
        said = said or kind
        kind, cls = _named(word, said)
        for parameter, (_, default) in plugins.parameters(cls).items():
            if default is inspect.Parameter.empty:
                raise ConfigError(f"{word} needs a value for '{parameter}': {kind}.{parameter}=VALUE.")
        return cls, kind, word, repr(f"{said}={word}" if said else word)
    if isinstance(policy, type):
        kind = _kind_of(policy, kind)
        spec = f"{policy.__qualname__}" if policy.__module__ == "__main__" else repr(_dotted(policy))
        return policy, kind, policy.__name__, spec
    if not callable(policy):
        raise ConfigError(f"policy is {policy!r}; expected a class, a function that makes one, or a name.")
    name = getattr(policy, "__name__", "policy").replace("<lambda>", "the policy")
    try:
        cls = type(policy())
    except Exception as error:
        raise PolicyError(f"{name}() raised {type(error).__name__}: {error}") from error
    return policy, _kind_of(cls, kind), cls.__name__, cls.__name__ if "<" in name else name


def _dotted(cls: type) -> str:
    said = plugins.provenance(cls)
    return said if importing.is_loose(cls) else f"{cls.__module__}:{cls.__qualname__}"


def _named(word: str, kind: str) -> tuple[str, type]:
    if kind:
        if kind not in KINDS:
            raise UnknownNameError("kind of policy", kind, KINDS)
        return kind, plugins.load(kind, word)
    if plugins.is_path(word):
        cls = plugins.load_any(word, tuple(KINDS.values()))
        return _kind_of(cls, ""), cls
    there = [k for k in KINDS if word in plugins.names(k)]
    if not there:
        known = {name for k in KINDS for name in plugins.names(k)}
        raise UnknownNameError("policy", word, known, "Or module:Class, ./file.py:Class.")
    if len(there) > 1:
        raise ConfigError(f"'{word}' is {' and '.join(KIND_WORDS[k] for k in there)}; say {there[0]}={word}.")
    return there[0], plugins.load(there[0], word)


def _kind_of(cls: type, kind: str) -> str:
    found = [k for k, base in KINDS.items() if issubclass(cls, base)]
    if not found or (kind and kind not in found):
        wanted = KINDS[kind].__name__ if kind in KINDS else " or ".join(b.__name__ for b in KINDS.values())
        raise ConfigError(f"{cls.__name__} is no policy; expected a subclass of lab.policy's {wanted}.")
    return kind or found[0]


def _trial(make: Callable[[], Any], kind: str, seed: int, case: Case) -> list[Watch]:
    """Play a case twice, the second time in what looks like another process, and compare."""
    watches, told = [], []
    for salt in (0, seed + 1):
        clutter = _clutter(salt)
        watch = Watch(make(), kind)
        watch.policy.rng = rng(kind, seed)
        told.append((play_fleet if kind in FLEET else play_engine)(case, watch, salt))
        watches.append(watch)
        del clutter
    if told[0] != told[1]:
        hook = {"policy": "schedule", "eviction": "victim", "preemption": "victim", "predictor": "predict"}
        hook |= {"compression": "keep", "admission": "admit", "routing": "route", "scaling": "target"}
        main = hook[kind]
        raise Broken("determinism", _parting(*told), watches[0].defined(main))
    return watches


def _clutter(salt: int) -> list[object]:
    """Objects that scatter the addresses of those made next: an order by `id()` then differs."""
    draw = random.Random(salt)
    made: list[object] = [bytes(draw.randrange(16, 400)) for _ in range(100)]
    draw.shuffle(made)
    return made[: 50 if salt else 0]


def _parting(first: list[Decided], second: list[Decided]) -> str:
    for one, other in zip(first, second, strict=False):
        if one != other:
            return f"played twice, it decided first {_brief(one)} and then {_brief(other)}"
    return f"played twice, it decided {len(first)} times and then {len(second)} times"


def _brief(decided: Decided) -> str:
    if len(decided) == 6 and isinstance(decided[0], int):
        _, work, preempted, rejected, *_ = decided
        assert isinstance(work, tuple)
        told = ", ".join(f"{w.request}: {w.tokens}" for w in work)
        marks = [
            f"{what} {gone}" for what, gone in (("preempted", preempted), ("rejected", rejected)) if gone
        ]
        return f"step {decided[0]} ({'; '.join([told, *marks])})"
    return str(decided)


def _mark(broken: Broken) -> tuple[str, str]:
    return (broken.contract, broken.where)


class _Search:
    """Looks for the smallest workload that breaks each contract."""

    def __init__(self, make: Callable[[], Any], kind: str, seed: int, spec: str, report: Report) -> None:
        self.make, self.kind, self.seed, self.spec, self.report = make, kind, seed, spec, report

    def construct(self) -> bool:
        """Whether a policy can be made at all."""
        try:
            self.make()
        except DiptychError as error:
            self.report.problems.append(Problem("made", str(error), ""))
        except Exception as error:
            said = f"making one raised {type(error).__name__}: {error}"
            self.report.problems.append(Problem("made", said, ""))
        return self.report.ok

    def run(self, examples: int) -> None:
        st = importlib.import_module("hypothesis.strategies")
        situations = fleet_situations(st) if self.kind in FLEET else engine_situations(st)
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
                Problem(broken.contract, broken.says, broken.where, name, case, self.spec)
            )

    def broken(self, case: Case) -> Broken | None:
        self.report.played += 1
        try:
            _trial(self.make, self.kind, self.seed, case)
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

    def advise(self) -> None:
        """Cost of planning, and what is kept of requests that are gone."""
        held: list[dict[str, int]] = []
        for count in FEW, MANY:
            case = Case(
                requests=tuple(_passer_by(i) for i in range(count)), blocks=16, block_size=8, token_budget=24
            )
            watch = Watch(self.make(), self.kind)
            watch.policy.rng = rng(self.kind, self.seed)
            try:
                (play_fleet if self.kind in FLEET else play_engine)(case, watch)
            except Broken:  # a matter for a longer search
                return
            held.append(entries(watch.policy))
        for name, count in held[1].items():
            before = held[0].get(name, 0)
            if count - before >= 0.9 * (MANY - FEW):
                self.report.advice.append(
                    f"self.{name} grew from {before} to {count} entries when {MANY} requests in place of {FEW} "
                    "had come and gone: what is kept of each of them adds up in a run of millions. Forget it in "
                    "on_finish or on_dropped, or keep the latest few."
                )
        queue = Case(requests=(Ask(prompt=4, output=2),) * 20, max_seqs=1)
        if self.kind == "policy":
            watch = _trial(self.make, self.kind, self.seed, queue)[0]
            if watch.most_waiting_read >= 10:
                self.report.advice.append(
                    f"schedule walked through {watch.most_waiting_read} waiting requests in one step "
                    f"({watch.walked_at}): planning then costs what the queue is long. Keep an order of your "
                    "own through on_arrival, on_preempt and on_finish; see policies/scheduling/common.py."
                )


def _passer_by(number: int) -> Ask:
    return Ask(prompt=12, output=2, at=4 * number, tenant=("gold", "free")[number % 2])


def entries(policy: Any) -> dict[str, int]:
    """How much each attribute of a policy holds: entries of containers, all the way down."""
    return {name: _entries(value, set()) for name, value in vars(policy).items() if name != "future"}


def _entries(value: object, seen: set[int]) -> int:
    if id(value) in seen or len(seen) > 100_000:
        return 0
    seen.add(id(value))
    if isinstance(value, Mapping):
        return len(value) + sum(_entries(item, seen) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set | frozenset | deque):
        return len(value) + sum(_entries(item, seen) for item in value)
    if type(value).__module__.partition(".")[0] in ("lab", "random", "builtins"):
        return 0  # views and blocks lead to the whole engine
    return sum(_entries(item, seen) for item in getattr(value, "__dict__", {}).values())
