"""Stands in for a policy under test: passes every call on to it, and looks at what it did with what it was given.

Observation path. Views must come back as they were, and `step.waiting` tells how far it was walked through.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lab.policy import RequestId, RequestView
from lab.testing.contracts import KINDS, Broken
from lab.testing.watch import Watch, shown


def watched(watch: Watch) -> Any:
    """A stand-in of the same kind that passes every call on and looks at what happens to the views."""
    base, policy = KINDS[watch.kind].base, watch.policy
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
            unchanged(watch, view, facts)
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


def unchanged(watch: Watch, view: Any, facts: tuple[Any, ...]) -> None:
    """Raise `Broken` where a view isn't what it was when a hook was given it."""
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
