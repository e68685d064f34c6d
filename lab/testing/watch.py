"""One policy object at work: what is seen of it, and what breaks when a hook of it fails or never returns.

Observation path. Whatever escapes from inside `judged` becomes `Broken`, with the policy's own line.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import PolicyError
from lab.testing.contracts import KINDS, Broken

HOOK_CPU_S = 0.5
"""Processor time after which a hook is held to be in an endless loop."""


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
    """Those that arrived, each with what must be the same at the end."""
    files: frozenset[str] = field(init=False)
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
    bases = [kind.base for kind in KINDS.values()]
    own = [base for base in cls.__mro__[:-1] if base not in bases and base.__module__ in sys.modules]
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
