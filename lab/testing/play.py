"""Plays a workload on a real engine core with the policy under test in it, and watches. Observation path.

What a contract is stands in `CONTRACTS`; where one breaks, `play` raises `Broken`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import random
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from lab import plugins
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord
from lab.control.plan import StepPlan, StepResult, StepTiming
from lab.control.request import Request, stream_of
from lab.control.step import Limits
from lab.errors import PolicyError, RequestRefused
from lab.policy import (
    NEVER,
    AdmissionPolicy,
    CompressionPolicy,
    EvictionPolicy,
    How,
    LengthPredictor,
    PreemptionPolicy,
    RequestId,
    RequestView,
    RoutingPolicy,
    ScalingPolicy,
    SchedulingPolicy,
    Shortage,
    Step,
)
from lab.state.prefix import ContentChain
from lab.testing.cases import MS, TOKEN_NS, Ask, Case

KINDS: Mapping[str, type] = MappingProxyType(
    {
        "policy": SchedulingPolicy,
        "eviction": EvictionPolicy,
        "compression": CompressionPolicy,
        "preemption": PreemptionPolicy,
        "predictor": LengthPredictor,
        "admission": AdmissionPolicy,
        "routing": RoutingPolicy,
        "scaling": ScalingPolicy,
    }
)
"""What can be checked, by the name of its configuration group."""

CONTRACTS: Mapping[str, str] = MappingProxyType(
    {
        "made": "a policy can be made without arguments: every parameter of __init__ has a default",
        "raises": "no hook raises",
        "hangs": "every hook returns",
        "misuse": "the step is asked only for what is possible",
        "candidates": "a victim is one of the candidates",
        "progress": "every request ends: nothing waits for ever while it could be served",
        "determinism": "the same workload gives the same decisions, in any process",
        "views": "views are for reading only",
        "budgets": "no step holds more than the limits allow",
        "conservation": "every KV block is free, cached or held, and whoever ended holds none",
        "answer": "a hook answers with the type and the range that lab/policy.py states",
    }
)

HOOK_CPU_S = 0.5
"""Processor time after which a hook is held to be in an endless loop."""

F = TypeVar("F", bound=Callable[..., Any])


class Broken(Exception):
    """A contract broke: which, how, and where in the policy's source."""

    def __init__(self, contract: str, says: str, where: str = "") -> None:
        self.contract, self.says, self.where = contract, says, where
        super().__init__(f"{contract}: {says}{f' ({where})' if where else ''}")


class _Hung(BaseException):
    """Not an `Exception`, so that no policy catches it."""


@dataclass
class Watch:
    """What was seen of one policy object while it played."""

    policy: Any
    kind: str
    hook: str = ""
    """The one that is running, or ran last."""
    most_waiting_read: int = 0
    """The most waiting requests that one `schedule` walked through, and where."""
    walked_at: str = ""
    views: list[tuple[Any, tuple[Any, ...]]] = field(default_factory=list)

    files: frozenset[str] = frozenset()
    """Source files of the policy's class and of those it inherits from."""

    def __post_init__(self) -> None:
        self.files = _files(type(self.policy))

    def place(self, error: BaseException) -> str:
        """`file:line, in hook` of the innermost line of the policy's own; else where the hook is defined."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in self.files]
        if frames:
            own = inspect.getsourcefile(type(self.policy))
            last = ([f for f in frames if f.filename == own] or frames)[-1]
            return f"{shown(last.filename)}:{last.lineno}, in {last.name}"
        return self.defined(self.hook)

    def defined(self, hook: str) -> str:
        code = getattr(getattr(type(self.policy), hook, None), "__code__", None)
        return f"{shown(code.co_filename)}:{code.co_firstlineno}, {hook}" if code is not None else ""


def _files(cls: type) -> frozenset[str]:
    own = [base for base in cls.__mro__[:-1] if base not in KINDS.values() and base.__module__ in sys.modules]
    return frozenset(getattr(sys.modules[base.__module__], "__file__", None) or "" for base in own) - {""}


def shown(path: str) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


@contextlib.contextmanager
def judged(watch: Watch) -> Iterator[None]:
    """Turn whatever escapes into `Broken`, and end what doesn't return."""
    try:
        with _time_limit():
            yield
    except Broken:
        raise
    except _Hung as error:
        says = f"{watch.hook} didn't return within {HOOK_CPU_S:g} s of processor time"
        raise Broken("hangs", says, watch.place(error)) from None
    except AssertionError as error:
        cause = watch.place(error) if _touches(watch, error) else ""
        raise Broken("raises" if cause else "conservation", f"{error}", cause) from error
    except PolicyError as error:
        raise _of_policy_error(watch, error) from error
    except Exception as error:
        raise Broken("raises", _raised(watch, error), watch.place(error)) from error


def _touches(watch: Watch, error: BaseException) -> bool:
    return any(f.filename in watch.files for f in traceback.extract_tb(error.__traceback__))


def _raised(watch: Watch, error: BaseException) -> str:
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{watch.hook or 'the engine'} raised {said}"


def _of_policy_error(watch: Watch, error: PolicyError) -> Broken:
    cause = error.__cause__
    if isinstance(cause, Broken):
        return cause
    if cause is not None:
        return Broken("raises", _raised(watch, cause), watch.place(cause))
    text = str(error)
    for contract, mark in (
        ("progress", "without running anything"),
        ("progress", "scheduled nothing"),
        ("candidates", "not a candidate"),
        ("candidates", "expected one of the"),
        ("answer", "foresaw"),
        ("answer", "how() returned"),
        ("answer", "keep() returned"),
    ):
        if mark in text:
            return Broken(contract, text, watch.place(error))
    return Broken("misuse", text, watch.place(error))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Only the main thread can be interrupted; elsewhere an endless loop stays one."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_: int, frame: types.FrameType | None) -> None:
        # Not into a callback of the garbage collector, which would swallow it: soon after, then.
        collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
        while frame is not None:
            if frame.f_code in collecting:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.01)
                return
            frame = frame.f_back
        raise _Hung

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HOOK_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# --- the policy under test, watched ----------------------------------------------------------------------


def watched(watch: Watch) -> Any:
    """A stand-in of the same kind that passes every call on and looks at what happens to the views."""
    base, policy = KINDS[watch.kind], watch.policy
    body: dict[str, Any] = {"__module__": type(policy).__module__}
    for name, method in inspect.getmembers(base, inspect.isfunction):
        if not name.startswith("_"):
            body[name] = _passing(watch, name, getattr(policy, name, method))
    for name in ("leaf_only", "needs_future", "interval"):
        if hasattr(policy, name):
            body[name] = getattr(policy, name)
    return type(type(policy).__name__, (base,), body)()


def _passing(watch: Watch, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(_: object, *args: Any, **options: Any) -> Any:
        watch.hook = name
        held = [(a, _facts(a)) for a in args if hasattr(a, "seq") or hasattr(a, "depth")]
        counted = None
        if name == "schedule":
            step, plain = args[0], args[0].waiting
            counted = step.waiting = _Counted(plain, watch.files)
        try:
            answer = method(*args, **options)
        finally:
            if counted is not None:
                step.waiting = plain
        watch.hook = name  # a hook may have led to another
        for view, facts in held:
            _unchanged(watch, view, facts)
        if name == "on_arrival":
            watch.views += held
        if counted is not None and counted.read > watch.most_waiting_read:
            watch.most_waiting_read, watch.walked_at = counted.read, counted.at
        return answer

    return call


def _facts(view: Any) -> tuple[Any, ...]:
    """What never changes while a hook runs."""
    if hasattr(view, "depth"):
        return (view.id, view.key, view.depth, view.refs, view.parent, view.children)
    return (view.id, view.seq, view.arrival, view.priority, view.prompt_tokens)


def _unchanged(watch: Watch, view: Any, facts: tuple[Any, ...]) -> None:
    if _facts(view) != facts:
        raise Broken("views", f"{watch.hook} changed {view!r}", watch.defined(watch.hook))


class _Counted(Mapping[RequestId, RequestView]):
    """`step.waiting`, counting how much of it is walked through."""

    def __init__(self, inner: Mapping[RequestId, RequestView], files: frozenset[str]) -> None:
        self._inner, self._files = inner, files
        self.read, self.at = 0, ""

    def __getitem__(self, key: RequestId) -> RequestView:
        return self._inner[key]

    def __len__(self) -> int:
        return len(self._inner)

    def __contains__(self, key: object) -> bool:
        return key in self._inner

    def __iter__(self) -> Iterator[RequestId]:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename not in self._files:
            frame = frame.f_back
        self.at = f"{shown(frame.f_code.co_filename)}:{frame.f_lineno}"
        for key in self._inner:
            self.read += 1
            yield key


# --- one engine ------------------------------------------------------------------------------------------


class Plain(SchedulingPolicy):
    """First come, first served; whom to preempt is left to the preemption policy."""

    def __init__(self) -> None:
        self.queue: dict[RequestId, RequestView] = {}

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.queue[request.id] = request

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        self.queue[request.id] = request

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        self.queue.pop(request.id, None)

    def schedule(self, step: Step) -> None:
        left = sorted(step.running.values(), key=lambda r: (r.arrival, r.seq))
        lost = False
        while left:
            grant = step.run(left[0])
            if grant.short is Shortage.BLOCKS:
                victim = step.victim(left)
                step.preempt(victim)
                left.remove(victim)
                lost = True
            elif grant:
                left.pop(0)
            else:
                return
        for request in [] if lost else sorted(self.queue.values(), key=lambda r: (r.arrival, r.seq)):
            if not step.run(request):
                return
            del self.queue[request.id]


class Future:
    """`lab.policy.Future` over a case's own requests."""

    def __init__(self, case: Case) -> None:
        self.arrived = 0
        self._uses: dict[bytes, list[int]] = {}
        for position, (_, request) in enumerate(case.made()):
            chain = ContentChain(request.prompt, case.block_size, "", (), None)
            for key in chain.upto(len(request.prompt) // case.block_size)[1:]:
                self._uses.setdefault(key, []).append(position)

    def next_use(self, key: bytes) -> int:
        return next((p for p in self._uses.get(key, ()) if p >= self.arrived), NEVER)


class _Ends(Observer):
    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def on_request(self, record: RequestRecord) -> None:
        self.outcomes[record.request.id] = record.outcome


Decided = tuple[object, ...]
"""What is compared between two plays: one entry a step, or an answer."""


def rng(kind: str, seed: int) -> random.Random:
    return random.Random(stream_of("policy", kind, seed))


@functools.cache
def _lru() -> type:
    return plugins.load("eviction", "lru")


def engine(case: Case, parts: Mapping[str, Any], observer: Observer, replica: int = 0) -> EngineCore:
    """The core a case asks for; parts that aren't given are the plainest there are."""
    capacity = Capacity(
        blocks=case.blocks,
        block_size=case.block_size,
        max_context=1 << 30,
        vocab_size=1000,
        host_blocks=case.host_blocks,
        block_bytes=1 << 14,
    )
    return EngineCore(
        parts.get("policy") or Plain(),
        parts.get("eviction") or _lru()(),
        capacity=capacity,
        limits=Limits(case.token_budget, case.max_seqs, case.chunk),
        prefix_cache=case.prefix_cache and "compression" not in parts,
        preemption=parts.get("preemption"),
        predictor=parts.get("predictor"),
        compression=parts.get("compression"),
        observer=observer,
        replica=replica,
    )


def play_engine(case: Case, watch: Watch, salt: int = 0) -> list[Decided]:
    """Serve a case to its end and return every decision. Raises `Broken`."""
    ends, future = _Ends(), Future(case)
    if watch.kind == "eviction":
        watch.policy.future = future
    with judged(watch):
        core = engine(case, {watch.kind: watched(watch)}, ends)
    made = case.made(salt)
    todo = [*made]
    aborts = sorted(
        ((ask.abort * MS, r, ask) for ask, r in made if ask.abort is not None), key=lambda x: x[0]
    )
    pauses = [t * MS for t in case.pause or ()]
    now, said, since = 0, [], 0
    patience = 4 * case.tokens + 50  # steps without a token or an end; the longest prefill takes fewer
    while True:
        while todo and todo[0][1].arrival <= now:
            _, request = todo.pop(0)
            future.arrived += 1
            with judged(watch), contextlib.suppress(RequestRefused):
                core.add(request, now)
        _pause(core, case, now)
        _abort(core, watch, aborts, now, in_flight=False)
        with judged(watch):
            plan = core.plan(now)
        _inspect(core, case, watch, plan)
        if not plan:
            due = [request.arrival for _, request in todo[:1]]
            due += [t for t in pauses if t > now] + [a[0] for a in aborts]
            if due:
                now = max(now, min(due))
                _abort(core, watch, aborts, now, in_flight=True)
                continue
            if core.has_work:
                raise Broken("progress", str(core.stalled()), watch.defined("schedule"))
            break
        _abort(core, watch, aborts, now, in_flight=True)
        took = MS + TOKEN_NS * plan.tokens
        before = len(ends.outcomes)
        with judged(watch):
            emitted = core.commit(plan, StepResult((0,) * sum(w.samples for w in plan.work)), now + took)
        core.observe(StepTiming(0, took, 0, 0, 0))
        _inspect(core, case, watch, None)
        now += took
        said.append((plan.index, plan.work, plan.preempted, plan.rejected, plan.swap_out, plan.swap_in))
        since = 0 if emitted or len(ends.outcomes) > before or core.paused else since + 1
        if since > patience:
            says = f"no request ended or got a token for {since} steps, up to step {plan.index}"
            raise Broken("progress", says, watch.defined("schedule"))
    for view, facts in watch.views:
        _unchanged(watch, view, facts)
    return [*said, tuple(sorted(ends.outcomes.items()))]


def _pause(core: EngineCore, case: Case, now: int) -> None:
    if case.pause is not None:
        if case.pause[0] * MS <= now < case.pause[1] * MS:
            core.pause("admission" if case.pause_what == "admission" else "all")
        else:
            core.resume()


def _abort(
    core: EngineCore, watch: Watch, aborts: list[tuple[int, Request, Ask]], now: int, *, in_flight: bool
) -> None:
    for item in [a for a in aborts if a[0] <= now and a[2].in_flight == in_flight]:
        aborts.remove(item)
        with judged(watch):
            core.abort(item[1].id, now)


def _inspect(core: EngineCore, case: Case, watch: Watch, plan: StepPlan | None) -> None:
    """The laws, after each half of a step."""
    if plan is not None and (plan.tokens > case.token_budget or core.running > case.max_seqs):
        says = (
            f"step {plan.index} has {plan.tokens} tokens and {core.running} requests; "
            f"allowed are {case.token_budget} and {case.max_seqs}"
        )
        raise Broken("budgets", says, watch.defined("schedule"))
    try:
        core.check()
    except (AssertionError, KeyError, TypeError) as error:
        raise Broken("conservation", f"after {watch.hook}: {error}", watch.defined(watch.hook)) from error
