"""`backend=cache`: the block accesses of a trace, in order, through the real pool and eviction policy.

No engine and no time: requests come one after another, and each uses the blocks of its prompt, tail first.
The last block of a prompt counts as the block it begins, as in traces that name blocks (Mooncake); of literal
tokens only full blocks count. Hits are prefix hits: the leading blocks that are there. Flat hits, which cache
papers count, are all that are there when they are used, reachable from the prompt's beginning or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lab.control.request import Prompt, Request, Segment
from lab.errors import RequestRefused
from lab.policy import EvictionPolicy
from lab.state.blocks import BlockPool
from lab.state.future import KnownFuture
from lab.state.prefix import ContentChain


@dataclass(slots=True)
class CacheStudy:
    """Counts of one replay."""

    requests: int = 0
    accesses: int = 0
    hits: int = 0
    flat_hits: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    peak_blocks: int = 0
    """Most blocks that ever held content."""

    @property
    def hit_ratio_blocks(self) -> float:
        """Hits per access."""
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def flat_hit_ratio(self) -> float:
        """Flat hits per access."""
        return self.flat_hits / self.accesses if self.accesses else 0.0

    @property
    def hit_ratio_tokens(self) -> float:
        """Cached prompt tokens per prompt token."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def replay_accesses(
    requests: Sequence[Request],
    eviction: EvictionPolicy,
    *,
    blocks: int,
    block_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> CacheStudy:
    """Run all requests' prompts through a pool. Raises `RequestRefused` for one longer than the cache.

    `now` is a request's arrival. Blocks that are never used cost nothing: `blocks` may be endless.
    """
    future: KnownFuture | None = None
    if eviction.needs_future:
        eviction.future = future = KnownFuture((), block_size)
        for request in requests:
            future.add(request.id, _keys(request, block_size))
    pool = BlockPool(blocks, block_size, eviction)
    study = CacheStudy()
    for request in requests:
        keys = _keys(request, block_size)
        count = len(keys) - 1
        if eviction.leaf_only and count > blocks:
            raise RequestRefused(
                request.id, "its prompt is longer than the cache", needed=count, available=blocks
            )
        pool.expire(request.arrival)
        hits = len(pool.match(keys, count))
        if eviction.leaf_only:
            if future is not None:
                future.passed(request.id)
            study.flat_hits += _touch_chain(pool, keys, hits, request)
        else:
            study.flat_hits += _touch_each(pool, keys, request, future)
        study.requests += 1
        study.accesses += count
        study.hits += hits
        study.tokens += len(request.prompt)
        study.hit_tokens += min(hits * block_size, len(request.prompt))
        study.peak_blocks = max(study.peak_blocks, pool.cached)
        progress(study.requests)
    study.evictions = pool.evicted
    return study


def _touch_each(pool: BlockPool, keys: Sequence[bytes], request: Request, future: KnownFuture | None) -> int:
    """Use one block after another, tail first, holding none: the replay of cache papers and libCacheSim.

    A request may then push out its own head, which an engine, where a request pins its blocks, never does.
    Returns the flat hits.
    """
    now, hits = request.arrival, 0
    for depth in reversed(range(len(keys) - 1)):
        key = keys[depth + 1]
        if future is not None:
            future.used(key)
        block = pool.find(key)
        if block is not None:
            hits += 1
            pool.pin((block,), now, request)
        else:
            block = pool.take(now)
            pool.publish(block, None, keys, depth, now, request)
        pool.release((block,), now)
    return hits


def _touch_chain(pool: BlockPool, keys: Sequence[bytes], hits: int, request: Request) -> int:
    """Hold the whole chain at once, as an engine does: leaf-only eviction needs parents before children.

    Returns the flat hits: as no block outlives its parent, they are the prefix hits.
    """
    now, chain = request.arrival, pool.match(keys, hits)
    pool.pin(chain, now, request)
    for depth in range(hits, len(keys) - 1):
        parent = chain[-1] if chain else None
        chain.append(pool.take(now, keys[depth + 1], parent, request))
        pool.publish(chain[depth], parent, keys, depth, now, request)
    pool.release(chain, now)
    return hits


def _keys(request: Request, block_size: int) -> list[bytes]:
    """Keys of the blocks that the prompt begins, behind the root's."""
    prompt = _whole_blocks(request.prompt, block_size)
    chain = ContentChain(prompt, block_size, request.cache_salt, (), None)
    return chain.upto(len(prompt) // block_size)


def _whole_blocks(prompt: Prompt, block_size: int) -> Prompt:
    """The prompt with a synthetic last piece stretched to the end of its block."""
    last, missing = prompt.pieces[-1], -len(prompt) % block_size
    if not missing or not isinstance(last, Segment):
        return prompt
    return Prompt((*prompt.pieces[:-1], replace(last, length=last.length + missing)))
