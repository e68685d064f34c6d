"""Runs made up for tests: random, but as consistent as what the control plane tells.

`play` is no scheduler worth the name: it picks at random who works, who waits and who is preempted, and keeps
only the books a record needs. So records reach corners that a sane policy wouldn't.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from lab.control.observer import Decision, FleetEvent, Interval, RequestRecord, StepRecord, Transfer
from lab.control.plan import GENESIS, TERMS, Compaction, Move, RankTiming, StepPlan, StepTiming, Work, chain
from lab.control.request import Prompt, Request, SamplingParams, Segment
from lab.observe.identity import RunInfo, workload_id
from lab.observe.recorder import Recorder


def info_for(recorder: Recorder, **changes: Any) -> RunInfo:
    given: dict[str, Any] = {
        "backend": "sim",
        "clock": "virtual",
        "evidence": "modelled",
        "workload": workload_id(record.request for record in recorder.requests),
        "model": "tiny",
        "policy": "fcfs",
        "seed": 7,
        "run": "run-a",
    }
    return RunInfo(**(given | changes))


@dataclass
class _Life:
    request: Request
    seq: int
    decision: Decision
    since: int
    phase: str = "queue"
    cause: str = "arrival"
    first: int = -1
    last: int = -1
    computed: int = 0
    known: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    cached: int = 0
    times: list[int] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)

    def enter(self, phase: str, now: int, cause: str = "") -> None:
        interval = Interval(self.phase, self.since, now, self.cause, self.first, self.last)  # type: ignore[arg-type]
        self.intervals.append(interval)
        self.phase, self.since, self.cause, self.first, self.last = phase, now, cause, -1, -1

    def record(self, outcome: Any, reason: str, now: int) -> RequestRecord:
        self.enter("over", now)
        return RequestRecord(
            request=self.request,
            seq=self.seq,
            decision=self.decision,
            outcome=outcome,
            reason=reason,
            end=now,
            cached_tokens=self.cached,
            cached_blocks=self.cached // 16,
            computed_tokens=self.computed_tokens,
            preemptions=self.preemptions,
            token_times=tuple(self.times),
            intervals=tuple(self.intervals),
            output=tuple(range(len(self.times))),
            dropped_tokens=self.computed_tokens // 3,
            transfers=(Transfer(0, 1, 7, 700, now - 9, now - 6, now - 5, now - 1),)
            * (self.seq % 4 == 3 and now > 400 + 9),
        )


def make_request(rng: random.Random, number: int) -> Request:
    pieces: list[Any] = [Segment(rng.getrandbits(64), rng.randrange(1000), rng.randint(1, 90))]
    if rng.random() < 0.5:
        pieces.insert(rng.randint(0, 1), tuple(rng.randrange(50_000) for _ in range(rng.randrange(4))))
    forced = rng.choice([None, rng.randint(1, 5)])
    return Request(
        id=rng.choice(["r{}", "größe-{}", "with \x1f {}"]).format(number),
        prompt=Prompt(tuple(pieces)),
        arrival=rng.randrange(400),
        max_tokens=rng.randint(1, 5),
        output_len=forced,
        stop_ids=tuple(rng.randrange(100) for _ in range(rng.randrange(3))),
        sampling=SamplingParams(
            rng.choice([0.0, 0.7]),
            rng.randrange(3),
            rng.choice([1.0, 0.9]),
            0.1,
            rng.randrange(2**40),
            rng.choice([None, 2]),
            logit_bias=((3, -1.5), (9, 2.0)) if number % 2 else (),
        ),
        tenant=rng.choice(["", "blue"]),
        session=rng.choice(["", "s1"]),
        priority=rng.randint(-2, 2),
        ttft_slo=rng.choice([None, rng.randrange(500)]),
        tpot_slo=rng.choice([None, rng.randrange(200)]),
        cache_salt=rng.choice(["", "salt"]),
        stop=("\n\n", "end") if number % 3 else (),
    )


def play(rng: random.Random, requests: int, max_steps: int = 60, replica: int = 0) -> Recorder:
    """A made-up run of `requests` requests that is cut off after `max_steps` steps."""
    recorder = Recorder()
    recorder.on_fleet(FleetEvent(0, replica, "ready", 1, "initial"))
    arrivals = sorted((make_request(rng, n) for n in range(requests)), key=lambda r: (r.arrival, r.id))
    lives: list[_Life] = []
    seen: set[str] = set()
    released: list[str] = []
    digest, now, seq, index = GENESIS, 0, 0, 0
    while (arrivals or lives) and index < max_steps:
        if not lives:
            now = max(now, arrivals[0].arrival)
        while arrivals and arrivals[0].arrival <= now:
            request = arrivals.pop(0)
            admitted = rng.random() < 0.85
            decision = (
                Decision(admitted, "always", replica, "single") if admitted else Decision(False, "full")
            )
            life = _Life(
                request, seq if admitted else -1, decision, request.arrival, known=len(request.prompt)
            )
            if admitted:
                lives.append(life)
                seq += 1
            else:
                recorder.on_request(life.record("rejected", "full", now))
        if not lives:
            continue
        work, working, joined, new, preempted, rejected = [], [], [], [], [], []
        moves: dict[str, list[Move]] = {"out": [], "in": []}
        compactions: list[Compaction] = []
        ended = released
        released = []
        for life in list(lives):
            name, request = life.request.id, life.request
            if life.phase != "queue" and rng.random() < 0.1:
                how = rng.choice(["recompute", "swap"])
                life.preemptions += 1
                if how == "swap":
                    moves["out"].append(Move(name, ((rng.randrange(100), rng.randrange(9)),)))
                    life.enter("queue", now, "swapped")
                else:
                    life.computed = 0
                    life.enter("queue", now, "preempted")
                preempted.append((name, how))
                continue
            if life.phase == "queue":
                if rng.random() < 0.05:
                    rejected.append((name, "policy"))
                    recorder.on_request(life.record("rejected", "policy", now))
                    lives.remove(life)
                    released.append(name)
                    continue
                if rng.random() < 0.4:
                    continue
                if life.cause == "swapped":
                    moves["in"].append(Move(name, ((rng.randrange(100), rng.randrange(9)),)))
                life.enter("prefill", now)
                joined.append(name)
                if name not in seen:
                    new.append(request)
                    seen.add(name)
                    life.cached = rng.choice([0, min(16, len(request.prompt) - 1)])
                    life.computed = life.cached
            tokens = rng.randint(1, life.known - life.computed)
            samples = life.computed + tokens == life.known
            blocks = tuple(rng.randrange(100) for _ in range(rng.randrange(3)))
            lost = rng.choice([0, 0, rng.randint(0, life.computed)])
            work.append(Work(name, life.computed, tokens, samples, blocks, lost))
            if rng.random() < 0.2:
                rule = rng.choice(["", "größe"])
                compactions.append(Compaction(name, blocks, rng.randrange(60), rng.randrange(3), 1, rule))
            working.append(life)
        spent_ns = [rng.choice([0, rng.randrange(60)]) for _ in range(5)]
        timing = StepTiming(spent_ns[0], spent_ns[1], spent_ns[2], spent_ns[3], spent_ns[4])
        if moves["out"] or moves["in"]:
            timing = replace(timing, transfer_ns=rng.randrange(60))
        if compactions:
            timing = replace(timing, compact_ns=rng.randrange(60))
        if index % 3 == 0:
            timing = replace(timing, terms=tuple(range(index, index + len(TERMS))))
        ranks: tuple[RankTiming, ...] = ()
        if index % 3 == 1:
            spent = (timing.prepare_ns, timing.forward_ns, timing.sample_ns // 2)
            ranks = (RankTiming(0), RankTiming(1, 1, 0, *spent, communication_ns=timing.forward_ns // 2))
        copies = tuple(Move(life.request.id, ((index, 3),)) for life in working[: index % 3])
        digest = chain(
            digest,
            index,
            work,
            preempted,
            rejected,
            moves["out"],
            moves["in"],
            compactions=compactions,
            copies=copies,
        )
        plan = StepPlan(
            index=index,
            now=now,
            work=tuple(work),
            digest=digest,
            new=tuple(new),
            admitted=tuple(joined),
            preempted=tuple(preempted),
            swap_out=tuple(moves["out"]),
            swap_in=tuple(moves["in"]),
            rejected=tuple(rejected),
            released=tuple(ended),
            compactions=tuple(compactions),
            copies=copies,
        )
        decodes = [
            item.start >= len(life.request.prompt) and item.tokens == 1
            for item, life in zip(work, working, strict=True)
        ]
        done = now + timing.plan_ns + timing.execute_ns
        for life, item in zip(working, work, strict=True):
            life.computed += item.tokens
            life.computed_tokens += item.tokens
            life.first = index if life.first < 0 else life.first
            life.last = index
            if item.samples:
                life.times.append(done)
                life.known += 1
                if life.phase == "prefill":
                    life.enter("decode", done)
            finished = len(life.times) == life.request.output_limit
            if finished or rng.random() < 0.02:
                lives.remove(life)
                released.append(life.request.id)
                how = ("finished", "length") if finished else ("aborted", "aborted")
                recorder.on_request(life.record(*how, done))
        counts = ("blocks_free", "blocks_cached", "blocks_held", "allocated", "evicted")
        counts += ("released_plan", "released_commit", "waiting")
        numbers = {name: rng.randrange(9) for name in counts}
        recorder.on_step(
            StepRecord(
                plan=plan,
                timing=timing,
                policy="fcfs",
                replica=replica,
                running=len(working),
                prefill_tokens=sum(
                    item.tokens for item, is_decode in zip(work, decodes, strict=True) if not is_decode
                ),
                decode_tokens=sum(decodes),
                context_tokens=sum(item.context for item in work),
                ranks=ranks,
                **numbers,
            )
        )
        index += 1
        now += timing.total_ns + 1
    for life in lives:
        recorder.on_request(life.record("unfinished", "interrupted", max(now, life.since)))
    recorder.on_fleet(FleetEvent(now, replica, "gone", 0, "end of run"))
    return recorder


@st.composite
def runs(draw: Any, requests: int = 8) -> Recorder:
    """Random made-up runs, empty ones included."""
    rng = draw(st.randoms(use_true_random=False))
    return play(rng, draw(st.integers(0, requests)), draw(st.sampled_from([0, 5, 60])))


def rich() -> Recorder:
    """One run with something of everything."""
    return play(random.Random(5), 40, 400)
