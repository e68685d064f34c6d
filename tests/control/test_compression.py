"""KV compression as counts: what a request holds, when blocks come free, who is let in, and what preemption costs."""

from __future__ import annotations

import random

import pytest

from lab.control.plan import StepPlan
from lab.errors import ConfigError, PolicyError, RequestRefused
from lab.policy import CompressionPolicy, KvKeep, Request
from policies.compression.knorm import KeyNorm
from policies.compression.none import Nothing
from policies.compression.streaming_llm import StreamingLlm
from policies.preemption.last import Last
from policies.scheduling.vllm_v1 import VllmV1
from tests.control.harness import commit, drain, engine, request, step


class PerRequest(CompressionPolicy):
    """Half of each prompt; short ones keep everything."""

    def keep(self, request: Request, block_size: int) -> KvKeep | None:
        blocks = len(request.prompt) // 2 // block_size
        return KvKeep(blocks, sinks=min(1, blocks - 1)) if blocks else None


def test_a_long_decode_holds_its_budget_and_one_block() -> None:
    core, notes = engine(block_size=4, prefix_cache=False, compression=StreamingLlm(budget=12, sinks=4))
    core.add(request("a", 6, 40), 0)
    held, kept = [], []
    for now in range(0, 400, 10):
        plan = core.plan(now)
        held.append(core.pool.held)
        commit(core, plan, now + 10)
        core.check()
        live = core._requests.get("a")
        kept.append(live.view.kept if live else 0)
        if live is None:
            break
    # 12 tokens kept in 3 blocks; a fourth fills, and is gone with the token that fills it.
    computed = [6 + i for i in range(39)]
    assert kept[:-1] == [n if n < 16 else 12 + n % 4 for n in computed]
    assert held == [2] * 3 + [3] * 4 + [4] * 33
    assert notes.requests["a"].dropped_tokens == 32
    assert core.pool.held == 0
    # The context that attention reads: what was kept before the step, and the token itself.
    assert [s.context_tokens for s in notes.steps] == [6, *[k + 1 for k in kept[:-1]]]


def test_the_first_blocks_after_the_sinks_come_free_and_are_named_in_the_plan() -> None:
    core, _ = engine(block_size=4, prefix_cache=False, compression=StreamingLlm(budget=12, sinks=3))
    core.add(request("a", 22, 4), 0)
    plan = step(core)
    (item,) = plan.compactions
    assert plan.work[0].blocks == (0, 1, 2, 3, 4, 5)
    assert (item.blocks, item.tokens, item.sinks, item.rule) == ((1, 2), 8, 1, "")
    assert [block.id for block in core._requests["a"].blocks] == [0, 3, 4, 5]
    assert step(core).work[0].dropped == 8
    core, _ = engine(
        block_size=4, prefix_cache=False, compression=KeyNorm(12, recent=5), compression_name="knorm"
    )
    core.add(request("a", 22, 4), 0)
    (item,) = step(core).compactions
    assert (item.blocks, item.sinks, item.recent, item.rule) == ((0, 1), 0, 2, "knorm")


@pytest.mark.parametrize("how", ["recompute", "swap"])
@pytest.mark.parametrize("seed", range(12))
def test_under_any_load_nobody_holds_more_than_it_may(seed: int, how: str) -> None:
    rng = random.Random(seed)
    size, budget = rng.choice([1, 3, 4]), rng.randint(1, 30)
    core, notes = engine(
        VllmV1() if seed % 2 else None,
        block_size=size,
        blocks=rng.randint(-(-(budget + 18) // size) + 2, 60),
        token_budget=16,
        max_seqs=5,
        chunk=rng.choice([None, 5]),
        prefix_cache=False,
        preemption=Last(how),  # type: ignore[arg-type]
        capacity={"host_blocks": 40, "block_bytes": 1},
        compression=KeyNorm(budget, rng.randint(0, budget // 3), rng.randint(0, budget // 3))
        if seed % 3
        else PerRequest(),
    )
    asked = []
    for i in range(12):
        asked.append(request(f"r{i}", rng.randint(1, 90), rng.randint(1, 40)))
        try:
            core.add(asked[-1], 0)
        except RequestRefused:
            asked.pop()
    assert len(asked) > 3
    aborted = rng.choice(asked).id

    def check() -> None:
        core.check()
        for live in core._requests.values():
            most = NO_LIMIT if live.keep is None else (live.keep.blocks + 1) * size - 1
            assert live.view.kept <= most
            assert len(live.blocks or live.host) * size <= (
                live.view.kept + live.granted + size if live.keep else NO_LIMIT
            )
        if core.steps == 8 and aborted in core._requests:
            core.abort(aborted, 10**6)

    plans = drain(core, check=check)
    assert any(plan.compactions for plan in plans)
    assert core.pool.held == 0
    assert core.host.free == core.host.total
    for asking in asked:
        if asking.id == aborted:
            continue
        record = notes.requests[asking.id]
        assert record.outcome == "finished"
        assert len(record.output) == asking.output_limit
        dropped = sum(c.tokens for plan in plans for c in plan.compactions if c.request == asking.id)
        assert record.dropped_tokens == dropped


NO_LIMIT = 10**9


def test_a_request_longer_than_the_pool_runs_if_what_it_keeps_fits() -> None:
    settings = {"blocks": 20, "block_size": 4, "token_budget": 32, "prefix_cache": False}
    long = request("long", 1000, 200)
    core, _ = engine(**settings)  # type: ignore[arg-type]
    with pytest.raises(RequestRefused, match="never fits"):
        core.add(long, 0)
    core, notes = engine(**settings, compression=StreamingLlm(44, 4))  # type: ignore[arg-type]
    core.add(long, 0)
    core.add(request("other", 50, 30), 0)
    drain(core, check=core.check)
    assert {name: record.outcome for name, record in notes.requests.items()} == {
        "long": "finished",
        "other": "finished",
    }
    # 11 blocks kept, one that isn't full, and a step of 32 tokens: 79 tokens at most, and 20 blocks hold 80.
    core, _ = engine(**settings, compression=StreamingLlm(48, 4))  # type: ignore[arg-type]
    with pytest.raises(RequestRefused) as refused:
        core.add(long, 0)
    assert (refused.value.needed, refused.value.available) == (21, 20)


def test_a_request_within_its_budget_is_planned_as_without_compression() -> None:
    runs = []
    for compression in (None, Nothing(), StreamingLlm(200, 4), KeyNorm(200)):
        core, notes = engine(blocks=30, block_size=4, prefix_cache=False, compression=compression)
        for i in range(6):
            core.add(request(f"r{i}", 10 + 9 * i, 20), 0)
        drain(core)
        runs.append([s.plan.digest for s in notes.steps])
    assert all(run == runs[0] for run in runs)


def test_preemption_by_recomputation_begins_again_and_swapping_keeps_what_was_kept() -> None:
    for how, start in (("recompute", 0), ("swap", 41)):
        core, notes = engine(
            block_size=4,
            prefix_cache=False,
            preemption=Last(how),  # type: ignore[arg-type]
            capacity={"host_blocks": 40, "block_bytes": 1},
            compression=StreamingLlm(12, 4),
        )
        core.add(request("a", 40, 8), 0)
        step(core)
        step(core)
        plans: list[StepPlan] = []
        core.policy.schedule = lambda s: s.preempt("a")  # type: ignore[method-assign, assignment, misc]
        plans.append(step(core))
        del core.policy.schedule  # type: ignore[method-assign]
        plans.append(step(core))
        core.check()
        (work,) = plans[1].work
        assert work.start == start
        assert work.dropped == (28 if how == "swap" else 0)
        assert plans[0].moved_blocks == plans[1].moved_blocks == (4 if how == "swap" else 0)  # 13 tokens
        drain(core, check=core.check)
        assert notes.requests["a"].dropped_tokens == (28 + 4 if how == "swap" else 28 + 28 + 4)


def test_with_the_prefix_cache_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prefix cache would share; expected kv\.prefix_cache=false"):
        engine(compression=StreamingLlm())
    engine(compression=Nothing())


def test_blocks_that_another_request_holds_too_are_never_overwritten() -> None:
    core, _ = engine(block_size=4, prefix_cache=False, compression=StreamingLlm(8, 4))
    core.add(request("a", 8, 9), 0)
    step(core)
    core._requests["a"].blocks[1].refs += 1
    for _ in range(3):
        step(core)
    with pytest.raises(
        PolicyError, match=r"can't shorten <request 'a' .* shares KV blocks with another request"
    ):
        core.plan(0)


def test_an_answer_that_is_no_kvkeep_is_refused_and_impossible_ones_cant_be_made() -> None:
    class Halves(CompressionPolicy):
        def keep(self, request: Request, block_size: int) -> KvKeep | None:
            return len(request.prompt) / 2  # type: ignore[return-value]

    core, _ = engine(prefix_cache=False, compression=Halves())
    with pytest.raises(PolicyError, match=r"'Halves': keep\(\) returned 2\.5; expected a KvKeep or None"):
        core.add(request("a", 5), 0)
    for wrong in ((0, 0, 0), (3, 2, 2), (3, -1, 0)):
        with pytest.raises(ValueError, match="expected at least 1 block"):
            KvKeep(*wrong)
    with pytest.raises(ValueError, match="sinks is 9; expected from 0 to the budget, 8"):
        StreamingLlm(8, 9)
