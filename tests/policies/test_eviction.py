"""What holds for every eviction policy under any traffic, and what each of the less usual ones is for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab import plugins
from lab.control.request import Request
from lab.errors import PolicyError
from lab.policy import NEVER, BlockId, EvictionPolicy
from lab.state.blocks import Block, BlockPool
from lab.state.future import KnownFuture
from lab.state.prefix import ContentChain
from policies.eviction.common import Queue
from policies.eviction.lru import Lru
from policies.eviction.ttl import Ttl
from policies.keyed_heap import KeyedHeap
from policies.scheduling.fcfs import Fcfs
from tests.control.harness import drain, engine, request
from tests.control.test_conservation import Case, cases, play
from tests.oracles.eviction_traces import ENDLESS, made, replay

NAMES = plugins.names("eviction")
SECOND = 1_000_000_000


def keys_of(user: Request, block_size: int = 1) -> list[bytes]:
    chain = ContentChain(user.prompt, block_size, user.cache_salt, (), None)
    return chain.upto(len(user.prompt) // block_size)


class Twice(BlockPool):
    """Asks for each victim a second time: choosing alone must change nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.by_release = False  # through the policy's own hooks, whatever it says

    def evict(self, now: int) -> Block:
        first = self._eviction.victim(now)
        assert self._eviction.victim(now) == first
        evicted = super().evict(now)
        assert evicted.id == first
        return evicted


def left_over(thing: object, path: str = "") -> dict[str, int]:
    """Sizes of all tables in a policy, by where they are."""
    if isinstance(thing, KeyedHeap | Queue):
        return {path: len(thing)}
    if isinstance(thing, dict | set | list | deque):
        inner = thing.values() if isinstance(thing, dict) else thing
        nested = [left_over(value, f"{path}[]") for value in inner if hasattr(value, "__dict__")]
        return {path: len(thing)} | {k: v for found in nested for k, v in found.items() if v}
    if isinstance(thing, tuple):
        return {k: v for i, value in enumerate(thing) for k, v in left_over(value, f"{path}[{i}]").items()}
    if hasattr(thing, "__dict__") and not isinstance(thing, type | KnownFuture):
        return {
            k: v for name, value in vars(thing).items() for k, v in left_over(value, f"{path}.{name}").items()
        }
    return {}


users = st.builds(
    lambda name, head, tail, tenant, session: made(
        f"r{name}", [*head, *(100 + t for t in tail)], block=1, tenant=tenant, session=session
    ),
    st.integers(0, 10**9),
    st.sampled_from([[], [1], [1, 2], [1, 2, 3], [4], [4, 5, 6, 7]]),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from(["", "s"]),
)
moves = st.lists(
    st.one_of(users, st.integers(0, 9), st.just("expire"), st.integers(1, 400).map(lambda s: (s,))),
    min_size=5,
    max_size=60,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves=moves, blocks=st.integers(3, 24))
def test_any_traffic_leaves_the_pool_whole_and_the_policy_empty(
    name: str, moves: list[Any], blocks: int
) -> None:
    """Users come (and pin, take, publish), go in any order, and time passes; then everything is dropped."""
    eviction: EvictionPolicy = plugins.create("eviction", name)
    arriving = [move for move in moves if isinstance(move, Request)]
    if eviction.needs_future:
        eviction.future = future = KnownFuture(arriving, 1)
    pool = Twice(blocks, 1, eviction)
    tables: list[list[Block]] = []
    now = 0
    for move in moves:
        if isinstance(move, Request):
            keys = keys_of(move)
            count = len(keys) - 1
            hits = pool.match(keys, count - 1)
            fresh = count - len(hits)
            if fresh + sum(block.refs == 0 for block in hits) > pool.available:
                continue
            if eviction.needs_future:
                future.passed(move.id)
            pool.pin(hits, now, move)
            for depth in range(len(hits), count):
                hits.append(pool.take(now, keys[depth + 1], hits[-1] if hits else None, move))
                pool.publish(hits[depth], hits[depth - 1] if depth else None, keys, depth, now, move)
            tables.append(hits)
        elif move == "expire":
            pool.expire(now)
        elif isinstance(move, int):
            if move < len(tables):
                pool.release(tables.pop(move), now)
        else:
            now += move[0] * SECOND
        pool.check(tables)
    while tables:
        pool.release(tables.pop(), now)
    while pool.cached:
        pool.release([pool.take(now) for _ in range(pool.available)], now)
        pool.check([])
    assert getattr(eviction, "_once", 0) == 0  # arc's count of T1
    for where, size in left_over(eviction, name).items():
        if "ghost" in where:
            assert size <= 3 * blocks, where
        elif name == "lfu_perfect" and where.endswith("_uses"):
            assert size <= len({key for user in arriving for key in keys_of(user)[1:]})
        elif where.endswith("_categories"):
            assert size <= 6, where
        else:
            assert size == 0, where


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_law_of_the_engine_holds_under_it(name: str, case: Case) -> None:
    eviction: EvictionPolicy = plugins.create("eviction", name)
    if eviction.needs_future:
        eviction.future = KnownFuture(case.arrivals, case.block_size)
    play(case, Fcfs(), eviction)


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("ttl", {"ttl_s": -1.0}, "ttl_s is -1.0; expected"),
        ("ttl", {"ttl_s": float("nan")}, "ttl_s is nan; expected"),
        ("2q", {"kin": 1.5}, "kin is 1.5; expected"),
        ("2q", {"kout": -0.1}, "kout is -0.1; expected"),
        ("s3fifo", {"small": 2.0}, "small is 2.0; expected"),
        ("s3fifo", {"ghost": -1.0}, "ghost is -1.0; expected"),
        ("s3fifo", {"promote": 0}, "promote is 0; expected"),
        ("gdsf", {"even": 0}, "even is 0; expected"),
        ("t_lru", {"spare": -1}, "spare is -1; expected"),
        ("workload_aware", {"window_s": 0.0}, "window_s is 0.0; expected"),
    ],
)
def test_a_bad_parameter_is_named(name: str, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        plugins.create("eviction", name, parameters)


# --- the pool's side -------------------------------------------------------------------------------------


def cached(pool: BlockPool, user: Request, now: int = 0) -> list[Block]:
    """Run a prompt through the pool; its blocks."""
    keys = keys_of(user, pool.block_size)
    chain = pool.match(keys, len(keys) - 1)
    pool.pin(chain, now, user)
    for depth in range(len(chain), len(keys) - 1):
        parent = chain[-1] if chain else None
        chain.append(pool.take(now, keys[depth + 1], parent, user))
        pool.publish(chain[depth], parent, keys, depth, now, user)
    pool.release(chain, now)
    return chain


def there(pool: BlockPool, user: Request) -> list[bool]:
    return [pool.find(key) is not None for key in keys_of(user, pool.block_size)[1:]]


def test_an_endless_pool_costs_what_is_used_of_it() -> None:
    pool = BlockPool(ENDLESS, 1, Lru())
    a, b = cached(pool, made("a", [1], block=1)), cached(pool, made("b", [2], block=1))
    assert (a[0].id, b[0].id, pool.free, pool.held) == (0, 1, ENDLESS - 2, 0)
    pool.check([])


def test_blocks_are_first_taken_in_order_of_id_and_then_as_they_came_free() -> None:
    pool = BlockPool(4, 1, Lru())
    blocks = [pool.take(0) for _ in range(3)]
    pool.release(blocks[:2], 0)
    assert [pool.take(0).id for _ in range(3)] == [3, 1, 0]


def test_a_block_knows_who_used_it_last_until_it_is_dropped() -> None:
    pool = BlockPool(2, 1, Lru())
    first, second = made("a", [1], block=1), made("b", [1, 2], block=1)
    (block,) = cached(pool, first)
    assert block.user is first
    cached(pool, second)
    assert block.user is second
    pool.release([pool.take(0), pool.take(0)], 0)
    assert block.user is None


def test_a_policy_that_calls_a_held_block_expired_is_caught() -> None:
    class Wrong(Lru):
        def expired(self, now: int) -> Sequence[BlockId]:
            return [0]

    pool = BlockPool(2, 1, Wrong())
    pool.take(0)
    with pytest.raises(PolicyError, match="'Wrong' chose block 0, which is not a candidate"):
        pool.expire(0)


def test_the_size_of_the_cache_is_told_before_all_else() -> None:
    told: list[object] = []

    class Told(Lru):
        def on_open(self, blocks: int, block_size: int) -> None:
            told.append((blocks, block_size))

        def on_cached(self, block: Any, now: int) -> None:
            told.append(block.id)

    pool = BlockPool(7, 2, Told())
    cached(pool, made("a", [1], block=2))
    assert told == [(7, 2), 0]


# --- the future ------------------------------------------------------------------------------------------


def test_the_next_use_is_the_nearest_request_that_has_not_passed() -> None:
    requests = [made("a", [1, 2], block=4), made("b", [1, 3], block=4), made("c", [1, 2], block=4)]
    future = KnownFuture(requests, 4)
    head, tail = keys_of(requests[0], 4)[1:]
    assert (future.next_use(head), future.next_use(tail)) == (0, 0)
    future.passed("b")  # out of order
    assert future.next_use(head) == 0
    future.passed("a")
    assert (future.next_use(head), future.next_use(tail)) == (2, 2)
    future.passed("c")
    future.passed("unknown")
    assert (future.next_use(head), future.next_use(b"other")) == (NEVER, NEVER)


def test_belady_gives_up_a_block_whose_request_passed_without_it() -> None:
    """`b` came and couldn't hit block 2, as its prefix was gone: the block's next use is then `d`, the last."""
    a, b, c, d = (
        made(n, ids, block=1) for n, ids in (("a", [1, 2]), ("b", [1, 2]), ("c", [5]), ("d", [1, 2]))
    )
    eviction = plugins.create("eviction", "belady")
    eviction.future = KnownFuture([a, b, c, d], 1)
    pool = BlockPool(3, 1, eviction)
    eviction.future.passed("a")
    _head, tail = cached(pool, a)
    eviction.future.passed("b")
    (other,) = cached(pool, c)  # still to come: it is used before `d`
    assert pool.evict(0).id == tail.id
    assert other.key


# --- what some are for -----------------------------------------------------------------------------------


def test_lru_drops_a_chains_tail_first_and_lru_head_its_head() -> None:
    chain = made("a", [1, 2, 3], block=1)
    for name, left in (("lru", [True, True, False]), ("lru_head", [False, True, True])):
        pool = BlockPool(3, 1, plugins.create("eviction", name))
        cached(pool, chain)
        pool.take(0)
        assert there(pool, chain) == left, name


@pytest.mark.parametrize("name", ["radix_lru", "gdsf"])
def test_leaf_only_eviction_never_orphans_a_block(name: str) -> None:
    pool = BlockPool(6, 1, plugins.create("eviction", name))
    long, branch = made("a", [1, 2, 3, 4], block=1), made("b", [1, 2, 5], block=1)
    cached(pool, long)
    cached(pool, branch)
    while pool.cached:
        pool.take(0)
        for user in (long, branch):
            left = there(pool, user)
            assert left == sorted(left, reverse=True)


def test_a_block_outlives_its_time_only_where_it_is_hit() -> None:
    pool = BlockPool(8, 1, Ttl(10))
    kept, lost = made("a", [1, 2], block=1), made("b", [3], block=1)
    cached(pool, kept, now=0)
    cached(pool, lost, now=0)
    pool.expire(10 * SECOND)
    assert pool.evicted == 0
    cached(pool, kept, now=10 * SECOND)
    pool.expire(11 * SECOND)
    assert (there(pool, kept), there(pool, lost)) == ([True, True], [False])
    assert (pool.evicted, pool.free) == (1, 6)
    pool.expire(21 * SECOND)
    assert (pool.cached, pool.free) == (0, 8)


def test_the_engine_lets_expired_blocks_go_between_steps() -> None:
    core, _ = engine(eviction=Ttl(1), blocks=20, block_size=4)
    core.add(request("a", 16, output=1), 0)
    drain(core)
    assert core.pool.cached == 4
    core.add(request("b", 4, output=1), 2 * SECOND)
    core.plan(2 * SECOND)
    assert core.pool.cached == 0


def test_t_lru_gives_up_what_the_next_turn_can_compute_in_time() -> None:
    """8 tokens of history, 1 to come, 3 to spare: what lies beyond token 6 is safe, though it is newest."""
    for session, left in (("s", [True] * 6 + [False] * 2), ("", [True] * 8)):
        pool = BlockPool(10, 1, plugins.create("eviction", "t_lru", {"spare": 3, "next_prompt": 1}))
        older = made("old", [90, 91], block=1)
        chat = made("chat", list(range(8)), block=1, session=session)
        cached(pool, older)
        cached(pool, chat)
        pool.take(0), pool.take(0)
        assert there(pool, chat) == left
        assert there(pool, older) == ([True, True] if session else [False, False])


def test_gdsf_keeps_what_is_dear_to_recompute_and_lets_it_age() -> None:
    pool = BlockPool(5, 1, plugins.create("eviction", "gdsf", {"even": 1}))
    deep, flat = made("deep", [1, 2, 3], block=1), made("flat", [7], block=1)
    cached(pool, deep)
    cached(pool, flat)
    taken = [pool.take(0), pool.take(0)]
    assert (there(pool, deep), there(pool, flat)) == ([True] * 3, [False])  # the newest, but the cheapest
    pool.release(taken, 0)
    for index in range(20):  # one-time blocks raise the floor until the deep one goes too
        cached(pool, made(f"n{index}", [100 + index], block=1))
    assert there(pool, deep) != [True] * 3


def test_workload_aware_learns_which_kind_of_request_never_returns() -> None:
    """Chats return after 20 s, batch jobs never. lru loses the chats; this policy learns to drop the jobs."""
    requests = []
    for index in range(600):
        now = index * SECOND
        requests.append(made(f"job{index}", [10_000 + index] * 3, arrival=now, block=1, tenant="jobs"))
        chat = [500 + index % 20]
        requests.append(made(f"chat{index}", chat, arrival=now, block=1, tenant="chats"))
    aware = replay("workload_aware", requests, 40, block_size=1, window_s=30.0)
    plain = replay("lru", requests, 40, block_size=1)
    best = replay("belady", requests, 40, block_size=1)
    assert plain.hits == 0
    assert aware.hits > 0.8 * best.hits
