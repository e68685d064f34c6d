"""Measured kernels: look-ups by hand, laws that noisy tables must not break, and what is said of their gaps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import compose
from lab.console import Console
from lab.control.plan import GENESIS, Decoding, StepPlan, Work
from lab.errors import ConfigError
from lab.validation import validate
from sim import hardware, model_shape
from sim.backend import open_backend
from sim.cost import table_files
from sim.cost.curves import Curve, Surface
from sim.cost.physical import PERFECT, Parallel, PhysicalCost
from sim.cost.tables import Kernels, TablesCost

SHARED = Path(__file__).parents[2].parent / "shared" / "gpu_tables"
H100 = hardware.load("h100_sxm")
EXPERT = 3 * 2048 * 768
"""Weights of one of qwen3-30b-a3b's."""
Items = list[tuple[int, int]]


def plan(items: Items) -> StepPlan:
    work = tuple(Work(f"r{i}", start, tokens, True) for i, (start, tokens) in enumerate(items))
    return StepPlan(0, 0, work, GENESIS)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of a device that takes 3 times the roofline and 5 us a kernel, with noise that isn't monotone."""
    where = tmp_path_factory.mktemp("tables")
    flops, rate = H100.peak("bfloat16"), H100.memory_bytes_s

    def took(operations: float, size: float, at: int) -> float:
        return (3 * max(operations / flops, size / rate) + 5e-6) * (1 + 0.02 * (at % 3)) * 1e3

    sizes = (1, 8, 64, 512, 4096)
    edges = (64, 1024, 4096, 16384)
    gemm = [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": took(2.0 * m * n * k, 2.0 * n * k, i)}
        for i, m in enumerate(sizes)
        for n in edges
        for k in edges
    ]
    heads = [(h, kv) for h in (8, 16, 32) for kv in (4, 8)]
    base = {"head_dim": 128, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    context = [
        {**base, "batch_size": 1, "isl": n, "step": 0, "num_heads": h, "num_key_value_heads": kv}
        | {"latency": took(4.0 * h * 128 * n * (n + 1) / 2, 4.0 * kv * 128 * n, i)}
        for i, n in enumerate((1, 16, 256, 2048, 8192))
        for h, kv in heads
    ]
    generation = [
        {**base, "batch_size": b, "isl": 1, "step": c - 1, "num_heads": h, "num_key_value_heads": kv}
        | {"latency": took(4.0 * h * 128 * b * c, 4.0 * kv * 128 * b * c, i)}
        for b in (1, 8, 64)
        for i, c in enumerate((16, 256, 4096))
        for h, kv in heads
    ]
    reduce = [
        {"num_gpus": 2, "message_size": n, "backend": "vllm_graph", "latency": 0.005 + n * 2 / 300e9 * 1e3}
        for n in (1024, 1 << 20, 1 << 26)
    ]
    moe = [
        {"moe_dtype": "bfloat16", "hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128}
        | {"num_tokens": n, "moe_tp_size": 1, "moe_ep_size": ep, "distribution": "balanced"}
        | {"latency": took(2.0 * n * EXPERT * 8 / ep, 2.0 * EXPERT * min(8 * n, 128) / ep, i)}
        for i, n in enumerate(sizes)
        for ep in (1, 8)
    ]
    for name, rows in (
        ("moe", moe),
        ("gemm", gemm),
        ("context_attention", context),
        ("generation_attention", generation),
        ("custom_allreduce", reduce),
    ):
        write(where / f"{name}_perf.parquet", rows)
    return where


def model(where: Path, name: str = "llama-3.1-8b", tensor: int = 1) -> TablesCost:
    shape, parallel = model_shape.load(name), Parallel(tensor)
    kernels = table_files.load(where, shape, H100, parallel)
    return TablesCost(shape, H100, kernels, parallel=parallel)


batches = st.lists(
    st.tuples(st.integers(0, 6000), st.one_of(st.just(1), st.integers(1, 3000))), min_size=1, max_size=8
)


@given(st.data(), batches)
def test_no_step_is_faster_than_the_roofline(made: Path, data: st.DataObject, items: Items) -> None:
    tables = model_of(made, data.draw(st.sampled_from([1, 2])))
    bound = tables.roofline().step_cost(plan(items))
    took = tables.step_cost(plan(items))
    assert took.weights >= bound.weights * (1 - 1e-9)
    assert took.attention >= bound.attention * (1 - 1e-9)
    assert took.kv_read >= bound.kv_read * (1 - 1e-9)
    assert took.collectives >= bound.collectives * (1 - 1e-9)


_models: dict[tuple[Path, int], TablesCost] = {}


def model_of(made: Path, tensor: int = 1) -> TablesCost:
    return _models.setdefault((made, tensor), model(made, tensor=tensor))


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 200), st.integers(1, 3000))
def test_more_never_takes_less(made: Path, tokens: int, more: int, seqs: int, context: int) -> None:
    tables = model_of(made)

    def chunk(start: int, count: int) -> float:
        return tables.step_cost(plan([(start, count)])).total

    def decodes(count: int, each: int) -> float:
        return tables.cost_of(Decoding(count, count * each, each), ()).total

    assert chunk(0, tokens + 1 + more) >= chunk(0, tokens + 1) * (1 - 1e-9)
    assert decodes(seqs, context + more) >= decodes(seqs, context) * (1 - 1e-9)
    assert decodes(seqs + more, context) >= decodes(seqs, context) * (1 - 1e-9)


@given(st.integers(0, 9000), st.integers(2, 4000), st.integers(0, 4000))
def test_more_context_before_a_chunk_never_takes_less(made: Path, start: int, tokens: int, more: int) -> None:
    tables = model_of(made)
    before, after = (tables.step_cost(plan([(at, tokens)])).total for at in (start, start + more))
    assert after >= before * (1 - 1e-9)


@given(st.integers(0, 9000), st.integers(1, 4000), batches)
def test_time_is_continuous_where_a_chunk_ends(made: Path, start: int, tokens: int, others: Items) -> None:
    """A token more costs some tokens' work, and at most a launch where a decode becomes a chunk."""
    tables = model_of(made)
    less, more = (tables.step_cost(plan([*others, (start, n)])).total for n in (tokens, tokens + 1))
    each = 2 * tables.shape.parameters / H100.peak("bfloat16") + 32 * (start + tokens) * tables.token_s
    launches = 32 * tables.kernels.context(1) if tokens == 1 else 0.0  # type: ignore[misc]
    assert abs(more - less) <= 10 * each + 2 * launches


def test_chunks_of_a_prompt_take_what_the_prompt_takes(made: Path) -> None:
    """The same pairs, however they are cut: at the table's own points, where nothing is interpolated."""
    tables = model_of(made)
    whole = tables.attention(Decoding(), plan([(0, 8192)]).items)[0]
    parts = [tables.attention(Decoding(), plan([(s, n)]).items)[0] for s, n in ((0, 2048), (2048, 6144))]
    launch = 32 * tables.kernels.context(1)  # type: ignore[misc]
    assert sum(parts) == pytest.approx(whole + launch, rel=0.02)


def test_a_look_up_by_hand(made: Path) -> None:
    """Interpolated in k (14336 between 4096 and 16384) and in n (6144, 28672 is beyond): linear, so easy to redo."""
    tables = model_of(made)
    rate = H100.memory_bytes_s
    products = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    least = sum(32 * 3 * 2.0 * n * k / rate for n, k in products)
    assert tables.kernels.linear(1) == pytest.approx(least + 32 * 4 * 5e-6, rel=0.03)
    assert "a product of 28672 x 4096 lies beyond the tables" in "\n".join(tables.kernels.notes)
    two = model_of(made, 2)
    size = 8 * 4096 * 2
    assert two.reduce_s(size) == pytest.approx(5e-6 + size / 300e9, rel=1e-6)


def test_what_lies_beyond_the_tables_is_counted_and_said(made: Path) -> None:
    tables = model(made)
    tables.step_cost(plan([(0, 100)]))
    assert not tables.outside
    tables.step_cost(plan([(0, 9000)]))
    tables.cost_of(Decoding(65, 65 * 300, 300), ())
    tables.cost_of(Decoding(4, 4 * 5000, 5000), ())
    assert tables.outside == {"linear layers": 1, "attention of prompts": 1, "attention of single tokens": 2}
    assert tables.account()["steps"] == 4
    said = "\n".join(tables.warnings())
    assert "in 4 steps" in said
    assert "attention of single tokens 2 times" in said


def test_vidurs_csv(tmp_path: Path) -> None:
    ops = ("input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm")
    ops += ("mlp_up_proj", "mlp_act", "mlp_down_proj", "add")
    head = [f"time_stats.{op}.median" for op in ops] + ["n_embd", "num_tokens", "num_tensor_parallel_workers"]
    lines = [",".join(head)]
    lines += [",".join([*[str(0.1 * (1 + n / 1000))] * 9, "4096", str(n), "1"]) for n in (1, 512, 4096)]
    (tmp_path / "mlp.csv").write_text("\n".join(lines))
    columns = "time_stats.attn_decode.median,time_stats.attn_prefill.median,n_q_head,n_kv_head,"
    columns += "num_tensor_parallel_workers,batch_size,prefill_chunk_size,kv_cache_size,is_prefill"
    rows = [f"{0.02 * b * c / 1000},,32,8,1,{b},0,{c},False" for b in (1, 16) for c in (100, 2000)]
    rows += [f",{0.01 + n * n / 1e7},32,8,1,1,{n},0,True" for n in (32, 512, 4096)]
    (tmp_path / "attention.csv").write_text("\n".join([columns, *rows]))
    tables = model(tmp_path)
    assert tables.kernels.linear(512) == pytest.approx(32 * 10 * 0.1512e-3)
    assert tables.kernels.head is None
    assert tables.attention(Decoding(), plan([(0, 512)]).items)[0] == pytest.approx(
        32 * (0.01 + 0.0262144) * 1e-3, rel=1e-3
    )
    assert tables.attention(Decoding(16, 16 * 2001, 2001), ())[1] == pytest.approx(32 * 0.64e-3, rel=1e-3)
    with pytest.raises(ConfigError, match="hidden size of \\[4096\\]"):
        model(tmp_path, "qwen2.5-7b")


def test_a_directory_without_tables_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tables in"):
        model(tmp_path)
    write(tmp_path / "gemm_perf.parquet", [{"m": 1}])
    with pytest.raises(ConfigError, match="can't be used"):
        model(tmp_path)


@given(
    st.dictionaries(st.integers(1, 1000), st.floats(0, 10), min_size=1), st.floats(0, 2000), st.floats(0, 500)
)
def test_a_curve_rises_and_stays_above_its_floor(points: dict[float, float], x: float, more: float) -> None:
    curve = Curve(points, lambda size: size / 100)
    assert curve(x + more) >= curve(x) - 1e-12
    if x >= min(points):
        assert curve(x) >= x / 100 - 1e-9


def test_a_convex_curve_meets_one_that_is_and_shares_slopes_that_fall() -> None:
    square = {float(x): float(x * x) for x in (1, 2, 5, 9, 30)}
    assert Curve(square, lambda x: 0.0).convex().ys == pytest.approx(list(square.values()))
    dented = Curve({0.0: 0.0, 1.0: 2.0, 3.0: 3.0, 4.0: 9.0}, lambda x: 0.0).convex()
    assert dented.ys == pytest.approx([0, 1, 3, 9])


@given(
    st.dictionaries(st.integers(0, 50), st.floats(0, 100), min_size=1), st.integers(0, 60), st.integers(0, 9)
)
def test_a_convex_curve_is_convex(points: dict[int, float], x: int, step: int) -> None:
    curve = Curve({float(at): y for at, y in points.items()}, lambda x: 0.0).convex()
    least, most = curve.xs[0], curve.end
    a, b, c = (min(max(at, least), most) for at in (x, x + step, x + 2 * step))
    if b - a == c - b:
        assert curve(c) - curve(b) >= curve(b) - curve(a) - 1e-6


def test_a_surface_meets_its_points() -> None:
    points = {(b, c): b * c * 2.0 for b in (1, 4) for c in (10, 100)}
    surface = Surface({(float(b), float(c)): took for (b, c), took in points.items()}, lambda b, c: b * c)
    assert surface(2, 55) == pytest.approx(220)
    assert surface(8, 100) == pytest.approx(1600)
    assert surface.covers(4, 100)
    assert not surface.covers(4, 101)
    assert not surface.covers(5, 10)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measured tables aren't here")
@pytest.mark.parametrize("device", ["h100_sxm", "a100_sxm", "l40s"])
def test_measured_kernels_stay_within_what_is_physical(device: str) -> None:
    """No measured product or attention beats the datasheet, and none is a tenth of it once it is large."""
    described = hardware.load({"a100_sxm": "a100_80g"}.get(device, device))
    shape = model_shape.load("llama-3.1-8b")
    kernels = table_files.load(SHARED / device, shape, described, Parallel())
    tables = TablesCost(shape, described, kernels)
    bound = PhysicalCost(shape, described, PERFECT)
    for items in ([(0, 2048)], [(500, 1)] * 32, [(4000, 1)] * 64):
        share = bound.linear(sum(n for _, n in items)) / kernels.linear(sum(n for _, n in items))
        assert 0.5 < share <= 1
        assert 0.3 < tables.efficiency(plan(items)) < 1


# -- experts that are shared out ------------------------------------------------------------------------------

SPREAD = (
    Parallel(expert=8),
    Parallel(expert=8, imbalance=1.6),
    Parallel(tensor=2, expert=8),
    Parallel(tensor=2, expert=2),
    Parallel(tensor=2, expert=4, pipeline=2, microbatches=2),
)


def spread(where: Path, parallel: Parallel, device: str = "h100_sxm") -> TablesCost:
    shape, described = model_shape.load("qwen3-30b-a3b"), hardware.load(device)
    return TablesCost(
        shape, described, table_files.load(where, shape, described, parallel), parallel=parallel
    )


@pytest.fixture(scope="module")
def layouts(made: Path) -> list[TablesCost]:
    return [spread(made, parallel) for parallel in SPREAD]


def test_experts_that_are_shared_out_are_looked_up(layouts: list[TablesCost]) -> None:
    """At the tables' own points: all tokens for the experts, and an eighth of them for the rest."""
    even, busy, shared, unmeasured, _ = layouts
    for n, noise in ((8, 1.02), (64, 1.04)):
        least = max(
            16 * n * EXPERT / 8 / H100.peak("bfloat16"), EXPERT * min(8 * n, 128) / 4 / H100.memory_bytes_s
        )
        experts = even.linear(n) - even.kernels.linear(n / 8)
        assert experts == pytest.approx(48 * (3 * least + 5e-6) * noise)
        assert shared.linear(n) - shared.kernels.linear(n / 4) == pytest.approx(experts)
        assert busy.linear(n / 1.6) - busy.kernels.linear(n / 12.8) == pytest.approx(experts)
        without = unmeasured.linear(n) - unmeasured.kernels.linear(n)
        assert without == pytest.approx(unmeasured.expert_time(n))
    assert even.kernels.notes[-1].startswith("all-to-alls")
    said = [[note for note in one.kernels.notes if "laid out like this" in note] for one in layouts]
    assert [len(notes) for notes in said] == [0, 0, 0, 1, 1]


@given(st.integers(1, 4000), st.floats(1, 8))
def test_busy_experts_are_no_faster_than_the_roofline_where_tables_say_nothing(
    rows: int, imbalance: float
) -> None:
    shape, even = model_shape.load("qwen3-30b-a3b"), Parallel(expert=8)
    law = PhysicalCost(shape, H100, PERFECT, even)
    nothing = dict.fromkeys((1.0, 64.0, 4096.0), 0.0)
    kernels = Kernels(Curve(nothing, law.dense_time), experts=Curve(nothing, law.expert_time))
    tables = TablesCost(shape, H100, kernels, parallel=replace(even, imbalance=imbalance))
    bound = PhysicalCost(shape, H100, PERFECT, tables.parallel)
    assert tables.linear(rows) >= bound.linear(rows) * (1 - 1e-9)


@given(st.data(), batches)
def test_no_layout_of_experts_is_faster_than_its_roofline(
    layouts: list[TablesCost], data: st.DataObject, items: Items
) -> None:
    tables = data.draw(st.sampled_from(layouts))
    bound, took = tables.roofline().step_cost(plan(items)), tables.step_cost(plan(items))
    for term in ("weights", "attention", "kv_read", "collectives", "host"):
        assert getattr(took, term) >= getattr(bound, term) * (1 - 1e-9), term


def test_a_group_with_requests_of_its_own_has_its_part_of_their_attention(layouts: list[TablesCost]) -> None:
    """Eight requests on eight devices take what one takes on one; a chunk is launched on each that has one."""
    even = layouts[0]
    generation, context = even.kernels.generation, even.kernels.context
    assert generation is not None
    assert context is not None
    eight = even.step_cost(plan([(256, 1)] * 8))
    assert eight.kv_read == pytest.approx(48 * generation(1, 257))
    chunks = even.step_cost(plan([(0, 256)] * 8)).attention
    assert chunks == pytest.approx(48 * context(256))


def test_a_topology_with_experts_apart_has_tables(made: Path) -> None:
    words = "backend=sim", "cost=tables", f"cost.tables={made}", "cost.model=qwen3-30b-a3b", "topology=ep8"
    with compose.composer() as composer:
        cfg = composer.config([*words, "topology.groups.replica.tp=2"])
    validate(cfg)
    (cost, _), *_ = open_backend(cfg, Console(), None).replicas
    assert isinstance(cost, TablesCost)
    assert cost.parallel == Parallel(tensor=2, expert=8)
    assert cost.kernels.experts is not None


def test_an_all_to_all_is_launched_where_all_reduces_were_measured_with_their_launch(made: Path) -> None:
    tables = spread(made, Parallel(tensor=2, expert=8))
    plain = PhysicalCost(tables.shape, H100, parallel=tables.parallel)
    assert tables.launch_s == 0 < plain.launch_s
    waits = [
        max(cost.launch_s, cost._expert_link.latency_s) + cost.dispatch_s(64) for cost in (tables, plain)
    ]
    assert waits[0] == pytest.approx(waits[1])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measured tables aren't here")
@pytest.mark.parametrize("device", ["h100_sxm", "a100_sxm", "l40s"])
@pytest.mark.parametrize("parallel", [Parallel(expert=8), Parallel(tensor=2, expert=8), Parallel(expert=64)])
def test_measured_experts_stay_within_what_is_physical(device: str, parallel: Parallel) -> None:
    tables = spread(SHARED / device, parallel, {"a100_sxm": "a100_80g"}.get(device, device))
    for items in ([(0, 2048)], [(500, 1)] * 64, [(4000, 1)] * 256):
        assert 0.1 < tables.efficiency(plan(items)) < 1
    assert tables.kernels.experts is not None


def test_imbalance_is_of_experts_that_are_shared_out() -> None:
    shape = model_shape.load("qwen3-30b-a3b")
    for tensor in (1, 2):
        one, other = (PhysicalCost(shape, H100, parallel=Parallel(tensor, imbalance=x)) for x in (1.0, 3.0))
        for items in ([(70, 1)], [(0, 900), (70, 1)], [(0, 20_000)]):
            assert one.step_cost(plan(items)) == other.step_cost(plan(items))
