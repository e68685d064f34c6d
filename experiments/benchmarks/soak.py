"""Random load on the real engine, for long: `python experiments/benchmarks/soak.py [minutes=30] [requests=0] [seed=0]`
(so long at least, and so many requests).

Bursts of random requests with shared prefixes go to a tiny model whose KV cache is far too small for them, so that
blocks are evicted, requests preempted, swapped out and back; some are aborted, in any state, and some can never
fit. Policies change on the way. After each burst the engine is idle, and then nothing may be left: no block held,
no host block, no request, in the control plane or in the data plane; and every request must have ended exactly
once, with the tokens it asked for. Memory is looked at then too: after a warm-up it must not grow.

Prints a line a burst now and then, and a verdict; the exit code is 1 when anything leaked.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from lab import compose
from lab.assembly import ControlPlane, EngineSpec, assemble
from lab.console import Console
from lab.control.core import EngineCore
from lab.control.live import LiveRequest
from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.control.plan import StepPlan
from lab.control.request import Prompt, Request, SamplingParams, Segment
from lab.control.step import Limits
from real_engine.backend import open_backend
from real_engine.driver import SteppedRun

WORDS = ("backend=real", "model=tiny", "kv.blocks=72", "kv.host_blocks=40")
LIMITS = Limits(token_budget=192, max_seqs=12, chunk=64)
BURST = 150
EPOCHS = (  # policy, eviction, preemption, what becomes of the victim's KV
    ("fcfs", "lru", "last", "swap"),
    ("priority", "clock", "lowest_priority", "recompute"),
    ("vtc", "arc", "largest_kv", "break_even"),
    ("mlfq", "s3fifo", "cost_benefit", "swap"),
    ("sarathi", "gdsf", "least_progress", "recompute"),
    ("lpm", "radix_lru", "last", "swap"),
)
WARM_UP, SETTLED = 0.25, 5_000
"""Of the time, and requests at least: caches fill (oneDNN keeps a kernel for each of a thousand batch sizes)."""
FLAT = 4 << 20
EACH = 256
"""Bytes of resident memory that may come on top after the warm-up: once, and for each request served."""
CHECK_EVERY = 97
"""Steps between two full checks of the books while the engine is busy."""


class Load(Sequence[Request]):
    """Requests without end, made when they are asked for; `stop` ends them with the burst."""

    def __init__(self, rng: random.Random, prefix: str, start: int = 0) -> None:
        self._rng, self._prefix = rng, prefix
        self._arrival = start
        self._made: dict[int, Request] = {}
        self._count: float = float("inf")

    def __len__(self) -> int:
        return sys.maxsize if self._count == float("inf") else int(self._count)

    def stop(self, at: int) -> None:
        self._count = -(-at // BURST) * BURST

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | Sequence[Request]:
        assert isinstance(index, int)
        if index not in self._made:
            self._made = {index: self._request(index)}
        return self._made[index]

    def _request(self, index: int) -> Request:
        rng = self._rng
        # After a burst comes a pause that no burst outlasts, and a stepped clock skips it.
        pause = 3600 * 10**9 if index and index % BURST == 0 else 0
        self._arrival += pause + round(rng.expovariate(1 / 1.5e6))
        pieces = [Segment(rng.randrange(6), 0, rng.choice((0, 16, 40, 128))), Segment(10**6 + index, 0, 1)]
        pieces.append(
            Segment(10**9 + index, 0, rng.choice((1, 7, 30, 100, 300, 9000 if rng.random() < 0.05 else 60)))
        )
        drawn = rng.random() < 0.5
        return Request(
            id=f"{self._prefix}-{index}",
            prompt=Prompt(tuple(piece for piece in pieces if len(piece))),
            arrival=self._arrival,
            output_len=rng.choice((1, 2, 9, 40, 120)),
            priority=rng.randrange(3),
            tenant=rng.choice(("red", "blue", "green")),
            sampling=SamplingParams(
                temperature=0.8 * drawn,
                top_k=rng.choice((0, 20)),
                top_p=rng.choice((1.0, 0.9)),
                seed=index,
                logprobs=rng.choice((None, None, 3)),
            ),
        )


class Books(Observer):
    """Counts, and holds every record to the laws; keeps none."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.steps = self.preemptions = self.moved = self.evicted = self.tokens = 0

    def on_step(self, step: StepRecord) -> None:
        self.steps += 1
        self.preemptions += len(step.plan.preempted)
        self.moved += step.plan.moved_blocks
        self.evicted += step.evicted

    def on_request(self, record: RequestRecord) -> None:
        request = record.request
        self.outcomes[record.outcome] += 1
        self.tokens += len(record.output)
        bounds = [(part.start, part.end) for part in record.intervals]
        assert bounds[0][0] == request.arrival, f"{request.id} begins before or after its arrival"
        assert bounds[-1][1] == record.end, f"{request.id} ends when its last interval doesn't"
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds)), f"{request.id} has a gap"
        if record.outcome == "finished":
            assert len(record.output) == request.output_len, f"{request.id} has {len(record.output)} tokens"
        if record.output and request.sampling.logprobs is not None:
            assert len(record.logprobs) == len(record.output), f"{request.id} lacks log-probabilities"
        assert record.outcome != "unfinished", f"{request.id} never ended"


class Soak:
    """One long run: `epochs` control planes one after the other over one data plane."""

    def __init__(self, minutes: float, seed: int, requests: int = 0) -> None:
        self._seconds = 60 * minutes
        self._requests = requests
        # By streams of their own: who is aborted depends on the engine's pace, and what is asked for mustn't.
        self._seed, self._aborts = seed, random.Random(f"aborts {seed}")
        with compose.composer() as composer:
            cfg = composer.config([*WORDS, f"seed={seed}"])
        self._backend = open_backend(cfg, Console(), None)
        self._began = time.monotonic()
        self._said = -10.0
        self.memory: list[tuple[float, int, int]] = []
        """At each idle moment: seconds, requests ended so far, resident bytes."""
        self.books = Books()

    def run(self) -> None:
        for number, epoch in enumerate(EPOCHS):
            share = (number + 1) / len(EPOCHS)
            self._epoch(number, epoch, self._seconds * share, self._requests * share)
            gc.collect()
        self._backend.close()

    def _epoch(self, number: int, names: tuple[str, str, str, str], until: float, served: float) -> None:
        policy, eviction, preemption, mode = names
        policies: dict[str, dict[str, Any]] = {
            "policy": {"name": policy},
            "eviction": {"name": eviction},
            "preemption": {"name": preemption, "mode": mode},
        }
        spec = EngineSpec(policies, LIMITS, prefix_cache=True, seed=number)
        control = assemble(spec, self._backend.capacity, self.books)
        load = Load(random.Random(f"requests {self._seed} {number}"), f"{number}")
        ended = sum(self.books.outcomes.values())
        print(f"{self._clock()} {' / '.join(names)}", flush=True)

        def progress(core: EngineCore, now: int) -> None:
            if core.steps % CHECK_EVERY == 0:
                core.check()
            self._abort_some(core, run, now)
            if not core.has_work:
                here = sum(self.books.outcomes.values()) - ended
                self._idle(control, run, here)
                if time.monotonic() - self._began > until and ended + here >= served:
                    load.stop(here)

        run = SteppedRun(control, self._backend.executor, load, progress)
        run.run()

    def _abort_some(self, core: EngineCore, run: SteppedRun, now: int) -> None:
        """Called with a plan in flight as often as between two: an abort may come in any state."""
        rng = self._aborts
        if core.has_work and rng.random() < 0.01:
            victim = rng.choice(list(core._requests))
            if rng.random() < 0.5:
                core.abort(victim, now)
            else:
                run.abort(victim)
            run.abort("nobody")

    def _idle(self, control: ControlPlane, run: SteppedRun, ended: int) -> None:
        """Nothing may be left of anybody."""
        core = control.core
        core.check()
        assert core.pool.held == 0, f"{core.pool.held} blocks are held by nobody"
        assert core.pool.free + core.pool.cached == core.pool.total, "blocks are missing from the pool"
        assert core.host.free + len(core.host._leaving) == core.host.total, "host blocks are missing"
        assert ended == run._next, f"of {run._next} requests {ended} ended"
        view = core.view(0)
        assert (view.tokens_to_compute, view.tokens_expected, view.context_tokens) == (0, 0, 0), f"{view}"
        # The data plane hears with the next plan who has ended; until then it may know a batch of them, and
        # of each control plane before this one its last.
        known = len(self._backend.executor._sequences)
        most = LIMITS.max_seqs * len(EPOCHS)
        assert known <= most, (
            f"the data plane remembers {known} requests; at most {most} may be on their way out"
        )
        if ended % BURST == 0:
            self._measure(core)

    def _measure(self, core: EngineCore) -> None:
        seconds = time.monotonic() - self._began
        gc.collect()
        kinds = Counter(type(item) for item in gc.get_objects() if type(item) in (LiveRequest, StepPlan))
        assert kinds[LiveRequest] <= LIMITS.max_seqs, f"{kinds[LiveRequest]} requests live on after their end"
        assert kinds[StepPlan] <= 8, f"{kinds[StepPlan]} plans are kept"
        total = sum(self.books.outcomes.values())
        self.memory.append((seconds, total, resident()))
        if seconds - self._said >= 10:
            self._said = seconds
            books = self.books
            print(
                f"{self._clock()} {total} requests ({books.outcomes['aborted']} aborted, "
                f"{books.outcomes['rejected']} refused), {books.steps} steps, {books.preemptions} preemptions, "
                f"{books.moved} blocks swapped, {books.evicted} evicted, {self.memory[-1][2] / 2**20:.1f} MiB",
                flush=True,
            )

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"

    def verdict(self) -> str:
        """One line. Raises AssertionError when memory grew."""
        late = WARM_UP * self._seconds
        measured = [point for point in self.memory if point[0] >= late and point[1] >= SETTLED]
        assert len(measured) >= 4, f"only {len(measured)} idle moments after the warm-up; run it for longer"
        _, requests, memory = np.asarray(measured, dtype=np.float64).T
        slope = theil_sen(requests, memory)
        served = requests[-1] - requests[0]
        growth = slope * served
        text = (
            f"memory after the warm-up: {growth / 2**20:+.2f} MiB over {served:.0f} requests "
            f"({slope:+.1f} bytes a request), {memory[-1] / 2**20:.1f} MiB at the end"
        )
        assert growth <= FLAT + EACH * served, f"{text}: that is a leak"
        return text


def theil_sen(x: Any, y: Any) -> float:
    """The median slope between all pairs of points: a step of the allocator doesn't make a trend."""
    some = np.linspace(0, len(x) - 1, min(len(x), 400)).astype(int)
    x, y = x[some], y[some]
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / np.maximum(x[j] - x[i], 1)))


def resident() -> int:
    """Bytes of memory that this process has resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(words: Sequence[str]) -> int:
    options = {"minutes": "30", "requests": "0", "seed": "0"} | dict(word.split("=", 1) for word in words)
    soak = Soak(float(options["minutes"]), int(options["seed"]), int(options["requests"]))
    try:
        soak.run()
        text = soak.verdict()
    except AssertionError as error:
        print(f"LEAK: {error}")
        return 1
    books = soak.books
    for what in ("finished", "aborted", "rejected"):
        assert books.outcomes[what], f"no request was {what}: the load does less than it says"
    assert min(books.preemptions, books.moved, books.evicted) > 0
    print(
        f"{sum(books.outcomes.values())} requests, {books.tokens} tokens, {books.steps} steps: no block leaked"
    )
    print(text)
    print("OK")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
