"""The KV block pool: who holds which block, what content is reusable, what goes when room is needed.

State path, control plane. Every block is in exactly one of three states:

    free      holds nothing of use; taken first
    cached    unreferenced, its content can be hit, can be evicted
    held      referenced by one or more requests (and findable, if its content was published)

so free + cached + held = total, always (`check` says so in code). Content is published when the step that
will compute it is planned, so two equal prompts in one step share. Chains are released tail first: when
room runs short, a prompt loses its end before its beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lab.errors import ConfigError, PolicyError
from lab.policy import BlockId, EvictionPolicy, Request


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


class BlockPool:
    """Reference-counted KV blocks with a content index. `eviction` chooses victims; the pool commits."""

    def __init__(
        self, blocks: int, block_size: int, eviction: EvictionPolicy, *, prefix_cache: bool = True
    ) -> None:
        if blocks < 1:
            raise ConfigError(f"kv.blocks is {blocks}; expected at least 1 block")
        if block_size < 1:
            raise ConfigError(f"kv.block_size is {block_size}; expected at least 1 token")
        self.total, self.block_size, self.prefix_cache = blocks, block_size, prefix_cache
        self._eviction = eviction
        self._leaf_only = eviction.leaf_only
        # A subclass may have hooks of its own, and they want to be called.
        self.by_release = bool(vars(type(eviction)).get("by_release"))
        """The victim is whoever was let go first: the pool keeps that order, and calls no hook."""
        self._order: deque[list[Block]] = deque()
        """Chains in the order of their release, each to be taken from its end; who is held again is passed over."""
        self.expires = type(eviction).expired is not EvictionPolicy.expired
        self._blocks: list[Block] = []
        """Those that were ever taken, by id: the rest of a large pool costs nothing."""
        self._free: deque[Block] = deque()
        """Free blocks that were taken before; they are taken again after the untouched ones."""
        self._index: dict[bytes, Block] = {}
        self.cached = 0
        """Blocks that are unreferenced but reusable."""
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

    def keys(self) -> frozenset[bytes]:
        """A copy of what can be hit now."""
        return frozenset(self._index)

    def find(self, key: bytes) -> Block | None:
        """The block whose content has this key, if there is one."""
        return self._index.get(key)

    def match(self, keys: Sequence[bytes], limit: int) -> list[Block]:
        """The longest cached prefix of `keys[1:]`, at most `limit` blocks. Changes nothing."""
        found: list[Block] = []
        index = self._index
        for key in keys[1 : limit + 1]:
            block = index.get(key)
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

    def take(
        self, now: int, key: bytes | None = None, parent: Block | None = None, user: Request | None = None
    ) -> Block:
        """One block to write into, behind `parent` in its table. The caller has checked `available`.

        With `key`, an unreferenced block that already has that content is taken in its place (its prefix
        was lost, or its last token must be computed again), so that a content is never cached twice.
        """
        self.allocated += 1
        if key is not None and (same := self._index.get(key)) is not None and same.refs == 0:
            self._reference(same, now)
            same.user = user
            if same.parent is not None and same.parent is not parent:
                self._link(same, None, now)
            return same
        if len(self._blocks) < self.total:
            block = Block(len(self._blocks))
            self._blocks.append(block)
        else:
            block = self._free.popleft() if self._free else self.evict(now)
        block.refs = 1
        return block

    def take_run(self, count: int, now: int) -> list[Block]:
        """As many blocks as `count` calls of `take` without a key would give, in the same order."""
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
            order, index = self._order, self._index
            chain = order[0]
            while count:
                while not chain:
                    order.popleft()
                    chain = order[0]
                part = chain[: -count - 1 : -1]
                del chain[-count:]
                for block in part:
                    if block.released is chain:  # else it is held again, or was let go again with others
                        del index[block.key]
                        block.key = b""
                        block.user = None
                        taken.append(block)
                count = wanted - len(taken)
        for block in taken:
            block.refs = 1
        return taken

    def publish_run(
        self,
        chain: Sequence[Block],
        keys: Sequence[bytes],
        first: int,
        last: int,
        user: Request | None = None,
    ) -> None:
        """`publish` blocks `first .. last` of a table whose keys are known to be nobody else's."""
        wanted, blocks = keys[first + 1 : last + 1], chain[first:last]
        self._index.update(zip(wanted, blocks, strict=True))
        depth = first
        for block, key in zip(blocks, wanted, strict=True):
            block.key = key
            block.depth = depth
            block.user = user
            depth += 1

    def unknown(self, keys: Sequence[bytes]) -> bool:
        """Whether no block has any of these contents."""
        return self._index.keys().isdisjoint(keys)

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
            if keys[depth + 1] in self._index:
                return
            block.key, block.depth, block.user = keys[depth + 1], depth, user
            self._index[block.key] = block
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

    def release(self, chain: Sequence[Block], now: int) -> None:
        """Let go of a request's blocks, given in chain order; the tail goes first."""
        if self.by_release:
            self._release_run(chain)
            return
        for block in reversed(chain):
            block.refs -= 1
            if block.refs:
                continue
            self.released += 1
            block.used = self.released
            if block.key:
                self.cached += 1
                self._maybe_candidate(block, now)
            else:
                self._free.append(block)

    def _release_run(self, chain: Sequence[Block]) -> None:
        """The same where the pool keeps the order of release itself."""
        gone: list[Block] = []
        empty: list[Block] = []
        for block in chain:
            block.refs -= 1
            if not block.refs:
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
            return self.take_run(1, now)[0]
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

    def _candidate(self, choice: BlockId) -> Block:
        """The block that the eviction policy named, if it may go."""
        known = isinstance(choice, int) and 0 <= choice < len(self._blocks)
        block = self._blocks[choice] if known else None
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

    def _maybe_candidate(self, block: Block, now: int) -> None:
        if not (self._leaf_only and block.children):
            block.candidate = True
            self._eviction.on_evictable(block, now)

    def _forget(self, block: Block, now: int) -> None:
        del self._index[block.key]
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

    def check(self, tables: Sequence[Sequence[Block]]) -> None:
        """Conservation, against the block tables of every live request. Raises AssertionError with the facts."""
        expected: dict[BlockId, int] = {}
        for table in tables:
            for block in table:
                expected[block.id] = expected.get(block.id, 0) + 1
        held = cached = 0
        for block in self._blocks:
            wanted = expected.get(block.id, 0)
            assert block.refs == wanted, f"{block} is in {wanted} block tables"
            held += block.refs > 0
            cached += block.refs == 0 and bool(block.key)
            assert not block.key or self._index[block.key] is block, f"{block} is not what the index finds"
            leaf = block.refs == 0 and bool(block.key) and not (self._leaf_only and block.children)
            leaf = leaf and not self.by_release
            assert block.candidate == leaf, f"{block}: candidate is {block.candidate}, expected {leaf}"
        assert self.cached == cached, f"{cached} blocks are cached, the pool counts {self.cached}"
        assert self.free + cached + held == self.total, (
            f"free {self.free} + cached {cached} + held {held} != {self.total}"
        )
        assert len(self._index) == sum(bool(block.key) for block in self._blocks)
