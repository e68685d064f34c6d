"""Roofline and physical cost: laws that every device, shape and layout keeps, and numbers anybody can redo."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lab.control.plan import GENESIS, Decoding, StepPlan, Work
from lab.errors import ConfigError
from sim import hardware, model_shape
from sim.cost.physical import (
    GRAPH_SIZES,
    MEASURED,
    PERFECT,
    Coefficients,
    Parallel,
    PhysicalCost,
    pairs_within,
)

SHAPES = model_shape.names()
DEVICES = hardware.names()
Items = list[tuple[int, int]]


def works(items: Items) -> tuple[Work, ...]:
    return tuple(Work(f"r{i}", start, tokens, True) for i, (start, tokens) in enumerate(items))


def plan(items: Items) -> StepPlan:
    return StepPlan(0, 0, works(items), GENESIS)


@cache
def cost(
    name: str, device: str, tensor: int = 1, pipeline: int = 1, parts: int = 1, padded: bool = False
) -> PhysicalCost:
    shape = model_shape.load(name)
    graphs = GRAPH_SIZES if padded else ()
    return PhysicalCost(shape, hardware.load(device), MEASURED, Parallel(tensor, pipeline, parts), graphs)


@st.composite
def costs(draw: st.DrawFn) -> PhysicalCost:
    name = draw(st.sampled_from(SHAPES))
    heads, layers = model_shape.load(name).heads, model_shape.load(name).layers
    tensor = draw(st.sampled_from([n for n in (1, 2, 4, 8) if heads % n == 0]))
    pipeline = draw(st.sampled_from([n for n in (1, 2, 3) if n <= layers]))
    parts = draw(st.sampled_from([1, 2, 4]))
    return cost(name, draw(st.sampled_from(DEVICES)), tensor, pipeline, parts, draw(st.booleans()))


batches = st.lists(
    st.tuples(st.integers(0, 20_000), st.one_of(st.just(1), st.integers(1, 4096))), min_size=1, max_size=12
)
shares = st.floats(0.01, 1)
times = st.floats(0, 1e3)


@given(costs(), batches, st.builds(Coefficients, shares, shares, shares, shares, times, times, times, times))
def test_no_step_is_faster_than_the_roofline(
    model: PhysicalCost, items: Items, reached: Coefficients
) -> None:
    shape, layout = model.shape, model.parallel
    slower = PhysicalCost(shape, model.hardware, reached, layout, GRAPH_SIZES)
    bound, took = model.roofline().step_cost(plan(items)), slower.step_cost(plan(items))
    for term, least in zip(took, bound, strict=True):
        assert term >= least * (1 - 1e-12)
    assert 0 < slower.efficiency(plan(items)) <= 1 + 1e-12
    # And the roofline itself, by hand: all that is done at the peak, all that is read at the bandwidth.
    tokens = sum(n for _, n in items)
    always = (
        shape.active_parameters
        - shape.parameters
        + sum(k.count * shape.linear(k.sparse) for k in shape.kinds)
    )
    done = 2 * tokens * always / layout.devices
    peak = max(model.hardware.flops.values())
    assert bound.total >= done / peak * (1 - 1e-9)


@given(costs(), batches, st.integers(0, 11), st.integers(0, 3000), st.integers(0, 3000))
def test_more_tokens_context_or_requests_never_take_less(
    model: PhysicalCost, items: Items, which: int, context: int, more: int
) -> None:
    index = which % len(items)
    start, tokens = items[index]
    before = model.step_cost(plan(items)).total
    for grown in ((start + context, tokens), (start, tokens + more)):
        changed = [*items[:index], grown, *items[index + 1 :]]
        assert model.step_cost(plan(changed)).total >= before * (1 - 1e-12)
    assert model.step_cost(plan([*items, (start, tokens)])).total >= before * (1 - 1e-12)


@given(costs(), batches, st.integers(1, 20))
def test_time_is_additive_in_layers(model: PhysicalCost, items: Items, layers: int) -> None:
    model = PhysicalCost(model.shape, model.hardware, model.coefficients, Parallel(model.parallel.tensor))
    one, some, twice = (
        model.of_layers(n).step_cost(plan(items)).total for n in (layers, 2 * layers, 3 * layers)
    )
    assert twice - some == pytest.approx(some - one, rel=1e-6)


@given(costs(), st.integers(0, 20_000), st.integers(1, 600), batches)
def test_time_is_continuous_where_a_chunk_ends(
    model: PhysicalCost, start: int, tokens: int, others: Items
) -> None:
    """A token more costs at most a token's work: nothing jumps, not even where a decode becomes a chunk."""
    # The step up to the next recorded graph, and to the next expert, is real; without them there is none.
    assume(model.shape.mixture is None)
    model = PhysicalCost(model.shape, model.hardware, model.coefficients, model.parallel)
    less, more = (model.step_cost(plan([*others, (start, n)])).total for n in (tokens, tokens + 1))
    alone = model.roofline().step_cost(plan([(start, 1)]))
    one_token = 2 * model.shape.parameters / model.hardware.peak(model.shape.dtype) / model.coefficients.mfu
    room = 3 * (one_token + alone.kv_read / model.coefficients.kv_read / model.coefficients.mfu)
    room += 1e-9 + model.collectives(1, 1) * (model.parallel.devices > 1)
    assert more - less + 1e-12 >= 0
    assert more - less <= room


@given(costs(), st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_decodes_as_sums_cost_what_they_cost_one_by_one(model: PhysicalCost, contexts: list[int]) -> None:
    window = next((kind.window for kind in model.shape.kinds if kind.window), None)
    assert window is None or max(contexts) <= window
    listed = model.step_time(plan([(context - 1, 1) for context in contexts]))
    summed = model.decode_time(Decoding(len(contexts), sum(contexts), max(contexts)))
    assert summed.total_ns == pytest.approx(listed.total_ns, abs=2)


@given(st.integers(1, 40), st.integers(0, 60), st.one_of(st.none(), st.integers(1, 50)))
def test_pairs_and_keys_equal_a_count(tokens: int, start: int, window: int | None) -> None:
    attended = [
        range(max(0, at + 1 - window) if window else 0, at + 1) for at in range(start, start + tokens)
    ]
    keys = len({key for seen in attended for key in seen})
    assert pairs_within(tokens, start + tokens, window) == (sum(map(len, attended)), keys)


def test_one_token_on_an_h100_by_hand() -> None:
    """Llama-3.1-8B in bfloat16: 7.5e9 weights without the embedding, read at 3.352 TB/s."""
    model = cost("llama-3.1-8b", "h100_sxm")
    bound = model.roofline().step_cost(plan([(999, 1)]))
    assert bound.weights == pytest.approx((8_030_261_248 - 128_256 * 4096 - 65 * 4096) * 2 / 3.352e12)
    assert bound.kv_read == pytest.approx(1000 * 131_072 / 3.352e12)
    assert bound.total == bound.weights + bound.kv_read
    real = model.step_cost(plan([(999, 1)]))
    assert real.weights == pytest.approx(bound.weights / 0.905)
    assert real.host == pytest.approx(32 * 44.2e-6 + 6.4e-6)
    chunk = model.step_cost(plan([(0, 2048)]))
    linear = 2 * 2048 * (8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096)
    head = 128_256 * 4096 * 2 / 3.352e12 / 0.905
    assert chunk.weights == pytest.approx(linear / 989.4e12 / 0.7 + head)


def test_all_reduces_take_what_was_measured() -> None:
    """8.8 us each and 148 GB/s: the values of an H100 are this model's defaults."""
    model = cost("llama-3.1-70b", "h100_sxm", tensor=4)
    size = 64 * 8192 * 2
    assert model.reduce_s(size) == pytest.approx(size / 148e9, rel=1e-3)
    took = model.step_cost(plan([(100, 1)] * 64)).collectives
    gather = 8.8e-6 + 64 * 128_256 / 148e9
    assert took == pytest.approx(160 * (8.8e-6 + size / 148e9) + gather, rel=1e-3)


def test_two_devices_share_the_weights_and_wait_for_each_other() -> None:
    one, two = (cost("llama-3.1-8b", "h100_sxm", tensor=n).step_cost(plan([(999, 1)] * 8)) for n in (1, 2))
    assert two.weights == pytest.approx(one.weights / 2)
    assert two.kv_read == pytest.approx(one.kv_read / 2)
    assert one.collectives == 0 < two.collectives


def test_a_pipeline_has_bubbles_that_microbatches_fill() -> None:
    """Two stages, one batch: no faster than one device. Cut in four: 5 rounds of half the layers and a quarter each."""
    long = plan([(0, 4096)])
    alone, whole, cut = (
        cost("llama-3.1-8b", "h100_sxm", 1, pipeline, parts).step_cost(long)
        for pipeline, parts in ((1, 1), (2, 1), (2, 4))
    )
    assert whole.weights == pytest.approx(alone.weights)
    assert whole.collectives > 0
    head = cost("llama-3.1-8b", "h100_sxm").head(1)
    assert cut.weights - 4 * head == pytest.approx((alone.weights - head) * 5 / 8)
    # A decode reads its stage's weights once a part, so there it doesn't pay.
    one = plan([(100, 1)] * 4)
    assert cost("llama-3.1-8b", "h100_sxm", 1, 2, 4).step_cost(one).total > alone.weights * 0
    assert (
        cost("llama-3.1-8b", "h100_sxm", 1, 2, 4).step_cost(one).weights
        > cost("llama-3.1-8b", "h100_sxm", 1, 2, 1).step_cost(one).weights
    )


def test_a_batch_in_a_recorded_graph_costs_what_the_graph_costs() -> None:
    device, shape = hardware.load("h100_sxm"), model_shape.load("llama-3.1-8b")
    padded = PhysicalCost(shape, device, PERFECT, graph_sizes=GRAPH_SIZES)
    exact = PhysicalCost(shape, device, PERFECT)
    assert [padded.padded(n) for n in (1, 3, 9, 257, 512, 513)] == [1, 4, 16, 272, 512, 513]
    assert padded.linear(padded.padded(497)) == exact.linear(512) > exact.linear(497)


@pytest.mark.parametrize("field", [field.name for field in fields(Coefficients)])
def test_no_coefficient_leaves_its_bounds(field: str) -> None:
    wrong = -0.1 if field.endswith("_us") else 1.01
    with pytest.raises(ConfigError, match=f"cost.{field} is {wrong}"):
        replace(MEASURED, **{field: wrong})


@settings(max_examples=30)
@given(st.integers(1, 5000))
def test_experts_touched_are_between_one_tokens_and_all(tokens: int) -> None:
    mixture = model_shape.load("qwen3-30b-a3b").mixture
    assert mixture is not None
    assert mixture.touched(1) == pytest.approx(8)
    assert 8 - 1e-9 <= mixture.touched(tokens) <= min(128, 8 * tokens) + 1e-9
