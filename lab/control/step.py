"""The transactional step: how a scheduling policy acts, and where every sum about budgets is done.

State path, control plane. A policy asks; `StepBuilder` checks tokens, slots and blocks, and either does all
of it at once (cache hits pinned, blocks taken, content published) or none of it and says what ran short.
Going over a budget can't be expressed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lab.control.blame import blame
from lab.control.compress import Compression
from lab.control.decodes import Decodes
from lab.control.estimate import StepEstimate
from lab.control.live import LiveRequest, View
from lab.control.plan import NO_DECODES, Compaction, Move, Work
from lab.control.request import RequestId
from lab.errors import ConfigError, PolicyError
from lab.policy import Grant, How, PreemptionPolicy, RequestView, Shortage
from lab.state.blocks import Block, BlockPool, Table
from lab.state.tiers import HostTier

_CONTROL = os.path.join("lab", "control")


MOST_REPEATS = 1 << 60
"""As good as without end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold: tokens, running requests, and prompt tokens of one request (`chunk`)."""

    token_budget: int = 512
    max_seqs: int = 32
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_seqs", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"engine.{name} is {value}; expected at least 1")


class _Views(Mapping[RequestId, RequestView]):
    """Read-only mapping of ids to views over the engine's own table; keeps its order."""

    __slots__ = ("_table",)

    def __init__(self, table: dict[RequestId, LiveRequest]) -> None:
        self._table = table

    def __getitem__(self, key: RequestId) -> View:
        return self._table[key].view

    def __iter__(self) -> Iterator[RequestId]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: object) -> bool:
        return key in self._table


class StepBuilder:
    """Implements `lab.policy.Step`, whose docstrings are the contract."""

    def __init__(
        self,
        policy: str,
        limits: Limits,
        pool: BlockPool,
        requests: dict[RequestId, LiveRequest],
        running: dict[RequestId, LiveRequest],
        waiting: dict[RequestId, LiveRequest],
        preemption: PreemptionPolicy,
        host: HostTier,
        estimate: StepEstimate,
        transfer_ns: Callable[[int], int],
        compression: Compression,
        on_admit: Callable[[LiveRequest, int], None],
        on_preempt: Callable[[LiveRequest, How, int, int, int], None],
        on_reject: Callable[[LiveRequest, str, int], None],
        decodes: Decodes,
    ) -> None:
        self.token_budget = limits.token_budget
        self._policy, self._limits, self._pool = policy, limits, pool
        self._requests, self._running, self._waiting = requests, running, waiting
        self._on_admit, self._on_preempt, self._on_reject = on_admit, on_preempt, on_reject
        self._preemption, self._host = preemption, host
        self._estimate, self._transfer_ns = estimate, transfer_ns
        self._compression = compression
        self.running, self.waiting = _Views(running), _Views(waiting)
        self.decodes = decodes
        self._forget()
        self.begin(0, 0, "")

    def begin(self, index: int, now: int, paused: str) -> None:
        """A new step, in which nothing is decided yet."""
        self.index, self.now, self._paused = index, now, paused
        self.tokens_left = self.token_budget
        self.work: list[Work] = []
        self.granted: list[LiveRequest] = []
        self.admitted: list[LiveRequest] = []
        self.decoding = NO_DECODES
        self.together: list[LiveRequest] = []
        """Those granted by `run_decodes`, where requests are touched one by one: the first of `granted`."""
        self.repeats, self.repeats_past_ends = 0, False
        if self.preempted or self.rejected or self.moved:
            self._forget()

    def _forget(self) -> None:
        self.preempted: list[tuple[LiveRequest, How]] = []
        self.rejected: list[tuple[LiveRequest, str]] = []
        self.swap_out: list[Move] = []
        self.swap_in: list[Move] = []
        self.compactions: list[Compaction] = []
        self.copies: list[Move] = []

    @property
    def moved(self) -> bool:
        """Whether the data plane has KV to move, or to give up."""
        return bool(self.swap_out or self.swap_in or self.compactions or self.copies)

    # -- what a policy reads -----------------------------------------------------------------------

    @property
    def slots_left(self) -> int:
        return self._limits.max_seqs - len(self._running)

    @property
    def blocks_left(self) -> int:
        return self._pool.available

    @property
    def blocks_total(self) -> int:
        return self._pool.total

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    @property
    def host_blocks_left(self) -> int:
        return self._host.free

    def cached(self, request: RequestView | RequestId) -> int:
        live = self._find(request, "cached")
        if live.status != "waiting":
            return 0
        return min(len(self._hits(live)) * self._pool.block_size, live.known - 1)

    def blocks_for(self, request: RequestView | RequestId, tokens: int) -> int:
        live = self._find(request, "blocks_for")
        if live.status == "running":
            return self._cost(len(live.blocks), self._held(live, live.computed + tokens), [])
        hits = self._hits(live)
        return self._cost(len(hits), self._held(live, self._ready(live, hits) + tokens), hits)

    def fits_without(self, request: RequestView | RequestId, victims: Sequence[RequestView]) -> bool:
        live, pool = self._find(request, "fits_without"), self._pool
        dropped: Counter[int] = Counter()
        freed = 0
        for victim in victims:
            for block in self._pool.opened(self._find(victim, "fits_without").table):
                dropped[block.id] += 1
                freed += dropped[block.id] == block.refs  # a shared block is freed by its last holder
        hits = self._hits(live)
        fresh = -(-self._held(live, live.known) // pool.block_size) - len(hits)
        return fresh + sum(block.refs == dropped[block.id] for block in hits) <= pool.available + freed

    def frees(self, request: RequestView | RequestId) -> int:
        live = self._find(request, "frees")
        return sum(block.refs == 1 for block in self._pool.opened(live.table))

    def estimate(self, prefill_tokens: int = 0, decodes: int = 0, context_tokens: int = 0) -> int:
        return self._estimate(prefill_tokens, decodes, context_tokens)

    def swap_time(self, blocks: int) -> int:
        return self._transfer_ns(blocks)

    def victim(self, candidates: Sequence[RequestView]) -> RequestView:
        if not candidates:
            self._fail("victim([]): there is nobody to choose from")
        chosen: RequestView = self._ask(self._preemption.victim, candidates, self)
        if all(chosen is not candidate for candidate in candidates):
            raise PolicyError(
                f"preemption policy '{type(self._preemption).__name__}', step {self.index}: victim() returned "
                f"{chosen!r}; expected one of the {len(candidates)} candidates it was given"
            )
        return chosen

    # -- what a policy does ------------------------------------------------------------------------

    def run(
        self,
        request: RequestView | RequestId,
        tokens: object = None,
        *,
        whole: bool = False,
        leave_free: object = 0,
    ) -> Grant:
        live = self._find(request, "run")
        if live.granted_now:
            self._misuse("run", live, f"it was granted {live.granted_now} tokens in this step already")
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            self._misuse("run", live, f"asked for {tokens!r} tokens; expected an integer, at least 1")
        if not isinstance(leave_free, int) or leave_free < 0:
            self._misuse("run", live, f"leave_free is {leave_free!r}; expected an integer, at least 0")
        if self._paused == "all" or (self._paused and live.status == "waiting"):
            return Grant(0, Shortage.PAUSED)
        if self.tokens_left < 1:
            return Grant(0, Shortage.TOKENS)

        pool = self._pool
        hits: list[Block] = []
        computed, held = live.computed, len(live.blocks)
        if live.status == "waiting":
            if self.preempted and any(live is gone for gone, _ in self.preempted):
                self._misuse("run", live, "it was preempted in this very step")
            if self.slots_left < 1:
                return Grant(0, Shortage.SLOTS)
            hits = self._hits(live)
            held = len(hits)
            computed = self._ready(live, hits)

        remaining = live.known - computed
        granted = min(remaining, self.tokens_left, remaining if tokens is None else tokens)
        if not whole and self._limits.chunk is not None:
            granted = min(granted, self._limits.chunk)
        if whole and granted < remaining:
            return Grant(0, Shortage.TOKENS)

        room = pool.available - leave_free
        # A request that lost its blocks once comes back only when everything it knows fits: with room for
        # just the next chunk it would push others out, or be pushed out itself, and compute the same again.
        reach = live.known if live.preemptions and live.status == "waiting" else computed + granted
        if self._cost(held, self._held(live, reach), hits) > room:
            return Grant(0, Shortage.BLOCKS)

        fork: Block | None = None
        if live.status == "waiting":
            if live.group and (donor := self._donor(live)) is not None and computed % pool.block_size:
                fork = donor.blocks[held]
            self._admit(live, hits)
            before = 0
        else:
            before = len(live.blocks)
            if live.steady:
                self._step_out(live)
        begun = bool(live.host) or fork is not None
        self._extend(live, computed + granted - live.dropped, begun=begun)
        if live.host:
            self._swap_in(live, held)
        if fork is not None and fork is not live.blocks[held]:
            self.copies.append(Move(live.request.id, ((fork.id, live.blocks[held].id),)))
        self.tokens_left -= granted
        live.granted = granted
        self.granted.append(live)
        added = tuple([block.id for block in live.blocks[before:]])
        self.work.append(Work(live.request.id, computed, granted, live.samples_after, added, live.dropped))
        if live.keep is not None and (surplus := self._compression.surplus(live)) is not None:
            self.compactions.append(surplus)
        return Grant(granted)

    def run_decodes(self) -> Sequence[RequestView]:
        steady, pool = self.decodes, self._pool
        count = len(steady.members)
        fresh = not (self.granted or self.preempted) and self._paused != "all"
        if not (0 < count <= self.tokens_left and fresh and not steady.granted):
            return [live.view for live in self._running.values() if not live.granted_now]
        if steady.needed > pool.available:
            return [live.view for live in self._running.values()]
        taken = steady.take(pool, self.now)
        self.tokens_left -= count
        if steady.bulk:
            steady.granted = True
            self.decoding = steady.peek(pool, taken)
        else:
            blocks = dict(taken)
            for name, live in steady.members.items():
                live.granted = 1
                self.work.append(Work(name, live.computed, 1, True, blocks.get(name, ())))
                self.together.append(live)
            self.granted += self.together
        return [live.view for live in steady.others.values()]

    def repeat(self, steps: object = None, *, past_ends: bool = False) -> None:
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            self._fail(f"repeat({steps!r}): expected a number of steps, at least 1, or None")
        self.repeats, self.repeats_past_ends = MOST_REPEATS if steps is None else steps, past_ends

    def preempt(self, request: RequestView | RequestId, how: How | None = None) -> How:
        live = self._find(request, "preempt")
        if how not in (None, "recompute", "swap"):
            self._misuse("preempt", live, f"how={how!r}; expected 'recompute', 'swap' or None")
        if live.status != "running":
            self._misuse("preempt", live, "it isn't running")
        if live.granted_now:
            self._misuse("preempt", live, f"it was granted {live.granted_now} tokens in this step already")
        kept = -(-(live.computed - live.dropped) // self._pool.block_size)
        if not 0 < kept <= self._host.free:
            how = "recompute"
        elif how is None:
            how = self._ask(self._preemption.how, live.view, self)
            if how not in ("recompute", "swap"):
                raise PolicyError(
                    f"preemption policy '{type(self._preemption).__name__}', step {self.index}: how() returned "
                    f"{how!r}; expected 'recompute' or 'swap'"
                )
        self.decodes.drop(live)
        del self._running[live.request.id]
        self._waiting[live.request.id] = live
        lost, held = live.computed, live.computed - live.dropped
        if how == "swap":
            live.host = self._host.take(kept)
            pairs = zip((block.id for block in live.blocks[:kept]), live.host, strict=True)
            self.swap_out.append(Move(live.request.id, tuple(pairs)))
        else:
            live.computed = live.dropped = 0
        self._pool.release(live.table, self.now)
        live.status = "waiting"
        live.table = Table()
        live.preemptions += 1
        live.enter("queue", self.now, "swapped" if how == "swap" else "preempted")
        self.preempted.append((live, how))
        self._on_preempt(live, how, self.now, lost, held)
        return how

    def reject(self, request: RequestView | RequestId, reason: str) -> None:
        live = self._find(request, "reject")
        if live.status != "waiting":
            self._misuse("reject", live, "only a waiting request can be rejected")
        self.rejected.append((live, reason))
        self._on_reject(live, reason, self.now)

    # -- inside --------------------------------------------------------------------------------------

    def _step_out(self, live: LiveRequest) -> None:
        """One of the steady decodes is granted on its own; at commit it joins them again, as the last."""
        self.decodes.leave(live)
        self.decodes.others[live.request.id] = live

    def _admit(self, live: LiveRequest, hits: list[Block]) -> None:
        del self._waiting[live.request.id]
        self._running[live.request.id] = self.decodes.others[live.request.id] = live
        kept, ready = live.computed, self._ready(live, hits)
        if live.group and self._donor(live) is not None:
            self._pool.share(hits, self.now, live.request)
        elif not live.blocks:
            self._pool.pin(hits, self.now, live.request)
        live.status = "running"
        came = bool(live.blocks)  # with its KV, from another replica
        if not came:
            # What several sequences of one parent share, and what compression cuts, is looked at block by block.
            own = self._pool.by_release and live.keep is None and not live.group
            live.table = Table(hits, own, live.request)
        live.computed = ready
        self._on_admit(live, live.computed - kept)
        if not (live.preemptions or came):
            # What another sequence of its parent lends is no hit where there is no prefix cache.
            live.cached_blocks = len(hits) if self._pool.prefix_cache else 0
            live.cached_tokens = min(live.cached_blocks * self._pool.block_size, live.known - 1)
        # Swapped back in with its last token to come, it goes on decoding.
        decoding = kept and live.output and live.known - live.computed == 1
        live.enter("decode" if decoding else "prefill", self.now)
        self.admitted.append(live)

    def _swap_in(self, live: LiveRequest, hits: int) -> None:
        """Copy back what the prefix cache doesn't supply, into the table that was just extended."""
        back = live.host[hits:]
        if back:
            pairs = tuple(zip((block.id for block in live.blocks[hits:]), back, strict=False))
            self.swap_in.append(Move(live.request.id, pairs))
        self._host.release(live.host)
        live.host = []

    def _ready(self, live: LiveRequest, hits: list[Block]) -> int:
        """Tokens of a waiting request that need no computing: cached ones, those parked in host memory, or the
        prompt that another sequence of its parent holds."""
        if live.blocks:
            return live.computed
        if live.group and self._donor(live) is not None:
            return min(live.prompt_tokens, live.known - 1)
        return max(min(len(hits) * self._pool.block_size, live.known - 1), live.computed)

    def _ask(self, question: Callable[..., Any], *args: object) -> Any:
        try:
            return question(*args)
        except PolicyError:
            raise
        except Exception as error:
            name = f"preemption policy '{type(self._preemption).__name__}'"
            raise blame(error, name, f"in {question.__name__}, step {self.index}") from error

    def _donor(self, live: LiveRequest) -> LiveRequest | None:
        """Who lends its prompt to a waiting sequence of the same parent: one that has computed all of it."""
        # With its own output in the prefix cache it does better, and compressed KV is changed where it lies.
        if live.host or live.keep is not None or (live.output and self._pool.prefix_cache):
            return None
        for other in live.group:
            # What was admitted in this very step may get its blocks' content in it: too late to copy from.
            if (
                other.status == "running"
                and other.now().computed >= live.prompt_tokens
                and all(other is not fresh for fresh in self.admitted)
            ):
                return other
        return None

    def _extend(self, live: LiveRequest, tokens: int, *, begun: bool = False) -> None:
        """Take blocks for the first `tokens` tokens and publish those that this step completes.

        `begun`: content is copied to where the first block that is taken begins.
        """
        pool, now, size, user = self._pool, self.now, self._pool.block_size, live.request
        table = live.table
        blocks = table.blocks
        wanted = -(-tokens // size)
        missing = wanted - len(blocks)
        if not pool.prefix_cache:
            if missing > 0:
                pool.grow(table, missing, now)
            return
        full = tokens // size
        # What is copied may end within a block: a cached block with all of that content must not be taken for it,
        # since the copy would overwrite its end.
        knowable = min(wanted, full if begun else live.known // size)
        if table.sealed:
            if pool.unknown(live.chain.runs(table.published, knowable), table):
                if missing > 0:
                    pool.grow(table, missing, now)
                pool.publish_runs(table, live.chain.runs(table.published, full))
                return
            pool.open(table)
        keys = live.chain.upto(knowable)
        while len(blocks) < wanted:
            depth = len(blocks)
            key = keys[depth + 1] if depth < knowable else None
            blocks.append(pool.take(now, key, blocks[-1] if depth else None, user))
        pool.publish_next(table, live.chain, full, now, user)

    def _hits(self, live: LiveRequest) -> list[Block]:
        """Cached leading blocks; at least the last known token is left to compute, since its logits are needed."""
        pool = self._pool
        if live.blocks and live.status == "waiting":  # its KV came from another replica
            return live.blocks
        if live.group and live.status == "waiting" and (donor := self._donor(live)) is not None:
            return donor.blocks[: self._ready(live, []) // pool.block_size]
        if not pool.prefix_cache:
            return []
        limit = pool.most_hits(live.known)
        if not limit or pool.find(live.chain.upto(1)[1]) is None:
            return []
        return pool.match(live.chain.upto(limit), limit)

    def _held(self, live: LiveRequest, tokens: int) -> int:
        """Tokens of KV that a request holds at most while it computes up to its `tokens`-th."""
        return min(tokens - live.dropped, live.peak)

    def _cost(self, held: int, tokens: int, hits: list[Block]) -> int:
        """Blocks that leave `available` when a table of `held` blocks grows to hold `tokens` tokens."""
        fresh = -(-tokens // self._pool.block_size) - held
        return max(fresh, 0) + (sum([block.refs == 0 for block in hits]) if hits else 0)

    def _find(self, request: RequestView | RequestId, call: str) -> LiveRequest:
        name = request if isinstance(request, str) else request.id
        live = self._requests.get(name)
        if live is None or live.status == "ended":
            state = "has ended" if live else "is not in the engine (it ended, or never came)"
            self._fail(f"{call}('{name}'): the request {state}")
        return live.now()

    def _misuse(self, call: str, live: LiveRequest, why: str) -> NoReturn:
        self._fail(f"{call}({live.view!r}): {why}")

    def _fail(self, what: str) -> NoReturn:
        frame = sys._getframe()  # compiled code has none
        while frame.f_back is not None and _CONTROL in frame.f_code.co_filename:
            frame = frame.f_back
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        raise PolicyError(f"policy '{self._policy}', step {self.index}: {what}, at {where}")
