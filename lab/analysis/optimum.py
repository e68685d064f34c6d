"""The least total latency that any schedule could have reached, for workloads small enough to find it.

Observation path. The model is that of arXiv 2502.07115: in each step every running request gets one token, its
whole prompt being computed in its first; a step takes one unit of time. A request of prompt s and output o holds
s + k - 1 tokens of KV in its k-th step (the last token is never fed back), and all that run must fit the memory.
The optimum knows all arrivals and lengths beforehand, which no policy does: it bounds policies from below, as
Belady's bounds eviction. Exact, by branch and bound: milliseconds for half a dozen jobs, hopeless for a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from lab.errors import ConfigError

__all__ = ["Job", "hindsight_latency"]


@dataclass(frozen=True, slots=True)
class Job:
    """A request, in tokens and steps."""

    arrival: int
    prompt: int
    output: int


def hindsight_latency(
    jobs: Sequence[Job], memory: int, *, slots: int | None = None, pauses: bool = False
) -> int:
    """Sum over the jobs of steps from arrival to last token, in the best schedule for `memory` tokens of KV.

    `slots` bounds how many run in one step. With `pauses` a job may also stop after any token, give its memory
    back, and go on later with all its tokens in one step again: the bound for policies that preempt.
    """
    for job in jobs:
        if job.arrival < 0 or job.prompt < 1 or job.output < 1 or job.prompt + job.output - 1 > memory:
            raise ConfigError(f"{job} can't be scheduled in {memory} tokens of KV")
    ordered = tuple(sorted(jobs, key=lambda job: (job.output, job.prompt, job.arrival)))
    search = _Pausing if pauses else _Whole
    return search(ordered, memory, len(ordered) if slots is None else slots).best


class _Whole:
    """Jobs run from their start to their end. A node: the time, who hasn't started, memory in use from now on."""

    def __init__(self, jobs: tuple[Job, ...], memory: int, slots: int) -> None:
        self.jobs, self.memory, self.slots = jobs, memory, slots
        # One after the other is a schedule.
        self.best, end = 0, 0
        for job in sorted(jobs, key=lambda job: job.arrival):
            end = max(end, job.arrival) + job.output
            self.best += end - job.arrival
        self.seen: dict[tuple[object, ...], int] = {}
        self.volume = [sum(range(job.prompt, job.prompt + job.output)) for job in jobs]
        self.visit(0, tuple(range(len(jobs))), (), 0, 0)

    def bound(self, now: int, waiting: tuple[int, ...]) -> int:
        """Latency that those not started will have at least: each alone, or all poured into the memory."""
        alone = sum(max(now - self.jobs[j].arrival, 0) + self.jobs[j].output for j in waiting)
        poured, volume = 0, 0
        for size in sorted(self.volume[j] for j in waiting):
            volume += size
            poured += now - (-volume // self.memory)
        return max(alone, poured - sum(self.jobs[j].arrival for j in waiting))

    def visit(
        self, now: int, waiting: tuple[int, ...], used: tuple[tuple[int, int], ...], least: int, spent: int
    ) -> None:
        """`used`: (tokens, jobs) in the steps from now on; of the waiting, only from `least` on may start now."""
        if not waiting:
            self.best = min(self.best, spent)
            return
        key = (now, waiting, used, least)
        if spent + self.bound(now, waiting) >= self.best or self.seen.get(key, spent + 1) <= spent:
            return
        self.seen[key] = spent
        for j in waiting:
            job = self.jobs[j]
            if j < least or job.arrival > now:
                continue
            after = list(used) + [(0, 0)] * (job.output - len(used))
            for k in range(job.output):
                after[k] = (after[k][0] + job.prompt + k, after[k][1] + 1)
            if all(tokens <= self.memory and running <= self.slots for tokens, running in after):
                rest = tuple(i for i in waiting if i != j)
                self.visit(now, rest, tuple(after), j + 1, spent + now + job.output - job.arrival)
        later = now + 1 if used else max(now + 1, min(self.jobs[j].arrival for j in waiting))
        self.visit(later, waiting, used[later - now :], 0, spent)


class _Pausing:
    """Jobs may pause after any token. Step by step, the least latency so far for each tuple of tokens generated."""

    def __init__(self, jobs: tuple[Job, ...], memory: int, slots: int) -> None:
        self.jobs, self.memory, self.slots = jobs, memory, slots
        ceiling = _Whole(jobs, memory, slots).best
        done = tuple(job.output for job in jobs)
        frontier, now = {(0,) * len(jobs): 0}, 0
        while done not in frontier:
            following: dict[tuple[int, ...], int] = {}
            for progress, spent in frontier.items():
                here = [j for j, job in enumerate(jobs) if job.arrival <= now and progress[j] < job.output]
                for chosen in self.largest(here, progress):
                    then = tuple(k + (j in chosen) for j, k in enumerate(progress))
                    total = spent + len(here)
                    if total <= ceiling and total < following.get(then, ceiling + 1):
                        following[then] = total
            frontier, now = following, now + 1
            if done in frontier:  # what ends later may have cost less
                ceiling = min(ceiling, frontier[done])
                frontier = {p: s for p, s in frontier.items() if p == done or s < ceiling}
                if len(frontier) > 1:
                    del frontier[done]
        self.best = ceiling

    def largest(self, here: list[int], progress: tuple[int, ...]) -> list[frozenset[int]]:
        """The sets of jobs that fit one step and to which none can be added: a token early never hurts."""
        found: list[frozenset[int]] = []
        for size in range(min(len(here), self.slots), -1, -1):
            for chosen in map(frozenset, combinations(here, size)):
                held = sum(self.jobs[j].prompt + progress[j] for j in chosen)
                if held <= self.memory and not any(chosen < other for other in found):
                    found.append(chosen)
        return found
