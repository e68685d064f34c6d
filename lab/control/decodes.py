"""Decodes in steady state, kept as aggregates: a step costs what changed in it, not what runs. State path.

A request that has nothing to compute but its next token does the same in every step: one token, and every
`block_size` steps a block. So they advance by one common clock, the number of times that they were granted all
together (`Step.run_decodes`). Buckets by clock say who ends next and who needs a block next; a request's own
counters are derived when somebody looks (`LiveRequest.sync`), and its tokens' times are a stretch of the clock's.

With `bulk=False` every request is touched in every step. Both ways take the same decisions, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

from lab.control.plan import Decoding, Work, weight
from lab.control.request import BlockId, RequestId
from lab.state.blocks import BlockPool

if TYPE_CHECKING:
    from lab.control.live import LiveRequest

_FORGET = 1 << 16
"""Grants after which every member is brought up to date, and another stretch of times begins."""

_NOBODY: Mapping[RequestId, LiveRequest] = {}


class Decodes:
    """The running requests in steady decode, in order of joining; and of all others that run, `others`."""

    def __init__(self, block_size: int, bulk: bool) -> None:
        self.bulk = bulk
        self.members: dict[RequestId, LiveRequest] = {}
        self.others: dict[RequestId, LiveRequest] = {}
        """Running requests that aren't members, in order of admission."""
        self.granted = False
        """Whether the step being built, or in flight, has a token for every member."""
        self.clock = 0
        """Grants committed."""
        self.times: list[int] = []
        self.steps: list[int] = []
        """When each grant was committed, and of which step it was; the first is grant number `base`."""
        self.base = 0
        self.aborting: list[LiveRequest] = []
        self._size = block_size
        self._context = 0
        self._marks = self._starts = 0
        self._ending: dict[int, dict[RequestId, LiveRequest]] = {}
        self._by_block: dict[int, dict[RequestId, LiveRequest]] = {}
        """Members by the clock, modulo the block size, at which they need a block; as many buckets as are in use."""
        self._joins = 0
        self._longest: int | None = 0
        """Most computed tokens of a member, less the clock; None when it has to be looked for."""

    def __len__(self) -> int:
        return len(self.members)

    # -- coming and going ------------------------------------------------------------------------------

    def join(self, live: LiveRequest) -> None:
        """A running request has nothing left but its next token, and will have until its last."""
        name = live.request.id
        self.others.pop(name, None)
        self._joins += 1
        live.steady = self._joins
        self.members[name] = live
        if not self.bulk:
            return
        clock = self.clock
        live.decodes, live.since = self, clock
        offset = live.computed - clock
        mark = live.mark or weight(name)
        live.mark = mark
        self._context += live.computed
        self._marks += mark
        self._starts += mark * live.computed
        last = clock + live.request.output_limit - (live.known - live.prompt_tokens) - 1
        self._ending.setdefault(last, {})[name] = live
        self._by_block.setdefault(-offset % self._size, {})[name] = live
        if self._longest is not None:
            self._longest = max(self._longest, offset) if len(self.members) > 1 else offset

    def leave(self, live: LiveRequest) -> None:
        """It is granted on its own, preempted, or ends."""
        name = live.request.id
        del self.members[name]
        live.steady = 0
        if not self.bulk:
            return
        live.sync()
        live.decodes = None
        clock = self.clock
        offset = live.computed - clock
        mark = live.mark
        self._context -= live.computed
        self._marks -= mark
        self._starts -= mark * live.computed
        last = clock + live.request.output_limit - (live.known - live.prompt_tokens) - 1
        ending = self._ending.get(last)
        if ending is not None:  # else it ends at this very clock
            ending.pop(name, None)
            if not ending:
                del self._ending[last]
        residue = -offset % self._size
        del self._by_block[residue][name]
        if not self._by_block[residue]:
            del self._by_block[residue]
        if offset == self._longest:
            self._longest = None

    def drop(self, live: LiveRequest) -> None:
        """A request doesn't run any more."""
        if live.steady:
            self.leave(live)
        else:
            self.others.pop(live.request.id, None)

    # -- one step --------------------------------------------------------------------------------------

    @property
    def needed(self) -> int:
        """Blocks that the next grant takes."""
        if self.bulk:
            return len(self._by_block.get(self.clock % self._size, ()))
        return sum(live.computed % self._size == 0 for live in self.members.values())

    def take(self, pool: BlockPool, now: int) -> list[tuple[RequestId, tuple[BlockId, ...]]]:
        """The blocks of the next grant; those that it fills are published. The caller has seen that there are."""
        size = self._size
        if self.bulk:
            needing = self._by_block.get(self.clock % size, _NOBODY).values()
            filling = self._by_block.get((self.clock + 1) % size, _NOBODY).values()
        else:
            members = self.members.items()
            needing = {n: live for n, live in members if live.computed % size == 0}.values()
            filling = {n: live for n, live in members if (live.computed + 1) % size == 0}.values()
        taken: list[tuple[RequestId, tuple[BlockId, ...]]] = []
        if needing:
            blocks = iter(pool.take_run(len(needing), now))
            for live in needing:
                block, table = next(blocks), live.table
                if not table.sealed:
                    block.clear(1)
                table.blocks.append(block)
                taken.append((live.request.id, (block.id,)))
        if pool.prefix_cache:
            for live in filling:
                table = live.table
                if not table.goes_on(live.chain.endless):
                    pool.publish_next(table, live.chain, table.published + 1, now, live.request)
        return taken

    def peek(self, pool: BlockPool, taken: Sequence[tuple[RequestId, tuple[BlockId, ...]]] = ()) -> Decoding:
        """The sums of the next grant, with the blocks that it has `taken`."""
        seqs, clock = len(self.members), self.clock
        if self._longest is None:
            self._longest = max(
                (live.computed - live.since for live in self.members.values()), default=-clock
            )
        context, longest = self._context + seqs, self._longest + clock + 1
        reread = pool.reread * self._size
        return Decoding(seqs, context, longest, self._marks, self._starts, tuple(taken), reread)

    def listing(self, decoding: Decoding) -> list[Work]:
        """The work items of the grant in flight."""
        taken = dict(decoding.blocks)
        clock = self.clock
        return [
            Work(name, live.computed + clock - live.since, 1, True, taken.get(name, ()))
            for name, live in self.members.items()
        ]

    def advance(self, step: int, now: int) -> list[LiveRequest]:
        """The grant is committed. Returns the members that end with it, in order of joining."""
        self.granted = False
        self.times.append(now)
        self.steps.append(step)
        self._context += len(self.members)
        self._starts += self._marks
        ended = self._ending.pop(self.clock, None)
        self.clock += 1
        if len(self.times) > _FORGET:
            self._forget()
        if not self.aborting:
            return [] if ended is None else sorted(ended.values(), key=_joined)
        ending = {**(ended or {}), **{live.request.id: live for live in self.aborting}}
        self.aborting.clear()
        return sorted(ending.values(), key=_joined)

    def check(self, running: Mapping[RequestId, LiveRequest]) -> None:
        """The sums, against every member looked at. Raises AssertionError."""
        members = self.members.values()
        assert self.members.keys() | self.others.keys() == running.keys(), "a running request is in no table"
        assert not self.members.keys() & self.others.keys(), "a running request is in two tables"
        if not self.bulk:
            return
        assert self._context == sum(live.computed for live in members)
        assert self._marks == sum(map(weight, self.members))
        assert self._starts == sum(weight(name) * live.computed for name, live in self.members.items())
        for live in members:
            assert live.known == live.computed + 1, f"{live.view!r} isn't in steady decode"

    def _forget(self) -> None:
        for live in self.members.values():
            live.sync()
        self.times = []  # requests still refer to the one before
        self.steps.clear()
        self.base = self.clock


def _joined(live: LiveRequest) -> int:
    return live.steady


class WorkList(Sequence[Work]):
    """A plan's work: its decodes, listed only if somebody asks while the plan is in flight, then `items`."""

    __slots__ = ("_decodes", "_decoding", "_list", "items")

    def __init__(self, items: tuple[Work, ...], decoding: Decoding, decodes: Decodes | None) -> None:
        self.items = items
        self._decoding, self._decodes = decoding, decodes
        self._list: tuple[Work, ...] | None = None

    def listed(self) -> tuple[Work, ...]:
        """All items. Raises `RuntimeError` when nobody asked before the plan was committed."""
        if self._list is None:
            if self._decodes is None:
                raise RuntimeError(
                    "the work of this plan wasn't listed before its commit; ask for it while it is in flight"
                )
            self._list = (*self._decodes.listing(self._decoding), *self.items)
        return self._list

    def close(self) -> None:
        """The plan is committed: what wasn't listed can't be any more."""
        self._decodes = None

    def __len__(self) -> int:
        return self._decoding.seqs + len(self.items)

    @overload
    def __getitem__(self, index: int) -> Work: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Work]: ...
    def __getitem__(self, index: int | slice) -> Work | Sequence[Work]:
        return self.listed()[index]

    def __iter__(self) -> Iterator[Work]:
        return iter(self.listed())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.listed() == tuple(other)

    def __hash__(self) -> int:
        return hash(self.listed())

    def __repr__(self) -> str:
        return f"WorkList({self._decoding.seqs} decodes, {self.items})"
