"""One workload with one policy, played twice: the decisions must be the same. Observation path."""

from __future__ import annotations

import random

from lab.control.request import stream_of
from lab.testing.cases import Case
from lab.testing.contracts import KINDS, Broken
from lab.testing.fleet import play_fleet
from lab.testing.play import Decided, play_engine
from lab.testing.subject import Subject
from lab.testing.watch import Watch


def play(subject: Subject, seed: int, case: Case, salt: int = 0) -> tuple[Watch, list[Decided]]:
    """Serve a case to its end with a new policy; what was seen of it, and every decision. Raises `Broken`."""
    watch = Watch(subject.make(), subject.kind)
    watch.policy.rng = random.Random(stream_of("policy", subject.kind, seed))
    return watch, (play_fleet if KINDS[subject.kind].fleet else play_engine)(case, watch, salt)


def trial(subject: Subject, seed: int, case: Case) -> Watch:
    """Play a case twice, the second time in what looks like another process, and compare. Raises `Broken`."""
    plays = []
    for salt in (0, seed + 1):
        clutter = _clutter(salt)
        plays.append(play(subject, seed, case, salt))
        del clutter
    (watch, first), (_, second) = plays
    if first != second:
        raise Broken("determinism", _parting(first, second), watch.defined(KINDS[subject.kind].hook))
    return watch


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
