"""The KV block pool: who holds which block, what content is reusable, what goes when room is needed.

State path, control plane. Every block is in exactly one of three states:

    free      holds nothing of use; taken first
    cached    unreferenced, its content can be hit, can be evicted
    held      referenced by one or more requests (and findable, if its content was published)

so free + cached + held = total, always (`check` says so in code). Content is published when the step that
will compute it is planned, so two equal prompts in one step share. Chains are released tail first: when
room runs short, a prompt loses its end before its beginning.

Most content is one request's own. So what a request takes and publishes, and nobody else has touched, is kept as
the `Table` that it stands in and a few runs of keys, whatever its length: such a table is *sealed*, and its blocks
say nothing themselves. The first look at any of its content opens it, and each block speaks for itself from then on.
Only where the victim is whoever was let go first are tables sealed: all other eviction policies watch each block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from lab.errors import ConfigError, PolicyError
from lab.policy import BlockId, EvictionPolicy, Request
from lab.state.prefix import ContentChain, Run, key_of, keys_of, split


class Block:
    """One KV block's bookkeeping; policies see it as `lab.policy.BlockView`."""

    __slots__ = (
        "candidate", "children", "depth", "id", "key", "parent", "refs", "released", "used", "user"
    )  # fmt: skip

    def __init__(self, block_id: BlockId) -> None:
        self.id = block_id
        self.key = b""
        """Content key; empty while nothing is published."""
        self.depth = 0
        self.refs = 0
        self.used = 0
        """Pool-wide count of releases when this block was last let go: a total order of last use."""
        self.user: Request | None = None
        """The request that used this content last."""
        self.parent: Block | None = None
        self.children = 0
        """Cached blocks that continue this one (kept only for leaf-only eviction)."""
        self.candidate = False
        self.released: list[Block] | None = None
        """The chain that it was let go with (kept only where the pool itself keeps the order of release)."""

    def __repr__(self) -> str:
        return f"Block({self.id}, refs={self.refs}, depth={self.depth}, key={self.key.hex()[:8] or None})"

    def clear(self, refs: int) -> None:
        """It holds nothing yet, for so many."""
        self.key, self.depth, self.refs = b"", 0, refs
        self.user = self.released = None


class Table:
    """A request's block table. While it is `sealed`, only the first `opened` of its blocks speak for themselves."""

    __slots__ = ("blocks", "depth", "held", "opened", "published", "runs", "sealed", "user")

    def __init__(self, hits: Iterable[Block] = (), sealed: bool = False, user: Request | None = None) -> None:
        self.blocks = list(hits)
        self.published = self.opened = len(self.blocks)
        """Leading blocks whose content is published."""
        self.sealed, self.held, self.user = sealed, True, user
        self.depth = 0
        """Where its first block stands in its content: not 0 where others were cut off as it was let go."""
        self.runs: list[SealedRun] = []
        """The keys of the blocks from `opened` up to `published`."""

    def goes_on(self, base: bytes | None) -> bool:
        """Publish one more block, if its key is known to be the next of the last run. `base`: what it begins with."""
        if not self.sealed or base is None or not self.runs:
            return False
        last = self.runs[-1]
        if last.base is not base:
            return False
        last.count += 1
        self.published += 1
        return True


class SealedRun:
    """Published blocks of a sealed table whose keys differ in their number alone."""

    __slots__ = ("base", "count", "first", "table")

    def __init__(self, base: bytes, first: int, count: int, table: Table) -> None:
        self.base, self.first, self.count, self.table = base, first, count, table


_Entry: TypeAlias = SealedRun | dict[int, Block]
"""The blocks whose keys have one base: all in one sealed table, or each by its number."""


class BlockPool:
    """Reference-counted KV blocks with a content index. `eviction` chooses victims; the pool commits."""

    def __init__(
        self,
        blocks: int,
        block_size: int,
        eviction: EvictionPolicy,
        *,
        prefix_cache: bool = True,
        last_block: bool = True,
    ) -> None:
        """`last_block`: who finds all of its tokens cached still computes the last block of them; else it takes that
        one too, and computes its last token in place."""
        if blocks < 1:
            raise ConfigError(f"kv.blocks is {blocks}; expected at least 1 block")
        if block_size < 1:
            raise ConfigError(f"kv.block_size is {block_size}; expected at least 1 token")
        self.total, self.block_size, self.prefix_cache = blocks, block_size, prefix_cache
        self._left_out = int(last_block)
        self._eviction = eviction
        self._leaf_only = eviction.leaf_only
        # A subclass may have hooks of its own, and they want to be called.
        self.by_release = bool(vars(type(eviction)).get("by_release"))
        """The victim is whoever was let go first: the pool keeps that order, and calls no hook."""
        self._order: deque[Table | list[Block]] = deque()
        """Chains in the order of their release, each to be taken from its end; who is held again is passed over."""
        self.expires = type(eviction).expired is not EvictionPolicy.expired
        self._blocks: list[Block] = []
        """Those that were ever taken, by id: the rest of a large pool costs nothing."""
        self._free: deque[Block] = deque()
        """Free blocks that were taken before; they are taken again after the untouched ones."""
        self._index: dict[bytes, _Entry] = {}
        """What is published, by the base of its key."""
        self.cached = 0
        """Blocks that are unreferenced but reusable."""
        self.reread = 0
        """References to blocks beyond the first to each: what several requests share, and each of them reads."""
        self.allocated = self.evicted = self.released = 0
        """Running counts of blocks taken (fresh, not hit), evicted, and let go by their last holder."""
        eviction.on_open(blocks, block_size)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return self.total - len(self._blocks) + len(self._free)

    @property
    def available(self) -> int:
        """Blocks that could be taken: free ones, and cached ones by eviction."""
        return self.free + self.cached

    @property
    def held(self) -> int:
        return self.total - self.available

    def most_hits(self, tokens: int) -> int:
        """Leading blocks that a request of so many known tokens may find in the cache."""
        return (tokens - self._left_out) // self.block_size

    def keys(self) -> frozenset[bytes]:
        """A copy of what can be hit now."""
        found: list[bytes] = []
        for base, entry in self._index.items():
            if isinstance(entry, SealedRun):
                found += keys_of(base, entry.first, entry.count)
            else:
                found += [key_of(base, number) for number in entry]
        return frozenset(found)

    def find(self, key: bytes) -> Block | None:
        """The block whose content has this key, if there is one."""
        base, number = split(key)
        entry = self._index.get(base)
        if isinstance(entry, SealedRun):
            self.open(entry.table)
            entry = self._index.get(base)
            assert isinstance(entry, dict)
        return None if entry is None else entry.get(number)

    def match(self, keys: Sequence[bytes], limit: int) -> list[Block]:
        """The longest cached prefix of `keys[1:]`, at most `limit` blocks. Changes nothing."""
        found: list[Block] = []
        for key in keys[1 : limit + 1]:
            block = self.find(key)
            if block is None:
                break
            found.append(block)
        return found

    # -- changing --------------------------------------------------------------------------------

    def pin(self, hits: Sequence[Block], now: int, user: Request | None = None) -> None:
        """Reference blocks whose content a request (`user`) found cached."""
        for block in hits:
            self._reference(block, now)
            block.user = user
            if not self.by_release:
                self._eviction.on_hit(block, now)

    def share(self, blocks: Sequence[Block], now: int, user: Request | None = None) -> None:
        """`pin` blocks that another request holds, even where they can't be found by their content."""
        for block in blocks:
            assert block.refs, f"{block} is held by nobody"
            if block.key:
                self.pin((block,), now, user)
            else:
                block.refs += 1
                self.reread += 1

    def take(
        self, now: int, key: bytes | None = None, parent: Block | None = None, user: Request | None = None
    ) -> Block:
        """One block to write into, behind `parent` in its table. The caller has checked `available`.

        With `key`, an unreferenced block that already has that content is taken in its place (its prefix
        was lost, or its last token must be computed again), so that a content is never cached twice.
        """
        if key is not None and (same := self.find(key)) is not None and same.refs == 0:
            self.allocated += 1
            self._reference(same, now)
            same.user = user
            if same.parent is not None and same.parent is not parent:
                self._link(same, None, now)
            return same
        if self.by_release:
            block = self.take_run(1, now)[0]
            block.clear(1)
            return block
        self.allocated += 1
        if len(self._blocks) < self.total:
            block = Block(len(self._blocks))
            self._blocks.append(block)
        else:
            block = self._free.popleft() if self._free else self.evict(now)
        block.refs = 1
        return block

    def take_run(self, count: int, now: int) -> list[Block]:
        """As many blocks as `count` calls of `take` without a key would give, in the same order.

        For a sealed table: what the blocks say themselves is out of date.
        """
        if not self.by_release:
            return [self.take(now) for _ in range(count)]
        taken: list[Block] = []
        wanted = count
        self.allocated += count
        blocks, free = self._blocks, self._free
        while count and len(blocks) < self.total:
            block = Block(len(blocks))
            blocks.append(block)
            taken.append(block)
            count -= 1
        while count and free:
            taken.append(free.popleft())
            count -= 1
        if count:
            self.evicted += count
            self.cached -= count
            order = self._order
            while count:
                first = order[0]
                chain = first.blocks if isinstance(first, Table) else first
                if not chain:
                    order.popleft()
                    continue
                part = chain[: -count - 1 : -1]
                del chain[-count:]
                if isinstance(first, Table) and first.sealed:
                    taken += part
                    self._shorten(first, len(part))
                else:
                    for block in part:
                        if block.released is chain:  # else it is held again, or was let go again with others
                            self._unlist(block.key)
                            taken.append(block)
                count = wanted - len(taken)
        return taken

    def grow(self, table: Table, count: int, now: int) -> None:
        """Append blocks to a table, as many calls of `take` without a key would."""
        taken = self.take_run(count, now)
        if not table.sealed:
            for block in taken:
                block.clear(1)
        table.blocks += taken

    def unknown(self, runs: Sequence[Run], table: Table) -> bool:
        """Whether no block has any of these contents, which come next in a sealed table."""
        for base, number, _ in runs:
            entry = self._index.get(base)
            if entry is not None and not (
                isinstance(entry, SealedRun) and entry.table is table and number == entry.first + entry.count
            ):
                return False
        return True

    def publish_runs(self, table: Table, runs: Sequence[Run]) -> None:
        """`publish` the next blocks of a sealed table, whose contents are `unknown`."""
        for base, number, count in runs:
            table.published += count
            entry = self._index.get(base)
            if isinstance(entry, SealedRun):
                entry.count += count
            else:
                self._index[base] = run = SealedRun(base, number, count, table)
                table.runs.append(run)

    def open(self, table: Table) -> None:
        """From now on each of the table's blocks speaks for itself."""
        if not table.sealed:
            return
        table.sealed = False
        position, blocks = table.opened, table.blocks
        for block in blocks[position:]:
            block.clear(int(table.held))
            block.released = None if table.held else blocks
        for run in table.runs:
            entry: dict[int, Block] = {}
            for offset, key in enumerate(keys_of(run.base, run.first, run.count)):
                block = blocks[position]
                block.key, block.depth, block.user = key, table.depth + position, table.user
                entry[run.first + offset] = block
                position += 1
            self._index[run.base] = entry
        table.runs = []

    def opened(self, table: Table) -> list[Block]:
        """The table's blocks, each of which speaks for itself from now on."""
        self.open(table)
        return table.blocks

    def publish(
        self,
        block: Block,
        parent: Block | None,
        keys: Sequence[bytes],
        depth: int,
        now: int,
        user: Request | None = None,
    ) -> None:
        """Make a held block findable as content `keys[depth + 1]`; the first holder of a content wins.

        `parent` is the block before it in the same table, `user` the request whose table it is.
        """
        if not block.key:
            if self.find(keys[depth + 1]) is not None:
                return
            block.key, block.depth, block.user = keys[depth + 1], depth, user
            base, number = split(block.key)
            entry = self._index.setdefault(base, {})
            assert isinstance(entry, dict)  # `find` opens
            entry[number] = block
            if not self.by_release:
                self._eviction.on_cached(block, now)
        # Only a parent in the same table is linked: it stays held as long as its child is. (It is another
        # block where somebody else published the parent's content first.)
        if (
            self._leaf_only
            and parent is not None
            and parent is not block.parent
            and parent.key == keys[depth]
        ):
            self._link(block, parent, now)

    def publish_next(
        self, table: Table, chain: ContentChain, last: int, now: int, user: Request | None = None
    ) -> None:
        """`publish` the blocks of a table that aren't yet, up to its `last`-th."""
        if table.sealed:
            runs = chain.runs(table.published, last)
            if self.unknown(runs, table):
                self.publish_runs(table, runs)
                return
            self.open(table)
        keys = chain.upto(last)
        while table.published < last:
            depth = table.published
            blocks = table.blocks
            self.publish(blocks[depth], blocks[depth - 1] if depth else None, keys, depth, now, user)
            table.published += 1

    def release(self, given: Table | Sequence[Block], now: int) -> None:
        """Let go of a request's blocks, given in chain order; the tail goes first. A `Table` is given away."""
        chain = given.blocks if isinstance(given, Table) else given
        if self.by_release:
            if isinstance(given, Table) and given.sealed:
                chain = self._release_sealed(given)
            if chain:
                self._release_run(chain)
            return
        for block in reversed(chain):
            block.refs -= 1
            if block.refs:
                self.reread -= 1
                continue
            self.released += 1
            block.used = self.released
            if block.key:
                self.cached += 1
                self._maybe_candidate(block, now)
            else:
                self._free.append(block)

    def _release_sealed(self, table: Table) -> list[Block]:
        """Let go of what is the table's own; returns what isn't."""
        blocks, opened = table.blocks, table.opened
        others, unpublished = blocks[:opened], blocks[table.published :]
        self.released += len(blocks) - opened
        if unpublished:
            unpublished.reverse()
            self._free.extend(unpublished)
            del blocks[table.published :]
        if opened:
            del blocks[:opened]
        left = len(blocks)
        table.depth, table.opened, table.published, table.held = opened, 0, left, False
        if left:
            self.cached += left
            self._order.append(table)
        return others

    def _shorten(self, table: Table, count: int) -> None:
        """As many blocks are gone from the end of a sealed table that was let go."""
        table.published -= count
        while count:
            run = table.runs[-1]
            if run.count > count:
                run.count -= count
                return
            count -= run.count
            del self._index[run.base]
            table.runs.pop()

    def _unlist(self, key: bytes) -> None:
        """Content isn't to be found any more."""
        base, number = split(key)
        entry = self._index[base]
        assert isinstance(entry, dict), "a block of its own stands in a sealed table"
        del entry[number]
        if not entry:
            del self._index[base]

    def _release_run(self, chain: Sequence[Block]) -> None:
        """The same where the pool keeps the order of release itself."""
        gone: list[Block] = []
        empty: list[Block] = []
        for block in chain:
            block.refs -= 1
            if block.refs:
                self.reread -= 1
            else:
                if block.key:
                    block.released = gone
                    gone.append(block)
                else:
                    empty.append(block)
        self.released += len(gone) + len(empty)
        self._free.extend(reversed(empty))
        if gone:
            self.cached += len(gone)
            self._order.append(gone)

    def evict(self, now: int) -> Block:
        """Give up the eviction policy's victim and return it empty."""
        if self.by_release:
            self.allocated -= 1  # counted by whoever takes
            block = self.take_run(1, now)[0]
            block.clear(1)
            return block
        block = self._candidate(self._eviction.victim(now))
        self._drop(block, now)
        return block

    def expire(self, now: int) -> None:
        """Free what the eviction policy calls expired; costs nothing under a policy without a time limit."""
        if self.expires:
            for expired in self._eviction.expired(now):
                block = self._candidate(expired)
                self._drop(block, now)
                self._free.append(block)

    # -- inside ----------------------------------------------------------------------------------

    def _candidate(self, choice: object) -> Block:
        """The block that the eviction policy named, if it may go."""
        block = None
        if isinstance(choice, int) and 0 <= choice < len(self._blocks):
            block = self._blocks[choice]
        if block is None or not block.candidate:
            raise PolicyError(
                f"eviction policy '{type(self._eviction).__name__}' chose block {choice!r}, which is not a "
                f"candidate ({block!r}); expected one announced by on_evictable and not pinned or dropped since"
            )
        return block

    def _drop(self, block: Block, now: int) -> None:
        self.evicted += 1
        self.cached -= 1
        self._forget(block, now)

    def _reference(self, block: Block, now: int) -> None:
        block.refs += 1
        if block.refs == 1:
            self.cached -= 1
            block.released = None
            if block.candidate:
                block.candidate = False
                self._eviction.on_pinned(block, now)
        else:
            self.reread += 1

    def _maybe_candidate(self, block: Block, now: int) -> None:
        if not (self._leaf_only and block.children):
            block.candidate = True
            self._eviction.on_evictable(block, now)

    def _forget(self, block: Block, now: int) -> None:
        self._unlist(block.key)
        block.candidate = False
        self._eviction.on_dropped(block, now)
        block.key, block.children, block.user = b"", 0, None
        self._link(block, None, now)

    def _link(self, block: Block, parent: Block | None, now: int) -> None:
        """Set a block's cached parent; one that loses its last child may become a candidate."""
        before, block.parent = block.parent, parent
        if parent is not None:
            parent.children += 1
        if before is not None:
            before.children -= 1
            if before.refs == 0 and not before.candidate:
                self._maybe_candidate(before, now)

    def check(self, tables: Sequence[Table | Sequence[Block]]) -> None:
        """Conservation, against the block tables of every live request. Raises AssertionError with the facts."""
        expected: dict[BlockId, int] = {}
        for each in tables:
            for block in each.blocks if isinstance(each, Table) else each:
                expected[block.id] = expected.get(block.id, 0) + 1
        shut = [table for table in (*tables, *self._order) if isinstance(table, Table) and table.sealed]
        silent = {block.id for block in self._free}
        listed = cached = 0
        for table in shut:
            own = table.blocks[table.opened :]
            assert silent.isdisjoint(block.id for block in own), (
                f"a block of {table.user} has another place too"
            )
            silent.update(block.id for block in own)
            assert all(expected.get(block.id, 0) == table.held for block in own)
            assert table.published == table.opened + sum(run.count for run in table.runs) <= len(table.blocks)
            assert all(self._index[run.base] is run and run.table is table for run in table.runs)
            listed += len(table.runs)
            cached += 0 if table.held else len(table.blocks)
        held = len(expected)
        again = sum(expected.values()) - held
        assert self.reread == again, (
            f"{again} references are further ones to a block, the pool counts {self.reread}"
        )
        for block in self._blocks:
            wanted = expected.get(block.id, 0)
            if block.id in silent:
                continue
            assert block.refs == wanted, f"{block} is in {wanted} block tables"
            assert block.refs or block.key, f"{block} is held by nobody, and not free"
            cached += block.refs == 0
            assert not block.key or self.find(block.key) is block, f"{block} is not what the index finds"
            leaf = block.refs == 0 and bool(block.key) and not (self._leaf_only and block.children)
            leaf = leaf and not self.by_release
            assert block.candidate == leaf, f"{block}: candidate is {block.candidate}, expected {leaf}"
        assert self.cached == cached, f"{cached} blocks are cached, the pool counts {self.cached}"
        assert self.free + cached + held == self.total, (
            f"free {self.free} + cached {cached} + held {held} != {self.total}"
        )
        alone = [entry for entry in self._index.values() if isinstance(entry, dict)]
        assert len(self._index) == listed + len(alone), "the index knows of a sealed table that isn't there"
        keyed = sum(bool(block.key) for block in self._blocks if block.id not in silent)
        assert sum(map(len, alone)) == keyed, "the index knows of a block that isn't there"
        assert all(alone), "the index keeps an empty entry"
