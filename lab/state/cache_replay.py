"""`backend=cache`: the block accesses of a trace, in order, through the real pool and eviction policy.

No engine and no time: requests come one after another, and each uses the blocks of its prompt, tail first.
The last block of a prompt counts as the block it begins, as in traces that name blocks (Mooncake); of literal
tokens only full blocks count. Hits are prefix hits: the leading blocks that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lab.control.request import Prompt, Request, Segment
from lab.errors import RequestRefused
from lab.policy import EvictionPolicy
from lab.state.blocks import BlockPool
from lab.state.prefix import ContentChain


@dataclass(slots=True)
class CacheStudy:
    """Counts of one replay."""

    requests: int = 0
    accesses: int = 0
    hits: int = 0
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
    def hit_ratio_tokens(self) -> float:
        """Cached prompt tokens per prompt token."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def replay_accesses(
    requests: Iterable[Request],
    eviction: EvictionPolicy,
    *,
    blocks: int,
    block_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> CacheStudy:
    """Run all requests' prompts through a pool. Raises `RequestRefused` for one longer than the cache."""
    pool = BlockPool(blocks, block_size, eviction)
    study = CacheStudy()
    for now, request in enumerate(requests):
        prompt = _whole_blocks(request.prompt, block_size)
        count = len(prompt) // block_size
        if count > blocks:
            raise RequestRefused(
                request.id, "its prompt is longer than the cache", needed=count, available=blocks
            )
        keys = ContentChain(prompt, block_size, request.cache_salt, (), None).upto(count)
        hits = len(pool.match(keys, count))
        if eviction.leaf_only:
            _touch_chain(pool, keys, hits, count, now)
        else:
            _touch_each(pool, keys, count, now)
        study.requests += 1
        study.accesses += count
        study.hits += hits
        study.tokens += len(request.prompt)
        study.hit_tokens += min(hits * block_size, len(request.prompt))
        study.peak_blocks = max(study.peak_blocks, pool.cached)
        progress(study.requests)
    study.evictions = pool.evicted
    return study


def _touch_each(pool: BlockPool, keys: Sequence[bytes], count: int, now: int) -> None:
    """Use one block after another, tail first, holding none: the replay of cache papers and libCacheSim.

    A request may then push out its own head, which an engine, where a request pins its blocks, never does.
    """
    for depth in reversed(range(count)):
        block = pool.find(keys[depth + 1])
        if block is not None:
            pool.pin((block,), now)
        else:
            block = pool.take(now)
            pool.publish(block, None, keys, depth, now)
        pool.release((block,), now)


def _touch_chain(pool: BlockPool, keys: Sequence[bytes], hits: int, count: int, now: int) -> None:
    """Hold the whole chain at once, as an engine does: leaf-only eviction needs parents before children."""
    chain = pool.match(keys, hits)
    pool.pin(chain, now)
    for depth in range(hits, count):
        chain.append(pool.take(now, keys[depth + 1]))
        pool.publish(chain[depth], chain[depth - 1] if depth else None, keys, depth, now)
    pool.release(chain, now)


def _whole_blocks(prompt: Prompt, block_size: int) -> Prompt:
    """The prompt with a synthetic last piece stretched to the end of its block."""
    last, missing = prompt.pieces[-1], -len(prompt) % block_size
    if not missing or not isinstance(last, Segment):
        return prompt
    return Prompt((*prompt.pieces[:-1], replace(last, length=last.length + missing)))
