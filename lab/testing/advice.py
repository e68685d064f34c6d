"""What works and should be better: what a policy keeps of requests that are gone, and what planning costs it.

Observation path. Nothing here breaks a contract.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from lab.testing.cases import Ask, Case
from lab.testing.contracts import Broken
from lab.testing.subject import Subject
from lab.testing.trial import play, trial

FEW, MANY = 150, 450
"""Requests, one after another, after which a policy's memory is looked at."""


def advise(subject: Subject, seed: int) -> list[str]:
    """A sentence or two for each thing to better in a policy that keeps its contracts. Raises `Broken`."""
    said: list[str] = []
    held: list[dict[str, int]] = []
    for count in FEW, MANY:
        case = Case(
            requests=tuple(_passer_by(i) for i in range(count)), blocks=16, block_size=8, token_budget=24
        )
        try:
            watch, _ = play(subject, seed, case)
        except Broken:  # a matter for a longer search
            return said
        held.append(entries(watch.policy))
    for name, count in held[1].items():
        before = held[0].get(name, 0)
        if count - before >= 0.9 * (MANY - FEW):
            said.append(
                f"self.{name} grew from {before} to {count} entries when {MANY} requests in place of {FEW} "
                "had come and gone: what is kept of each of them adds up in a run of millions. Forget it in "
                "on_finish or on_dropped, or keep the latest few."
            )
    if subject.kind == "policy":
        queue = Case(requests=(Ask(prompt=4, output=2),) * 20, max_seqs=1)
        watch = trial(subject, seed, queue)
        if watch.most_waiting_read >= 10:
            said.append(
                f"schedule walked through {watch.most_waiting_read} waiting requests in one step "
                f"({watch.walked_at}): planning then costs what the queue is long. Keep an order of your "
                "own through on_arrival, on_preempt and on_finish; see policies/scheduling/common.py."
            )
    return said


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
