"""The engine core: the one place where requests wait, run, and end. Request and state path, control plane.

Sans-IO: `add`, `abort`, `plan` and `commit` take the time as an argument and return values; who calls them
owns the clock and the data plane. Both backends drive this very class, which is why their decisions can be
compared. The global control point is `plan`; the hot path is `plan` + `commit`.

Of one mind with it, and told in files of their own: what a commit does to requests (`results`), how a step is described
and told of (`flight`), runs of equal steps (`coast`), requests that come from other replicas (`relocation`), and what
must hold between any two steps (`laws`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lab.control.blame import blame
from lab.control.coast import Price, coast
from lab.control.compress import Compression
from lab.control.decodes import Decodes, WorkList
from lab.control.estimate import StepEstimate
from lab.control.executor import Capacity
from lab.control.flight import InFlight, describe, tell
from lab.control.laws import check
from lab.control.live import LiveRequest
from lab.control.observer import Decision, Observer, Outcome, RequestRecord, wants_steps, wants_work
from lab.control.plan import GENESIS, StepPlan, StepResult, StepTiming, Work, chain
from lab.control.relocation import Relocation
from lab.control.request import Request, RequestId
from lab.control.results import Emission, carry_out
from lab.control.step import Limits, StepBuilder
from lab.errors import DiptychError, ExecutorError, PolicyError, RequestRefused
from lab.policy import (
    CompressionPolicy,
    EvictionPolicy,
    How,
    LengthPredictor,
    PreemptionPolicy,
    ReplicaView,
    SchedulingPolicy,
)
from lab.state.blocks import BlockPool, Table
from lab.state.prefix import ContentChain
from lab.state.tiers import HostTier

DIRECT = Decision(admitted=True, admit_reason="direct", replica=0, route_reason="direct")
"""The decision of a request that came without a gateway."""

IDLE_STEPS_ALLOWED = 1000
"""Steps in a row without any work before the policy is held to be going in circles."""


MOST_FORESEEN = 1 << 40
"""Output tokens that a length predictor may foresee: more is a mistake, and beyond what floats can sum."""


@dataclass(slots=True)
class _Load:
    """Sums over the requests that are here, kept as they change: what a router may want to know."""

    to_compute: int = 0
    """Known tokens not yet computed."""
    expected: int = 0
    """Output tokens still foreseen."""
    context: int = 0
    """Computed tokens of those that run."""


class EngineCore:
    """One replica's control plane.

    `capacity` describes the KV cache, the host tier behind it, and the longest context. Everything that a
    request's life produces goes to `observer`. Without a `predictor`, output lengths are known; without
    `preemption`, the last in the scheduler's order is preempted; without `compression`, requests keep all their KV.
    Single-threaded; plan and commit alternate.

    `aggregate` keeps decodes in steady state as sums (`lab.control.decodes`), for a data plane whose tokens carry
    no meaning where the output's length is forced: the same decisions, but such tokens are not emitted.

    `joins_late`: the next step is decided while one is being executed, so that a request which arrives meanwhile waits
    one more (asynchronous scheduling, vLLM 0.14 and later). `last_block`: see `BlockPool`.
    """

    def __init__(
        self,
        policy: SchedulingPolicy,
        eviction: EvictionPolicy,
        *,
        capacity: Capacity,
        limits: Limits | None = None,
        prefix_cache: bool = True,
        preemption: PreemptionPolicy | None = None,
        predictor: LengthPredictor | None = None,
        compression: CompressionPolicy | None = None,
        compression_name: str = "",
        observer: Observer | None = None,
        replica: int = 0,
        policy_name: str = "",
        on_admitted: Callable[[RequestId], None] | None = None,
        aggregate: bool = False,
        joins_late: bool = False,
        last_block: bool = True,
    ) -> None:
        self.policy = policy
        self.policy_name = policy_name or type(policy).__name__
        self.limits = limits or Limits()
        self._eviction, self._preemption = eviction, preemption or PreemptionPolicy()
        self._predictor = predictor
        self._compression = Compression(
            compression, compression_name, capacity.block_size, self.limits.token_budget, prefix_cache
        )
        self.capacity = capacity
        self._index = 0
        self.pool: BlockPool = self._evicting(
            "on_open",
            BlockPool,
            capacity.blocks,
            capacity.block_size,
            eviction,
            prefix_cache=prefix_cache,
            last_block=last_block,
        )
        self.host = HostTier(capacity.host_blocks)
        self.estimate = StepEstimate()
        self.on_ended: Callable[[RequestRecord, int], None] | None = None
        """Told of every request that ends here: the gateway's feedback."""
        self._on_admitted = on_admitted
        self._load = _Load()
        self.replica = replica
        self._observer = observer or Observer()
        told = wants_steps(self._observer)
        self._wants_work = wants_work(self._observer)
        self._totals = None if told else self._observer.totals(replica)
        self._rows = self._observer.step_rows() if told else None
        self._requests: dict[RequestId, LiveRequest] = {}
        self._running: dict[RequestId, LiveRequest] = {}
        self._waiting: dict[RequestId, LiveRequest] = {}
        self._groups: dict[RequestId, list[LiveRequest]] = {}
        """By parent, the sequences that are here."""
        self._held = 0
        """Those of them that wait for another one to compute their prompt first."""
        self._ripe: dict[RequestId, None] = {}
        """Parents of which more may be let into the queue."""
        self._joins_late = joins_late
        self._late: list[LiveRequest] = []
        """Held, too: requests that the next plan doesn't know of."""
        self.relocation = Relocation(self)
        """How requests come from other replicas, and go there."""
        self._released: list[RequestId] = []
        self._in_flight: InFlight | None = None
        self._committed: InFlight | None = None
        self._paused = ""
        self._seq = 0
        self._digest = GENESIS
        self._workless = 0
        self._counted = (0, 0, 0)
        # Hooks cost a call per request and step, so those that a policy doesn't define are never called.
        self._on_tokens = (
            policy.on_tokens if type(policy).on_tokens is not SchedulingPolicy.on_tokens else None
        )
        self._repeats, self._repeats_past_ends = 0, False
        self._decodes = Decodes(self.pool.block_size, aggregate and self._on_tokens is None)
        self._step = StepBuilder(
            self.policy_name,
            self.limits,
            self.pool,
            self._requests,
            self._running,
            self._waiting,
            self._preemption,
            self.host,
            self.estimate,
            self.capacity.transfer_ns,
            self._compression,
            on_admit=self._admitted,
            on_preempt=self._preempted,
            on_reject=self._rejected,
            decodes=self._decodes,
        )

    # -- reading -------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._held

    @property
    def digest(self) -> str:
        """Chained digest of all plans so far."""
        return self._digest

    @property
    def steps(self) -> int:
        return self._index

    def view(self, now: int) -> ReplicaView:
        """This replica as the gateway sees it."""
        pool, load = self.pool, self._load
        return ReplicaView(
            index=self.replica,
            as_of=now,
            running=len(self._running),
            waiting=self.waiting,
            blocks_free=pool.available,
            blocks_total=pool.total,
            block_size=pool.block_size,
            max_seqs=self.limits.max_seqs,
            token_budget=self.limits.token_budget,
            tokens_to_compute=load.to_compute,
            tokens_expected=load.expected,
            context_tokens=load.context,
            cached=self.cached,
            estimate=self.estimate,
        )

    def cached(self, request: Request, then: Container[bytes] | None = None) -> int:
        """Prompt tokens that the prefix cache holds of a request that isn't here yet; or held `then`."""
        pool = self.pool
        limit = pool.most_hits(len(request.prompt))
        if not pool.prefix_cache or not limit:
            return 0
        chain = ContentChain(request.prompt, pool.block_size, request.cache_salt, (), None)
        keys = chain.upto(limit)
        if then is None:
            found = len(pool.match(keys, limit))
        else:
            found = next((i for i in range(limit) if keys[i + 1] not in then), limit)
        return min(found * pool.block_size, len(request.prompt) - 1)

    def refusal(self, request: Request) -> RequestRefused | None:
        """Why this request could never fit here; None if it can."""
        tokens = len(request.prompt) + request.output_limit
        if tokens > self.capacity.max_context:
            return RequestRefused(
                request.id,
                f"prompt of {len(request.prompt)} plus {request.output_limit} output tokens exceeds the "
                "longest context",
                needed=tokens,
                available=self.capacity.max_context,
            )
        # The last token that is generated is never fed back, so its KV is never stored.
        peak = self._compression.peak(self._compression.keep(request))
        needed = -(-min(tokens - 1, peak) // self.pool.block_size)
        if needed > self.pool.total:
            return RequestRefused(
                request.id,
                f"prompt of {len(request.prompt)} plus {request.output_limit} output tokens never fits the "
                f"KV cache, counted in blocks of {self.pool.block_size}",
                needed=needed,
                available=self.pool.total,
            )
        return None

    # -- requests come and go ------------------------------------------------------------------------

    def add(self, request: Request, now: int, decision: Decision = DIRECT) -> None:
        """Take a request in; it waits from now on. Raises `RequestRefused` if it could never fit.

        One that asks for several outputs becomes as many sequences. The first computes the prompt; the others are
        held until it has, and then share its blocks.
        """
        if (refusal := self.refusal(request)) is not None:
            raise refusal
        sequences = request.sequences()
        taken = request.id in self._requests or request.id in self._groups
        if taken or (request.n > 1 and any(sequence.id in self._requests for sequence in sequences)):
            raise RequestRefused(request.id, "a request of this id is being served", needed=1, available=0)
        keep = self._compression.keep(request)
        peak = self._compression.peak(keep)
        group: list[LiveRequest] = []
        for sequence in sequences:
            foreseen = self._predict(sequence, now)
            live = LiveRequest(sequence, self._seq, decision, self.pool.block_size, foreseen)
            live.keep, live.peak = keep, peak
            live.plain = live.plain and keep is None
            self._load.to_compute += live.known
            self._load.expected += live.predicted
            self._seq += 1
            self._requests[sequence.id] = live
            group.append(live)
            live.status = "held"
        if request.n > 1:
            self._groups[request.id] = group
            for live in group:
                live.group = group
        self._held += len(group)
        if self._joins_late and self._in_flight is not None:
            self._late.append(group[0])
            self._repeats = 0
        else:
            self._let_in(group[0], now)

    def _let_late_in(self, late: list[LiveRequest], now: int) -> list[LiveRequest]:
        for live in late:
            if live.status == "held":  # and not aborted meanwhile
                self._let_in(live, now)
        return []

    def _let_in(self, live: LiveRequest, now: int) -> None:
        """A request that was held waits in the queue from now on."""
        live.status = "waiting"
        self._held -= 1
        self._repeats = 0
        self._waiting[live.request.id] = live
        self._call(self.policy.on_arrival, live.view, now)

    def _settle_groups(self, now: int) -> None:
        """Let in the sequences whose prompt one of their group has; or the next one, if nobody is to compute it."""
        for parent in self._ripe:
            group = self._groups.get(parent, ())
            held = [live for live in group if live.status == "held"]
            active = [live for live in group if live.status != "held"]
            ready = any(live.output for live in active)
            for live in held if ready else held[: not active]:
                self._let_in(live, now)
        self._ripe.clear()

    def abort(self, request_id: RequestId, now: int) -> bool:
        """End a request in any state; False if it isn't here. One that is being computed ends at commit.

        Of a request with several outputs, all that are here end; each can be ended alone by its own id.
        """
        if request_id in self._groups:
            for name in [member.request.id for member in self._groups[request_id]]:
                self.abort(name, now)
            return True
        live = self._requests.get(request_id)
        if live is None:
            return False
        self._repeats = 0
        if self._in_flight is not None and live.granted_now:
            if not (live.granted or live.aborting):
                self._decodes.aborting.append(live)
            live.aborting = True
        else:
            self._end(live, "aborted", "aborted", now)
        return True

    def pause(self, what: Literal["admission", "all"] = "all") -> None:
        """Grant nothing any more: to waiting requests (`admission`, to drain), or to any (`all`)."""
        self._paused, self._repeats = what, 0

    def resume(self) -> None:
        self._paused, self._repeats = "", 0

    @property
    def paused(self) -> bool:
        return bool(self._paused)

    def interrupt(self, now: int) -> None:
        """The run ends here: record every request that is still in the engine as unfinished.

        The core is of no use afterwards.
        """
        for live in list(self._requests.values()):
            live.sync()
            end = max(now, live.phase_start, *live.token_times[-1:])
            self._observer.on_request(live.record("unfinished", "interrupted", end))
        self._in_flight = None
        self._late.clear()
        self._requests.clear()
        self._running.clear()
        self._waiting.clear()
        self._groups.clear()
        self._ripe.clear()
        self._held = 0

    # -- the scheduling loop -------------------------------------------------------------------------

    def plan(self, now: int) -> StepPlan:
        """Decide the next step. Falsy when there is nothing to do; otherwise `commit` must follow."""
        if self._in_flight is not None:
            raise RuntimeError(f"plan() before commit() of step {self._in_flight.plan.index}")
        self.host.settle()
        promised, self._repeats = self._repeats, 0
        if self._ripe:
            promised = 0
            self._settle_groups(now)
        late, self._late = self._late, []
        if late and not (self._running or self._waiting):  # nothing to decide without them
            late = self._let_late_in(late, now)
        if self.pool.expires:
            self._evicting("expired", self.pool.expire, now)
        step, decodes = self._step, self._decodes
        step.begin(self._index, now, self._paused)
        if promised and decodes.members and decodes.needed <= self.pool.available:
            step.run_decodes()  # the plan before this one, which the policy said is still its choice
            step.repeats, step.repeats_past_ends = promised - 1, self._repeats_past_ends
        else:
            try:
                self.policy.schedule(step)
            except PolicyError:
                raise
            except Exception as error:
                raise self._policy_blamed(error, "schedule", ()) from error
        joined = bool(late)
        if joined:
            self._let_late_in(late, now)
        if not (step.work or step.decoding.seqs or step.preempted or step.rejected):
            if joined or self.relocation.gave_up(now):
                return self.plan(now)
            return StepPlan(self._index, now, (), self._digest)
        self._guard_progress(step)
        alone = len(step.work) == len(step.together) and not (
            step.preempted or step.rejected or decodes.others
        )
        if step.repeats and alone and not joined:
            self._repeats, self._repeats_past_ends = step.repeats, step.repeats_past_ends
        plan = self._freeze(step)
        self._in_flight = describe(self, plan, step)
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: int) -> tuple[Emission, ...]:
        """Apply a step's result at the time it is there. Returns the generated tokens in plan order."""
        flight = self._in_flight
        if flight is None or flight.plan is not plan:
            raise RuntimeError(f"commit() of step {plan.index}, which is not the plan in flight")
        wanted = flight.samples
        if len(result.tokens) != wanted:
            raise ExecutorError(
                f"step {plan.index}: the data plane returned {len(result.tokens)} tokens for {wanted} sampling requests"
            )
        self._in_flight = None
        emissions = carry_out(self, flight, result, now)
        flight.released_commit = self._count()[2]
        flight.ranks = result.ranks
        self._committed = flight
        return tuple(emissions)

    def observe(self, timing: StepTiming) -> None:
        """Tell the observer of the step just committed, now that all of its durations are known."""
        flight, self._committed = self._committed, None
        if flight is None:
            raise RuntimeError("observe() without a committed step")
        tell(self, flight, timing)

    def coast(self, price: Price, now: int, until: int) -> int:
        """Take at once the steps that the policy promised and that end before `until`; returns the time then.

        Each has its digest, times and records as if it had been planned and committed. `now` is after the last
        commit; nothing else happens before `until`.
        """
        if not self._repeats or not self._decodes.bulk or self.pool.expires:
            return now
        if self._totals is None and self._wants_work:
            return now
        return coast(self, price, now, until)

    def stalled(self) -> PolicyError:
        """What to raise when requests wait, nothing runs, nothing will arrive, and nothing was planned."""
        first = next(iter(self._requests.values())).view
        return PolicyError(
            f"policy '{self.policy_name}' scheduled nothing at step {self._index} although {len(self._waiting)} "
            f"requests wait, {len(self._running)} run and no arrival is due; the first is {first!r}"
        )

    def check(self) -> None:
        """Conservation laws, as code (`lab.control.laws`). Raises AssertionError."""
        check(self)

    # -- inside --------------------------------------------------------------------------------------

    def _freeze(self, step: StepBuilder) -> StepPlan:
        work, decoding = tuple(step.work), step.decoding
        preempted: tuple[tuple[RequestId, str], ...] = ()
        rejected: tuple[tuple[RequestId, str], ...] = ()
        if step.preempted:
            preempted = tuple([(live.request.id, how) for live, how in step.preempted])
        if step.rejected:
            rejected = tuple([(live.request.id, reason) for live, reason in step.rejected])
        swap_out, swap_in = tuple(step.swap_out), tuple(step.swap_in)
        compactions, copies = tuple(step.compactions), tuple(step.copies)
        digest = self._digest = chain(
            self._digest,
            self._index,
            work,
            preempted,
            rejected,
            swap_out,
            swap_in,
            decoding,
            compactions,
            copies,
        )
        listed: Sequence[Work] = work
        if decoding.seqs:
            listed = WorkList(work, decoding, self._decodes)
            if self._wants_work:
                listed.listed()
        admitted: tuple[RequestId, ...] = ()
        new: tuple[Request, ...] = ()
        released: tuple[RequestId, ...] = ()
        if step.admitted:
            admitted = tuple([live.request.id for live in step.admitted])
            new = tuple([live.request for live in step.admitted if not live.seen])
            for live in step.admitted:
                if not live.seen and self._on_admitted is not None:
                    self._on_admitted(live.request.id)
                live.seen = True
        if self._released:
            released = tuple(self._released)
            self._released.clear()
        index, self._index = self._index, self._index + 1
        return StepPlan(
            index, step.now, listed, digest, new, admitted, preempted, rejected, released, swap_out, swap_in,
            compactions, decoding, copies, self.pool.reread * self.pool.block_size,
        )  # fmt: skip

    def _count(self) -> tuple[int, int, int]:
        """Blocks allocated, evicted and released since the last call."""
        pool, before = self.pool, self._counted
        self._counted = (pool.allocated, pool.evicted, pool.released)
        return (pool.allocated - before[0], pool.evicted - before[1], pool.released - before[2])

    def _end(self, live: LiveRequest, outcome: Outcome, reason: str, now: int) -> None:
        if self._held or not self._repeats_past_ends:
            self._repeats = 0
        unheard = live.status == "held"
        self._leave(live)
        # Recorded before any policy hears of it: what a hook raises must not cost the record.
        record = live.record(outcome, reason, now)
        self._observer.on_request(record)
        try:
            self.pool.release(live.table, now)
        except DiptychError:
            raise
        except Exception as error:
            raise self._evictor_blamed(error, "on_evictable") from error
        self.host.release(live.host)
        live.table, live.host = Table(), []
        said = reason if outcome == "finished" else outcome
        if not unheard:
            self._call(self.policy.on_finish, live.view, said, now)
        if self._predictor is not None and outcome == "finished":
            self._predicting(self._predictor.on_finish, live.request, len(live.output), now)
        if self.on_ended is not None:
            self.on_ended(record, now)
        del live.view  # whoever has it may keep it; but a circle would wait for the cycle collector

    def _leave(self, live: LiveRequest) -> None:
        """It isn't here any more: it ends, or goes on elsewhere."""
        name, load = live.request.id, self._load
        self._decodes.drop(live)
        del self._requests[name]
        self._running.pop(name, None)
        self._waiting.pop(name, None)
        load.to_compute -= live.known - live.computed
        load.expected -= max(live.predicted - len(live.output), 0)
        load.context -= live.computed - live.dropped if live.status == "running" else 0
        self._held -= live.status == "held"
        live.status = "ended"
        if live.group:
            self._leave_group(live)
        if live.seen:
            self._released.append(name)

    def _leave_group(self, live: LiveRequest) -> None:
        parent = live.request.parent
        live.group.remove(live)
        if live.group:
            self._ripe[parent] = None
        else:
            del self._groups[parent]

    def _predict(self, request: Request, now: int) -> int:
        if self._predictor is None:
            return request.output_limit
        foreseen = self._predicting(self._predictor.predict, request, now)
        if not isinstance(foreseen, int) or not 1 <= foreseen <= MOST_FORESEEN:
            raise PolicyError(
                f"length predictor '{type(self._predictor).__name__}' foresaw {foreseen!r} tokens for request "
                f"'{request.id}'; expected an integer from 1 to {MOST_FORESEEN}"
            )
        return foreseen

    def _predicting(self, hook: Callable[..., Any], request: Request, *args: int) -> Any:
        try:
            return hook(request, *args)
        except Exception as error:
            who = f"length predictor '{type(self._predictor).__name__}'"
            raise blame(error, who, f"in {hook.__name__}, request '{request.id}'") from error

    def _evicting(self, doing: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Let the pool do what leads to the eviction policy's hooks, outside any other policy's call."""
        try:
            return call(*args, **options)
        except DiptychError:
            raise
        except Exception as error:
            raise self._evictor_blamed(error, doing) from error

    def _evictor_blamed(self, error: Exception, doing: str) -> PolicyError:
        who = f"eviction policy '{type(self._eviction).__name__}'"
        return blame(error, who, f"in {doing}, step {self._index}")

    def _admitted(self, live: LiveRequest, supplied: int) -> None:
        self._load.to_compute -= supplied
        self._load.context += live.computed - live.dropped

    def _preempted(self, live: LiveRequest, how: How, now: int, computed: int, held: int) -> None:
        self._load.context -= held
        self._load.to_compute += computed - live.computed
        self._call(self.policy.on_preempt, live.view, how, now)

    def _rejected(self, live: LiveRequest, reason: str, now: int) -> None:
        self._end(live, "rejected", reason, now)

    def _guard_progress(self, step: StepBuilder) -> None:
        self._workless = 0 if step.work or step.decoding.seqs or step.rejected else self._workless + 1
        if self._workless > IDLE_STEPS_ALLOWED:
            raise PolicyError(
                f"policy '{self.policy_name}' preempted for {self._workless} steps in a row, up to "
                f"step {self._index}, without running anything"
            )

    def _call(self, hook: Callable[..., Any], *args: Any) -> None:
        """Call a policy; what it raises ends the run with the policy's name, the step and its own line."""
        try:
            hook(*args)
        except PolicyError:
            raise
        except Exception as error:
            raise self._policy_blamed(error, hook.__name__, args) from error

    def _policy_blamed(self, error: Exception, hook: str, args: Sequence[Any]) -> PolicyError:
        about = next((f", {a!r}" for a in args if hasattr(a, "seq")), "")
        who, doing = f"policy '{self.policy_name}'", f"in {hook}, step {self._index}{about}"
        return blame(error, who, doing, eviction=type(self._eviction).__name__)
