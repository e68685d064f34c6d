"""Everything a policy author needs, and nothing else.

A policy gets `now` (integer nanoseconds since the run began), read-only views, and the `Step` it may act
through; it does no I/O, reads no clock, and draws random numbers only from `self.rng`, which the run seeds.
Every order a policy makes must end in `(arrival, seq)`, so that runs repeat exactly.

The smallest useful policy:

    class Newest(SchedulingPolicy):
        '''Serve the latest arrival first.'''

        def __init__(self):
            self.waiting = []

        def on_arrival(self, request, now):
            self.waiting.append(request)

        def on_preempt(self, request, how, now):
            self.waiting.append(request)

        def on_finish(self, request, reason, now):
            if request in self.waiting:  # aborted before it ran
                self.waiting.remove(request)

        def schedule(self, step):
            for request in step.running.values():
                step.run(request)
            while self.waiting and step.run(self.waiting[-1]):
                self.waiting.pop()

(`RequestView`s stay valid and current for the whole life of a request.)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from lab.control.answers import Grant, ReplicaView, Shortage
from lab.control.request import BlockId, Prompt, Request, RequestId, Segment, stream_of
from lab.frozen import frozen

__all__ = [
    "NEVER",
    "AdmissionPolicy",
    "BlockId",
    "BlockView",
    "CompressionPolicy",
    "Ended",
    "EvictionPolicy",
    "FleetView",
    "Future",
    "Grant",
    "How",
    "KvKeep",
    "LengthPredictor",
    "PreemptionPolicy",
    "Prompt",
    "ReplicaView",
    "Request",
    "RequestId",
    "RequestView",
    "RoutingPolicy",
    "ScalingPolicy",
    "SchedulingPolicy",
    "Segment",
    "Shortage",
    "Step",
    "Verdict",
    "stream_of",
]

How = Literal["recompute", "swap"]
"""What happens to a preempted request's KV. Its tokens stay known either way: `recompute` drops the KV and
computes it again later, `swap` parks it in host memory and copies it back."""

NEVER = 1 << 62
"""Later than any time and any position."""


class RequestView(Protocol):
    """A request as policies see it: read-only, always current."""

    @property
    def id(self) -> RequestId: ...
    @property
    def seq(self) -> int:
        """Order of entry into this engine; the last resort of every tie."""
        ...

    @property
    def arrival(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def session(self) -> str: ...
    @property
    def priority(self) -> int:
        """Lower is more important."""
        ...

    @property
    def ttft_slo(self) -> int | None: ...
    @property
    def tpot_slo(self) -> int | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def known(self) -> int:
        """Prompt tokens plus generated tokens."""
        ...

    @property
    def computed(self) -> int:
        """Tokens that went through the model. Each step lets `computed` chase `known`."""
        ...

    @property
    def kept(self) -> int:
        """Tokens whose KV is held: `computed`, less what KV compression has dropped."""
        ...

    @property
    def remaining(self) -> int:
        """known - computed."""
        ...

    @property
    def generated(self) -> int: ...
    @property
    def expected_output(self) -> int:
        """Total output tokens that the run's length predictor foresaw on arrival, and always more than
        `generated`. The default predictor is the oracle: the true length where it is forced."""
        ...

    @property
    def preemptions(self) -> int: ...
    @property
    def blocks(self) -> int:
        """KV blocks held."""
        ...

    @property
    def host_blocks(self) -> int:
        """KV blocks parked in host memory; more than 0 only while it waits swapped out."""
        ...

    @property
    def granted(self) -> int:
        """Tokens granted in the step being built."""
        ...


class Step(Protocol):
    """One scheduling step: the only handle a scheduling policy has on the system.

    Each call takes effect at once on the step being built; nothing reaches the data plane until the
    policy returns. Misuse raises `PolicyError` at the policy's own line.
    """

    @property
    def now(self) -> int: ...
    @property
    def tokens_left(self) -> int: ...
    @property
    def slots_left(self) -> int: ...
    @property
    def blocks_left(self) -> int:
        """KV blocks that are free or evictable."""
        ...

    @property
    def token_budget(self) -> int:
        """What `tokens_left` was when the step began."""
        ...

    @property
    def blocks_total(self) -> int: ...
    @property
    def block_size(self) -> int:
        """Tokens a block."""
        ...

    @property
    def host_blocks_left(self) -> int:
        """Blocks of host memory that swapping out could still fill; 0 without a host tier."""
        ...

    @property
    def running(self) -> Mapping[RequestId, RequestView]:
        """In order of admission."""
        ...

    @property
    def waiting(self) -> Mapping[RequestId, RequestView]:
        """Look up or count; iterating it makes planning cost what the queue is long."""
        ...

    def run(
        self,
        request: RequestView | RequestId,
        tokens: int | None = None,
        *,
        whole: bool = False,
        leave_free: int = 0,
    ) -> Grant:
        """Give a request up to `tokens` (default: all it has left) of this step.

        A waiting request is admitted: it takes a slot, and cached prompt blocks are reused. The grant is
        cut to the token budget and the engine's chunk size, never to the blocks: these are enough or the
        grant is empty. `whole=True`: all remaining tokens or none. `leave_free`: blocks that must be left
        over afterwards. A preempted request comes back only when all its known tokens fit.
        """
        ...

    def run_decodes(self) -> Sequence[RequestView]:
        """Give every request in steady decode its next token, and return the running requests that are left.

        All or none: when tokens or blocks don't suffice for all of them, or anything was granted or preempted
        in this step before, nobody is granted anything and all running requests are returned, in order of
        admission. In steady decode is whoever waits for nothing but its next token and whose length is known.
        They are granted in the order in which they came to decode, at a cost that doesn't depend on how many
        they are; `run` for each of them does the same, only slower.
        """
        ...

    def repeat(self, steps: int | None = None, *, past_ends: bool = False) -> None:
        """Promise: while nobody arrives, ends, or lacks blocks, this step's plan stays the choice for so many more
        steps (`None`: for as long as that holds). With `past_ends` it does also when requests have ended.

        A policy that says nothing is asked in every step, which is always right. For steps that are promised and are
        nothing but `run_decodes` it isn't: the engine plans them alone, and a simulator crosses many of them at once.
        Their times and digests are the same.
        """
        ...

    def preempt(self, request: RequestView | RequestId, how: How | None = None) -> How:
        """Take a running request's blocks and slot back; it waits again. Not one granted in this step.

        Without `how` the run's preemption policy chooses. Returns what happened: `swap` becomes `recompute`
        when the host tier has no room, or there is nothing computed to keep.
        """
        ...

    def victim(self, candidates: Sequence[RequestView]) -> RequestView:
        """Which of these running requests the run's preemption policy would preempt.

        Give them in your own order, the most worthy first: the default policy takes the last.
        """
        ...

    def reject(self, request: RequestView | RequestId, reason: str) -> None:
        """Give up on a waiting request for good; `on_finish` is called at once."""
        ...

    def cached(self, request: RequestView | RequestId) -> int:
        """Tokens the prefix cache would supply if this waiting request were admitted now."""
        ...

    def blocks_for(self, request: RequestView | RequestId, tokens: int) -> int:
        """Blocks that `run(request, tokens)` would take from `blocks_left`."""
        ...

    def fits_without(self, request: RequestView | RequestId, victims: Sequence[RequestView]) -> bool:
        """Whether all of a waiting request would find blocks if these running requests were preempted."""
        ...

    def frees(self, request: RequestView | RequestId) -> int:
        """Blocks that preempting this running request would add to `blocks_left` (shared ones stay held)."""
        ...

    def estimate(self, prefill_tokens: int = 0, decodes: int = 0, context_tokens: int = 0) -> int:
        """Nanoseconds that a step of this composition would take, learnt from the steps committed so far.

        `context_tokens` is the sum over the batch of the tokens attended to. 0 before the first commit.
        It holds for steps like those it was learnt from: price a backlog as so many full steps, not as one
        giant step.
        """
        ...

    def swap_time(self, blocks: int) -> int:
        """Nominal nanoseconds to move this many blocks one way between device and host."""
        ...


class SchedulingPolicy:
    """Orders and sizes each step's work. Override `schedule`; the hooks are optional."""

    rng: random.Random
    """Seeded by the run, set before the first call."""

    def schedule(self, step: Step) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define schedule(step)")

    def on_arrival(self, request: RequestView, now: int) -> None:
        """The request began to wait."""

    def on_tokens(self, request: RequestView, computed: int, generated: int, now: int) -> None:
        """A step computed and generated this many tokens of it; also for the last one, before `on_finish`."""

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        """The request lost its blocks and waits again."""

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        """The request left: `length`, `stop`, `aborted` or `rejected`."""


class BlockView(Protocol):
    """A KV block as eviction policies see it. `key` survives eviction, for ghost lists."""

    @property
    def id(self) -> BlockId: ...
    @property
    def key(self) -> bytes:
        """Content key, chained over the block's whole prefix."""
        ...

    @property
    def depth(self) -> int:
        """Position in its chain; 0 is the first block of a prompt."""
        ...

    @property
    def user(self) -> Request | None:
        """The request that used it last: for its session, tenant, prompt length, arrival."""
        ...


class Future(Protocol):
    """What a bound may know and no real policy can: the prompts that are still to come."""

    def next_use(self, key: bytes) -> int:
        """Position, in order of arrival, of the next request whose prompt holds this block; else `NEVER`."""
        ...


class EvictionPolicy:
    """Chooses which reusable block to give up. It chooses only; the pool commits and calls `on_dropped`.

    The pool calls `on_evictable` when a cached block becomes a candidate: unreferenced and, while
    `leaf_only`, without cached children, so a chain goes tail first and no block is orphaned.
    With `leaf_only = False` any unreferenced block is a candidate and the policy's own order decides; a block
    whose parent is gone can't be hit until the parent returns. Released chains arrive own tail first.
    """

    leaf_only: ClassVar[bool] = True
    by_release: ClassVar[bool] = False
    """True where the victim is whichever candidate was let go first, and nothing else matters: the pool then keeps
    that order itself, much faster, and calls no hook. Not inherited. Only with `leaf_only = False`."""
    needs_future: ClassVar[bool] = False
    """True for a bound such as Belady's: `future` is set before the first call, and results are marked."""
    rng: random.Random
    future: Future

    def on_open(self, blocks: int, block_size: int) -> None:
        """Called once, before all else, with the size of the cache."""

    def expired(self, now: int) -> Sequence[BlockId]:
        """Candidates to drop now although there is room; asked at every step. For policies with a time limit."""
        return ()

    def victim(self, now: int) -> BlockId:
        """The candidate to drop next. Called only when there is one."""
        raise NotImplementedError(f"{type(self).__name__} must define victim(now)")

    def on_cached(self, block: BlockView, now: int) -> None:
        """The (referenced) block became reusable content."""

    def on_hit(self, block: BlockView, now: int) -> None:
        """A request found the block's content cached and uses it."""

    def on_evictable(self, block: BlockView, now: int) -> None:
        """The block became a candidate."""

    def on_pinned(self, block: BlockView, now: int) -> None:
        """The block stopped being a candidate: referenced again, or a cached child appeared."""

    def on_dropped(self, block: BlockView, now: int) -> None:
        """The block's content is gone: evicted, or withdrawn."""


class PreemptionPolicy:
    """Whom to preempt, and what becomes of its KV. Works under any scheduling policy, through
    `Step.victim` and `Step.preempt`."""

    rng: random.Random

    def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
        """One of the running requests given, which come in the scheduler's order, the most worthy first."""
        return candidates[-1]

    def how(self, victim: RequestView, step: Step) -> How:
        """`swap` counts only where there is a host tier with room."""
        return "recompute"


@frozen
class KvKeep:
    """How much of its KV a request keeps: `blocks` whole ones, at most, and the block that isn't full yet.

    Its first `sinks` and its last `recent` full blocks are always among them.
    """

    blocks: int
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        if min(self.sinks, self.recent) < 0 or self.blocks < max(1, self.sinks + self.recent):
            raise ValueError(
                f"{self}: expected at least 1 block, and at least as many as `sinks` and `recent` together"
            )


class CompressionPolicy:
    """How much of its KV a request keeps, and which part. Later tokens attend to that part alone.

    The two planes share the work. The control plane asks `keep` once for each request, and after each step takes
    from a request what it holds beyond: so decisions, and a simulation, depend on numbers of tokens only. Which
    blocks' content goes is for the data plane to say, layer by layer, by `score`. Keys stay turned to the positions
    at which they were computed. A policy that doesn't define `score` gives up the oldest blocks after the sinks.

    The results depend on where prompts are cut into chunks, since what a chunk's tokens see was chosen before it.
    """

    needs_query: ClassVar[bool] = False
    """True when `score` looks at the query: the data plane then keeps it."""
    rng: random.Random

    def keep(self, request: Request, block_size: int) -> KvKeep | None:
        """What this request keeps; None: everything. Asked once, on arrival."""
        return None

    @staticmethod
    def score(keys: Any, query: Any) -> Any:
        """How much each cached token is worth; the blocks of the least mean go. Runs in the data plane.

        `keys` is a torch tensor `[layers, tokens, kv_heads, head_dim]`, float32, in no certain order between the sinks
        and the recent blocks. `query` is None, or with `needs_query` the latest token's `[layers, heads, head_dim]`,
        turned to its position as the keys are, and scaled: its product with a key is an attention logit. Gives
        `[layers, tokens]`. Tensors bring their methods with them, so that no policy imports torch.
        """
        raise NotImplementedError


class LengthPredictor:
    """Foresees output lengths: what `RequestView.expected_output` says."""

    rng: random.Random

    def predict(self, request: Request, now: int) -> int:
        """Total output tokens expected, at least 1. Asked once, on arrival.

        `request.output_limit` is the truth where lengths are forced: only an oracle may look at it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define predict(request, now)")

    def on_finish(self, request: Request, generated: int, now: int) -> None:
        """The request ended by itself after this many tokens: something to learn from."""


@frozen
class Verdict:
    """Answer of an admission policy."""

    admit: bool
    reason: str


@frozen
class Ended:
    """How a request that had been admitted ended. Times in nanoseconds; `ttft` is None without a token."""

    outcome: str
    """`finished`, `aborted` or `rejected`."""
    replica: int
    ttft: int | None
    e2e: int
    tokens: int
    """Generated."""


class AdmissionPolicy:
    """Decides at the gateway whether a request enters at all."""

    rng: random.Random

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        raise NotImplementedError(f"{type(self).__name__} must define admit(request, replicas, now)")

    def on_finish(self, request: Request, ended: Ended, now: int) -> None:
        """A request that was admitted has ended: the feedback of adaptive limits."""


class RoutingPolicy:
    """Decides which replica serves a request."""

    rng: random.Random

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        """`index` of one of the replicas given (there is at least one), and the reason."""
        raise NotImplementedError(f"{type(self).__name__} must define route(request, replicas, now)")

    def on_finish(self, request: Request, ended: Ended, now: int) -> None:
        """A request that was routed has ended."""


@frozen
class FleetView:
    """What a scaling policy sees, once an interval."""

    replicas: Sequence[ReplicaView]
    """Those that are ready."""
    starting: int
    """Replicas on their way up (cold start)."""
    draining: int
    """Replicas that take nothing new and go when they are empty."""
    least: int
    most: int
    """The bounds that the target will be cut to."""
    arrived: int
    """Requests since the last look."""
    finished: int
    met: int
    """Requests that ended since the last look, and those of them that met their objectives."""
    rejected: int = 0
    """Requests that the gateway turned away since the last look."""
    group: str = ""
    """Where groups of a topology are scaled apart: the one that this is about. Each has a policy of its own, which sees
    this group's replicas; requests are counted for all groups together."""


class ScalingPolicy:
    """Decides how many replicas there should be. Asked every `interval` nanoseconds."""

    rng: random.Random
    interval: int = 1_000_000_000

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        """Wanted number of replicas that are ready or starting, and the reason.

        What is missing starts (and is ready after the cold start); what is too much drains.
        """
        raise NotImplementedError(f"{type(self).__name__} must define target(fleet, now)")
