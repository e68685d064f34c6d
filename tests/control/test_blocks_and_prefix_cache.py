"""Where KV blocks come and go: keys, hits, sharing, order of eviction, preemption, abort."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.control.request import Piece, Prompt, Request, Segment, stream_of
from lab.errors import ConfigError, PolicyError
from lab.policy import BlockView, EvictionPolicy
from lab.state.blocks import BlockPool
from lab.state.prefix import ContentChain
from policies.eviction.fifo import Fifo
from policies.eviction.lfu import Lfu
from policies.eviction.lru import Lru
from tests.control.harness import commit, drain, engine, request, step, tokens


def keys_of(prompt: Prompt, block_size: int = 16, salt: str = "") -> list[bytes]:
    return ContentChain(prompt, block_size, salt, (), None).upto(len(prompt) // block_size)


def test_a_55_token_prompt_keys_three_blocks_and_a_sharer_of_48_takes_one() -> None:
    core, _ = engine(blocks=11)
    common = list(range(48))
    core.add(request("a", [*common, *[3] * 7]), 0)
    first = step(core)
    assert len(first.work[0].blocks) == 4
    assert len(core.pool.keys()) == 3
    core.add(request("b", [*common, *[4] * 5]), 10)
    second = step(core, 10)
    work = second.work[1]
    assert (work.start, work.tokens) == (48, 5)
    assert work.blocks[:3] == first.work[0].blocks[:3]
    assert core.pool.allocated == 5


def test_a_fully_cached_prompt_recomputes_at_least_its_last_token() -> None:
    core, notes = engine()
    core.add(request("a", list(range(64)), output=1), 0)
    drain(core)
    core.add(request("b", list(range(64)), output=1), 100)
    plan = step(core, 100)
    assert (plan.work[0].start, plan.work[0].tokens) == (48, 16)
    assert notes.requests["b"].cached_tokens == 48
    core.add(request("c", list(range(65)), output=1), 200)
    plan = step(core, 200)
    assert (plan.work[0].start, plan.work[0].tokens) == (64, 1)


def test_equal_prompts_in_one_step_share_what_the_first_is_about_to_compute() -> None:
    core, _ = engine()
    core.add(request("a", list(range(40))), 0)
    core.add(request("b", list(range(40))), 0)
    plan = step(core)
    assert [(w.start, w.tokens) for w in plan.work] == [(0, 40), (32, 8)]
    assert plan.work[0].blocks[:2] == plan.work[1].blocks[:2]


def test_a_recomputed_last_block_is_written_in_place_not_cached_twice() -> None:
    core, _ = engine(blocks=4)
    core.add(request("a", list(range(32)), output=1), 0)
    blocks = drain(core)[0].work[0].blocks
    core.add(request("b", list(range(32)), output=1), 100)
    assert step(core, 100).work[0].blocks == blocks
    core.check()


def test_without_prefix_cache_nothing_is_shared() -> None:
    core, notes = engine(prefix_cache=False)
    for name in "ab":
        core.add(request(name, list(range(64))), 0)
    assert tokens(step(core)) == [64, 64]
    drain(core, 10)
    assert core.pool.cached == 0
    assert notes.requests["b"].cached_tokens == 0


def test_salted_tenants_do_not_share() -> None:
    core, _ = engine()
    core.add(request("a", list(range(64)), cache_salt="one"), 0)
    core.add(request("b", list(range(64)), cache_salt="two"), 0)
    core.add(request("c", list(range(64)), cache_salt="one"), 0)
    assert tokens(step(core)) == [64, 64, 16]


def test_a_later_turn_hits_the_output_of_the_turn_before() -> None:
    core, notes = engine()
    first = request("turn1", 30, output=20)
    core.add(first, 0)
    drain(core)
    history = (*first.prompt.pieces, Segment(first.output_stream, 0, 20))
    core.add(Request(id="turn2", prompt=Prompt((*history, Segment(7, 0, 14))), output_len=1), 1000)
    drain(core, 1000)
    # 30 + 20 tokens, of which the last was never fed back: 49 stored, 3 full blocks of 16.
    assert notes.requests["turn2"].cached_tokens == 48


def test_real_tokens_are_the_content_when_outputs_are_not_forced() -> None:
    core, notes = engine()
    core.add(Request(id="a", prompt=Prompt.of(range(15)), max_tokens=18), 0)
    drain(core)  # generates token 0 every time
    core.add(Request(id="b", prompt=Prompt.of([*range(15), *[0] * 20]), max_tokens=1), 1000)
    drain(core, 1000)
    assert notes.requests["b"].cached_tokens == 32


def test_release_makes_a_chain_evictable_own_tail_first() -> None:
    order: list[int] = []

    class Watch(Lru):
        def on_evictable(self, block: BlockView, now: int) -> None:
            super().on_evictable(block, now)
            order.append(block.depth)

    core, _ = engine(eviction=Watch())
    core.add(request("a", 64, output=1), 0)
    drain(core)
    assert order == [3, 2, 1, 0]


@pytest.mark.parametrize("policy", [Lru, Fifo, Lfu])
def test_the_older_chain_goes_first_and_its_tail_before_its_head(policy: type[EvictionPolicy]) -> None:
    core, _ = engine(eviction=policy(), blocks=8)
    core.add(request("old", 64, output=1), 0)
    old = drain(core)[0].work[0].blocks
    core.add(request("new", 64, output=1), 100)
    drain(core, 100)
    core.add(request("next", 33, output=1), 200)
    assert drain(core, 200)[0].work[0].blocks == (old[3], old[2], old[1])


def test_lru_spares_what_was_hit_and_fifo_does_not() -> None:
    for policy, survives in ((Lru, True), (Fifo, False), (Lfu, True)):
        core, notes = engine(eviction=policy(), blocks=6)
        core.add(request("hot", list(range(33)), output=1), 0)
        drain(core)
        core.add(request("cold", [9] * 33, output=1), 100)
        drain(core, 100)
        core.add(request("hot again", list(range(33)), output=1), 200)
        drain(core, 200)
        core.add(request("pressure", [8] * 64, output=1), 300)
        drain(core, 300)
        core.add(request("hot once more", list(range(33)), output=1), 400)
        drain(core, 400)
        assert (notes.requests["hot once more"].cached_blocks > 0) == survives, policy


def test_leaf_only_eviction_announces_a_parent_only_after_its_child_is_gone() -> None:
    announced: list[int] = []

    class Newest(EvictionPolicy):
        def __init__(self) -> None:
            self.candidates: list[int] = []

        def victim(self, now: int) -> int:
            return self.candidates[-1]

        def on_evictable(self, block: BlockView, now: int) -> None:
            announced.append(block.depth)
            self.candidates.append(block.id)

        def on_pinned(self, block: BlockView, now: int) -> None:
            self.candidates.remove(block.id)

        def on_dropped(self, block: BlockView, now: int) -> None:
            self.candidates.remove(block.id)

    core, _ = engine(eviction=Newest(), blocks=4)
    core.add(request("a", 64, output=1), 0)
    drain(core, check=core.check)
    assert announced == [3]
    core.add(request("b", 33, output=1), 100)
    drain(core, 100, check=core.check)
    assert announced[:3] == [3, 2, 1]


def test_a_preempted_request_keeps_its_generated_tokens_and_computes_them_again() -> None:
    core, notes = engine(blocks=6, prefix_cache=False)
    core.add(request("first", 40, output=30), 0)
    core.add(request("second", 40, output=20), 0)
    plans = drain(core, check=core.check)
    lost = next(plan for plan in plans if plan.preempted)
    assert lost.preempted == (("second", "recompute"),)
    record = notes.requests["second"]
    assert record.preemptions == 1
    assert len(record.token_times) == len(record.output) == 20
    before = sum(time <= lost.now for time in record.token_times)
    back = next(plan for plan in plans if plan.index > lost.index and "second" in plan.admitted)
    assert next(w for w in back.work if w.request == "second").tokens == 40 + before
    assert record.computed_tokens > 40 + 20 - 1


def test_a_preempted_request_returns_only_when_all_its_known_tokens_fit() -> None:
    core, _ = engine(blocks=6, prefix_cache=False, token_budget=16)
    core.add(request("first", 40, output=30), 0)
    core.add(request("second", 40, output=20), 0)
    plans = drain(core, check=core.check)
    gone = next(plan.index for plan in plans if plan.preempted)
    back = next(plan.index for plan in plans if plan.index > gone and "second" in plan.admitted)
    first_runs = [plan.index for plan in plans if any(w.request == "first" for w in plan.work)]
    assert back > first_runs[-1], "a chunk of 16 would have fitted earlier, all 40 known tokens not"


def test_abort_in_any_state_gives_all_blocks_back() -> None:
    core, notes = engine(max_seqs=1)
    core.add(request("running", 40, output=50), 0)
    core.add(request("waiting", 40, output=50), 0)
    step(core)
    plan = core.plan(10)
    assert core.abort("running", 11)
    assert core.abort("waiting", 12)
    assert not core.abort("nobody", 12)
    commit(core, plan, 20)
    assert not core.has_work
    assert core.pool.held == 0
    assert {name: record.outcome for name, record in notes.requests.items()} == {
        "waiting": "aborted",
        "running": "aborted",
    }
    core.check()


def test_what_an_aborted_request_computed_can_still_be_hit() -> None:
    core, notes = engine()
    core.add(request("a", list(range(64)), output=50), 0)
    step(core)
    core.abort("a", 10)
    core.add(request("b", list(range(64)), output=1), 20)
    drain(core, 20)
    assert notes.requests["b"].cached_blocks == 3


@pytest.mark.parametrize("field", ["blocks", "block_size"])
def test_a_pool_of_nothing_is_refused(field: str) -> None:
    sizes = {"blocks": 4, "block_size": 4, field: 0}
    with pytest.raises(ConfigError, match=f"kv.{field} is 0"):
        BlockPool(sizes["blocks"], sizes["block_size"], Lru())


def test_an_eviction_policy_that_names_a_pinned_block_is_caught() -> None:
    class Wrong(Lru):
        def victim(self, now: int) -> int:
            return 1

    pool = BlockPool(2, 4, Wrong())
    keys = keys_of(Prompt.of(range(4)), 4)
    a, _b = pool.take(0), pool.take(0)
    pool.publish(a, None, keys, 0, 0)
    pool.release([a], 0)
    with pytest.raises(PolicyError, match="'Wrong' chose block 1, which is not a candidate"):
        pool.take(0)


pieces = st.lists(
    st.one_of(
        st.builds(Segment, st.integers(0, 3), st.integers(0, 6), st.integers(1, 9)),
        st.lists(st.integers(0, 9), min_size=1, max_size=9).map(tuple),
    ),
    min_size=1,
    max_size=6,
)


def cut(parts: list[Piece], where: list[int]) -> list[Piece]:
    """The same content in smaller pieces."""
    out: list[Piece] = []
    for piece, at in zip(parts, where, strict=False):
        k = at % len(piece)
        if k == 0:
            out.append(piece)
        elif isinstance(piece, Segment):
            out += [
                Segment(piece.stream, piece.start, k),
                Segment(piece.stream, piece.start + k, piece.length - k),
            ]
        else:
            out += [piece[:k], piece[k:]]
    return out


@given(pieces, st.lists(st.integers(0, 8), min_size=6, max_size=6), st.integers(1, 5))
def test_keys_depend_on_content_and_not_on_how_it_is_cut(
    parts: list[Piece], where: list[int], size: int
) -> None:
    whole = Prompt(tuple(parts))
    assert keys_of(Prompt(tuple(cut(parts, where))), size) == keys_of(whole, size)


@given(pieces, pieces, st.integers(1, 4))
def test_equal_keys_mean_equal_prefixes_and_the_other_way_round(
    a: list[Piece], b: list[Piece], size: int
) -> None:
    def content(prompt: Prompt) -> list[object]:
        out: list[object] = []
        for piece in prompt.pieces:
            if isinstance(piece, Segment):
                out += [("s", piece.stream, piece.start + i) for i in range(piece.length)]
            else:
                out += list(piece)
        return out

    left, right = Prompt(tuple(a)), Prompt(tuple(b))
    for block, (x, y) in enumerate(zip(keys_of(left, size)[1:], keys_of(right, size)[1:], strict=False)):
        reach = (block + 1) * size
        assert (x == y) == (content(left)[:reach] == content(right)[:reach])


def test_names_of_streams_are_stable() -> None:
    assert stream_of("output", "r1") == stream_of("output", "r1")
    assert request("ä", 3).output_stream == stream_of("output", "ä")
    assert stream_of("a", "bc") != stream_of("ab", "c")


def test_a_block_written_again_in_part_still_counts_as_its_parents_child() -> None:
    events: list[tuple[str, int]] = []

    class LeafLru(Lru):
        leaf_only = True

        def on_evictable(self, block: BlockView, now: int) -> None:
            super().on_evictable(block, now)
            events.append(("candidate", block.depth))

    core, _ = engine(eviction=LeafLru(), chunk=8, blocks=4)
    core.add(request("a", list(range(32)), output=1), 0)
    drain(core, check=core.check)
    core.add(request("b", list(range(32)), output=1), 100)
    step(core, 100)  # computes half of the last block, in place
    core.abort("b", 110)
    core.check()
    assert ("candidate", 0) not in events, "block 0 has a cached child all along"


def test_what_nobody_shares_is_kept_as_runs_until_somebody_looks() -> None:
    core, _ = engine(blocks=200, max_seqs=2, token_budget=70)
    core.add(request("a", 100, 60), 0)
    for now in range(20):
        step(core, now)
        core.check()
    table = core._requests["a"].table
    assert table.sealed
    assert len(table.runs) == 2  # the prompt's whole blocks, and the one that its end shares with the output
    drain(core, 100, check=core.check)
    assert [run.count for run in table.runs] == [6, 1, 2]
    assert not table.held
    quoted = Segment(request("a", 100, 60).output_stream, 0, 40)
    later = Prompt((*request("a", 100).prompt.pieces, quoted, Segment(stream_of("new"), 0, 9)))
    core.add(Request(id="b", prompt=later, output_len=2), 200)
    plan = step(core, 200)
    core.check()
    assert plan.work[0].start == 128  # 140 tokens of 149 were there: 8 whole blocks
    assert not table.sealed
