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

import enum
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from lab.control.request import BlockId, Request, RequestId

__all__ = [
    "AdmissionPolicy",
    "BlockId",
    "BlockView",
    "EvictionPolicy",
    "Grant",
    "How",
    "ReplicaView",
    "Request",
    "RequestId",
    "RequestView",
    "RoutingPolicy",
    "SchedulingPolicy",
    "Shortage",
    "Step",
    "Verdict",
]

How = Literal["recompute"]
"""What happens to a preempted request's KV. Its tokens stay known and are computed again."""


class Shortage(enum.Enum):
    """What ran short when a grant came back empty."""

    TOKENS = "tokens"
    SLOTS = "slots"
    BLOCKS = "blocks"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Grant:
    """Answer of `Step.run`: `tokens` granted, or none and what ran short. Falsy when nothing was granted."""

    tokens: int
    short: Shortage | None = None

    def __bool__(self) -> bool:
        return self.tokens > 0


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
        """Tokens whose KV is in the cache. Each step lets `computed` chase `known`."""
        ...

    @property
    def remaining(self) -> int:
        """known - computed."""
        ...

    @property
    def generated(self) -> int: ...
    @property
    def expected_output(self) -> int:
        """Total output tokens expected: the true length where it is forced, `max_tokens` otherwise."""
        ...

    @property
    def preemptions(self) -> int: ...
    @property
    def blocks(self) -> int:
        """KV blocks held."""
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

    def preempt(self, request: RequestView | RequestId, how: How = "recompute") -> None:
        """Take a running request's blocks and slot back; it waits again. Not one granted in this step."""
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


class EvictionPolicy:
    """Chooses which reusable block to give up. It chooses only; the pool commits and calls `on_dropped`.

    The pool calls `on_evictable` when a cached block becomes a candidate: unreferenced and, while
    `leaf_only`, without cached children, so a chain goes tail first and no block is orphaned.
    With `leaf_only = False` any unreferenced block is a candidate and the policy's own order decides; a block
    whose parent is gone can't be hit until the parent returns. Released chains arrive own tail first.
    """

    leaf_only: ClassVar[bool] = True
    rng: random.Random

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


@dataclass(frozen=True, slots=True)
class Verdict:
    """Answer of an admission policy."""

    admit: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as seen by admission and routing. `as_of` is when this was true: routers see stale state."""

    index: int
    as_of: int
    running: int
    waiting: int
    blocks_free: int
    blocks_total: int


class AdmissionPolicy:
    """Decides at the gateway whether a request enters at all."""

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        raise NotImplementedError(f"{type(self).__name__} must define admit(request, replicas, now)")


class RoutingPolicy:
    """Decides which replica serves a request."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        """Index of the chosen replica, and the reason."""
        raise NotImplementedError(f"{type(self).__name__} must define route(request, replicas, now)")
