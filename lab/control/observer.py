"""What the control plane tells whoever watches. Observation path.

The records here are complete: every span, metric and plot is computed from them, so both backends, which
share the code that makes them, can't drift apart. An observer never influences a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from struct import Struct
from typing import Any, Literal, TypeAlias

from lab.control.plan import RankTiming, StepPlan, StepTiming, TokenLogprobs
from lab.control.request import Request
from lab.frozen import frozen

Phase = Literal["queue", "prefill", "decode"]
Outcome = Literal["finished", "aborted", "rejected", "unfinished"]


@frozen
class Interval:
    """One stretch of a request's life. Intervals tile [arrival, end] without gap or overlap.

    `cause` says why a queue interval began (`arrival`, `preempted`, `swapped`, `transfer` to another replica, or its
    replica `failed`) and is empty otherwise.
    `first_step .. last_step` are the steps that worked on the request in it (-1, -1 while queued).
    """

    phase: Phase
    start: int
    end: int
    cause: str = ""
    first_step: int = -1
    last_step: int = -1


@frozen
class Decision:
    """What admission and routing said, and why."""

    admitted: bool
    admit_reason: str
    replica: int = -1
    route_reason: str = ""
    ingest_lag: int = 0
    """Nanoseconds from the arrival until the request was taken in: what a busy loop costs under a wall clock.
    Times count from the arrival all the same. 0 under a virtual clock."""


@frozen
class Transfer:
    """A request's KV moved from one replica to another. It waits for room there, then for the link."""

    source: int
    destination: int
    tokens: int
    """Of KV that had to move: what the destination's prefix cache held didn't."""
    bytes: int
    """That were sent, in vain or not."""
    ready: int
    """When the source had computed it; when room was reserved at the destination; when its first byte was sent, and
    when its last one arrived."""
    reserved: int
    sent: int
    end: int

    @property
    def queue_ns(self) -> int:
        """Waiting, for room and for the link."""
        return self.sent - self.ready

    @property
    def wire_ns(self) -> int:
        """On the way, the link's latency included."""
        return self.end - self.sent


@frozen
class RequestRecord:
    """A request's whole life, told once, when it ends (or when the run does)."""

    request: Request
    seq: int
    decision: Decision
    outcome: Outcome
    reason: str
    """`length`, `stop`, `aborted`, `interrupted`, or why it was rejected."""
    end: int
    cached_tokens: int
    """Prompt tokens that the prefix cache supplied at the first admission."""
    cached_blocks: int
    computed_tokens: int
    """Tokens put through the model, recomputation included."""
    preemptions: int
    token_times: Sequence[int]
    """When each generated token was there."""
    intervals: tuple[Interval, ...]
    output: tuple[int, ...]
    """Generated token ids; a simulator's carry no meaning."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each generated token, where they were asked for."""
    predicted_output: int = 0
    """Output tokens that the length predictor foresaw; 0 for one that never entered an engine."""
    dropped_tokens: int = 0
    """Tokens whose KV compression gave up, recomputed ones included."""
    transfers: tuple[Transfer, ...] = ()
    """Moves of its KV from one replica to another."""

    @property
    def met_objectives(self) -> bool:
        """Finished, and within every objective that it has: TTFT, and mean time per token after the first."""
        request, times = self.request, self.token_times
        if self.outcome != "finished":
            return False
        if request.ttft_slo is not None and (not times or times[0] - request.arrival > request.ttft_slo):
            return False
        gaps = len(times) - 1
        return request.tpot_slo is None or gaps < 1 or (times[-1] - times[0]) / gaps <= request.tpot_slo


@frozen
class StepRecord:
    """One step: what was decided, how long each phase took, and the state it left."""

    plan: StepPlan
    timing: StepTiming
    policy: str
    replica: int
    running: int
    waiting: int
    """Requests running and waiting right after planning."""
    prefill_tokens: int
    decode_tokens: int
    """Tokens of work items that continue a prompt / extend a generated sequence by one."""
    context_tokens: int
    """Sum over the work items of the tokens they attend to (start + tokens, less what compression dropped)."""
    blocks_free: int
    blocks_cached: int
    blocks_held: int
    """KV blocks empty / reusable but unreferenced / referenced, right after planning."""
    allocated: int
    evicted: int
    released_plan: int
    released_commit: int
    """Blocks taken, evicted, and given back while planning (preemption, abort) and at commit (finish)."""
    ranks: tuple[RankTiming, ...] = ()
    """Each rank's share of `timing`, where several computed the step."""

    @property
    def start(self) -> int:
        return self.plan.now

    @property
    def end(self) -> int:
        return self.plan.now + self.timing.total_ns


STEP_NUMBERS = (
    "index", "now", "replica", "running", "waiting", "prefill_tokens", "decode_tokens", "context_tokens",
    "blocks_free", "blocks_cached", "blocks_held", "allocated", "evicted", "released_plan", "released_commit",
    "batch", "samples",
    "plan_ns", "prepare_ns", "forward_ns", "sample_ns", "commit_ns", "transfer_ns", "compact_ns",
)  # fmt: skip
"""The whole numbers of a `StepRow`, named as in `StepRecord` and `StepTiming`; `batch` work items, of which `samples`
draw a token."""

pack_step: Callable[..., bytes] = Struct(f"={len(STEP_NUMBERS)}q").pack
"""The numbers of a `StepRow`, packed while they are at hand: as objects they would be looked for all over memory."""

StepRow: TypeAlias = tuple[bytes, str, str, tuple[int, ...], StepPlan | None, tuple[RankTiming, ...]]
"""A step without its work: `STEP_NUMBERS` by `pack_step`, digest, policy, terms of its time, its plan if that decided
more than work (admitted, preempted, rejected, moved or compacted anything), ranks."""


def row_of(step: StepRecord) -> StepRow:
    """A record as a row."""
    plan, timing = step.plan, step.timing
    numbers = (*_STATE(step), len(plan.work), plan.samples, *_TIMES(timing))
    packed = pack_step(plan.index, plan.now, *numbers)
    return packed, plan.digest, step.policy, timing.terms, plan, step.ranks


_STATE, _TIMES = attrgetter(*STEP_NUMBERS[2:15]), attrgetter(*STEP_NUMBERS[17:])


@frozen
class FleetEvent:
    """A replica came or went."""

    at: int
    replica: int
    event: str
    """`start` (cold), `ready`, `drain`, `recall` (ready again before it was empty), `gone`."""
    target: int
    """Replicas wanted, as far as the event was a decision."""
    reason: str


@dataclass(slots=True)
class StepTotals:
    """Sums over one replica's steps: what is left of them when nobody wants to be told of each."""

    steps: int = 0
    start: int = 0
    """Start of the first step, end of the last."""
    end: int = 0
    time_ns: int = 0
    held_ns: int = 0
    """Sum of blocks held, times the step's duration."""
    peak_held: int = 0
    blocks: int = 0
    """Blocks in the pool."""
    evicted: int = 0
    preempted: int = 0
    moved: int = 0
    digest: str = ""

    def step(self, now: int, total_ns: int, blocks: int, held: int, digest: str) -> None:
        """One more step."""
        if not self.steps:
            self.start, self.blocks = now, blocks
        self.steps += 1
        self.end = now + total_ns
        self.time_ns += total_ns
        self.held_ns += held * total_ns
        if held > self.peak_held:
            self.peak_held = held
        self.digest = digest

    def decided(self, plan: StepPlan, evicted: int) -> None:
        """What a step took away from anybody."""
        self.evicted += evicted
        if plan.preempted:
            self.preempted += len(plan.preempted)
            self.moved += plan.moved_blocks
        elif plan.swap_in:
            self.moved += plan.moved_blocks


class Observer:
    """Base with no-op hooks; subclass and override what you want to see."""

    wants_steps: bool = True
    """Whether `on_step` is to be called; else `totals` are kept."""
    wants_work: bool = True
    """Whether a step's plan must list all of its work: that costs what the batch is long."""

    def step_rows(self) -> Callable[[StepRow], object] | None:
        """Who is told of steps as rows, in place of `on_step`: several times as fast, and enough for tables."""
        return None

    def totals(self, replica: int) -> StepTotals:
        """Where a replica's sums are kept, for an observer that doesn't want each step."""
        return StepTotals()

    def on_step(self, step: StepRecord) -> None:
        """A step was committed."""

    def on_request(self, record: RequestRecord) -> None:
        """A request ended: finished, aborted, rejected, or left unfinished by the end of the run."""

    def on_fleet(self, event: FleetEvent) -> None:
        """A replica came or went."""


def wants_steps(observer: Any) -> bool:
    """Whether it does, said by its class or by itself: compiled code would look at `Observer`'s own attribute alone."""
    return bool(observer.wants_steps)


def wants_work(observer: Any) -> bool:
    """The same of work, which nobody lists who isn't told of steps."""
    return bool(observer.wants_steps and observer.wants_work)


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self.wants_steps = any(map(wants_steps, observers))
        self.wants_work = any(map(wants_work, observers))

    def step_rows(self) -> Callable[[StepRow], object] | None:
        wanting = [observer for observer in self._observers if wants_steps(observer)]
        return wanting[0].step_rows() if len(wanting) == 1 else None

    def totals(self, replica: int) -> StepTotals:
        return self._observers[0].totals(replica)

    def on_step(self, step: StepRecord) -> None:
        for observer in self._observers:
            observer.on_step(step)

    def on_request(self, record: RequestRecord) -> None:
        for observer in self._observers:
            observer.on_request(record)

    def on_fleet(self, event: FleetEvent) -> None:
        for observer in self._observers:
            observer.on_fleet(event)
