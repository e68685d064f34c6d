"""Models over several devices, against closed forms: microbatches and bubbles, all-reduces, experts shared out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.control.plan import Decoding, Work
from lab.errors import ConfigError
from lab.observe.bill import Power
from lab.observe.metrics import summarise
from lab.observe.recorder import Recorder
from sim import hardware, model_shape
from sim.capacity import blocks_that_fit, largest_step
from sim.cost.physical import MEASURED, PERFECT, Parallel, PhysicalCost
from sim.model_shape import Mixture, ModelShape
from sim.moves import Failure
from tests.policies.fleets import MS
from tests.sim.test_moves import serve, workload

H100 = hardware.load("h100_sxm")
LLAMA, QWEN = model_shape.load("llama-3.1-8b"), model_shape.load("qwen3-30b-a3b")
BARE = replace(MEASURED, layer_us=0.0, sequence_us=0.0)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_p_stages_and_m_microbatches_take_m_plus_p_minus_1_stage_times(stages: int, parts: int) -> None:
    rows = 4096
    laid = PhysicalCost(LLAMA, H100, BARE, Parallel(pipeline=stages, microbatches=parts))
    whole = PhysicalCost(LLAMA, H100, BARE)
    stage = whole.linear(rows / parts) / stages
    cost = laid.cost_of(Decoding(rows, 0, 0), ())
    head = laid.head(rows / parts) * parts
    assert cost.weights - head == pytest.approx((parts + stages - 1) * stage, rel=1e-12)
    link = H100.link
    send = max(8.8e-6, link.latency_s) + rows / parts * LLAMA.hidden * 2 / link.bytes_s
    assert cost.collectives == pytest.approx((parts + stages - 2) * send if stages > 1 else 0.0, rel=1e-12)


@pytest.mark.parametrize(("stages", "parts"), [(2, 1), (3, 4), (8, 2)])
def test_attention_and_host_pass_the_stages_as_the_weights_do(stages: int, parts: int) -> None:
    batch = Decoding(48, 48_000, 1000), (Work("r", 512, 256, False),)
    whole = PhysicalCost(LLAMA, H100, MEASURED).cost_of(*batch)
    laid = PhysicalCost(LLAMA, H100, MEASURED, Parallel(pipeline=stages, microbatches=parts)).cost_of(*batch)
    turns = (parts + stages - 1) * -(-32 // stages)  # each of so many layers
    assert laid.attention == pytest.approx(whole.attention / 32 / parts * turns, rel=1e-12)
    assert laid.kv_read == pytest.approx(whole.kv_read / 32 / parts * turns, rel=1e-12)
    assert laid.host - whole.host == pytest.approx(MEASURED.layer_us * 1e-6 * (turns - 32), rel=1e-9)


def test_each_device_of_a_replica_holds_its_part_of_weights_and_heads() -> None:
    assert Parallel(2, 4).weight_bytes(LLAMA) == LLAMA.weight_bytes / 8
    assert [Parallel(n).kv_share(LLAMA) for n in (1, 4, 8, 16)] == [1, 1 / 4, 1 / 8, 1 / 8]


def test_devices_of_more_than_one_node_meet_over_the_network() -> None:
    size = 1e9
    for devices, link in ((8, H100.link), (16, H100.network)):
        for coefficients, share in ((MEASURED, MEASURED.link), (PERFECT, devices / (2 * devices - 2))):
            cost = PhysicalCost(LLAMA, H100, coefficients, Parallel(devices))
            assert cost.reduce_s(size) == pytest.approx(size / (link.bytes_s * share), rel=1e-12)
        stages = PhysicalCost(LLAMA, H100, BARE, Parallel(pipeline=devices))
        sends = stages.cost_of(Decoding(64, 0, 0), ()).collectives
        each = max(BARE.collective_us * 1e-6, link.latency_s) + 64 * 4096 * 2 / link.bytes_s
        assert sends == pytest.approx((devices - 1) * each, rel=1e-12)


def test_layers_shared_by_devices_wait_for_two_all_reduces_each() -> None:
    rows, tensor = 256, 4
    cost = PhysicalCost(LLAMA, H100, MEASURED, Parallel(tensor)).cost_of(Decoding(rows, 0, 0), ())
    ring = max(2 * (tensor - 1) / tensor, 1 / MEASURED.link) / 450e9
    layers = 2 * 32 * (8.8e-6 + rows * 4096 * 2 * ring)
    gather = 8.8e-6 + rows * 128256 * ring
    assert cost.collectives == pytest.approx(layers + gather, rel=1e-12)


def test_shared_out_experts_are_read_once_somewhere_and_tokens_go_there_and_back() -> None:
    rows, devices = 64, 8
    laid = PhysicalCost(QWEN, H100, BARE, Parallel(expert=devices))
    one = PhysicalCost(QWEN, H100, BARE)
    assert laid.expert_time(rows) == pytest.approx(one.expert_time(rows) / devices)
    batch = Decoding(rows, rows * 900, 900), (Work("r", 64, 128, False),)
    mine, all_of_it = (model.cost_of(*batch) for model in (laid, one))
    assert mine.attention == pytest.approx(all_of_it.attention / devices)
    assert mine.kv_read == pytest.approx(all_of_it.kv_read / devices)
    cost = laid.cost_of(Decoding(rows, 0, 0), ())
    # 8 tokens a device, 8 experts each, 7 of 8 of those elsewhere, 2048 values of 2 bytes; 48 layers, both ways.
    size = 8 * 8 * 7 / 8 * 2048 * 2
    assert laid.dispatch_bytes(rows) == size
    each = 8.8e-6 + size / (450e9 * MEASURED.link)
    assert cost.collectives == pytest.approx(2 * 48 * each, rel=1e-12)


def test_the_busiest_device_sets_the_pace_but_reads_no_more_than_it_has() -> None:
    even, uneven = (
        PhysicalCost(QWEN, H100, BARE, Parallel(expert=8, imbalance=share)) for share in (1.0, 1.5)
    )
    assert uneven.expert_time(16) == pytest.approx(1.5 * even.expert_time(16))
    assert uneven.expert_time(600) == pytest.approx(even.expert_time(600), rel=1e-6)
    assert uneven.expert_time(60_000) == pytest.approx(1.5 * even.expert_time(60_000))


def test_each_device_holds_its_experts_and_all_of_the_rest() -> None:
    experts = 48 * 128 * QWEN.expert_linear * QWEN.weight_width
    held = Parallel(expert=8).weight_bytes(QWEN)
    assert held == pytest.approx(QWEN.weight_bytes - experts * 7 / 8)
    for wrong, said in ((LLAMA, "has no experts"), (replace(QWEN, name="q"), "128 experts")):
        with pytest.raises(ConfigError, match=said):
            Parallel(expert=7).check(wrong)
    with pytest.raises(ConfigError, match="multiple or a divisor of tp"):
        Parallel(2, expert=3).check(reshaped(count=24))
    with pytest.raises(ConfigError, match="cut in 16 parts"):
        Parallel(32, expert=2).check(reshaped(size=776))
    Parallel(32, expert=2).check(QWEN)


def reshaped(count: int = 128, size: int = 768) -> ModelShape:
    return replace(QWEN, mixture=Mixture(count, 8, size))


LAYOUTS = [
    Parallel(8, expert=8),
    Parallel(2, expert=8),
    Parallel(4, expert=2),
    Parallel(4, 3, 2, 4),
    Parallel(2, 2, 3, 4),
    Parallel(1, 4, 1, 2),
]


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v2-lite"])
@pytest.mark.parametrize("laid", LAYOUTS, ids=str)
def test_devices_together_hold_the_model_and_what_groups_have_each(laid: Parallel, model: str) -> None:
    shape = model_shape.load(model)
    stage = max(laid.tensor, laid.expert)
    assert laid.devices == stage * laid.pipeline
    groups = stage // laid.tensor
    sparse = sum(kind.count for kind in shape.kinds if kind.sparse)
    assert shape.mixture is not None
    experts = sparse * shape.mixture.count * 3 * shape.hidden * shape.mixture.size * 2
    assert laid.weight_bytes(shape) * laid.devices == pytest.approx(
        experts + groups * (shape.weight_bytes - experts), rel=1e-12
    )
    copies = laid.tensor if shape.mla else max(laid.tensor // shape.kv_heads, 1)
    assert laid.kv_share(shape) * stage == pytest.approx(copies)


def test_room_for_kv_follows_from_what_a_device_holds_of_weights_and_of_each_block() -> None:
    words = {"utilization": 0.9, "block_size": 16, "token_budget": 512, "max_seqs": 64, "reserved_gib": 1.0}
    laid = Parallel(2, 2, 1, 8)  # 4 groups of 2, over two stages of 24 layers
    found = blocks_that_fit(QWEN, H100, parallel=laid, **words)  # type: ignore[arg-type]
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    weights = (QWEN.weight_bytes - experts) / 4 + experts / 16
    free = H100.memory_bytes * 0.9 - weights - largest_step(QWEN, 512, 64, 2) - (1 << 30)
    of_four_requests = (
        16 * 24 * 2 * 2 * 128 * 2
    )  # one block each: tokens, layers, K and V, 2 of 4 heads, bytes
    assert found == int(free // (of_four_requests / 4))


@pytest.mark.parametrize(("tensor", "stages", "parts"), [(8, 1, 1), (8, 2, 3), (4, 1, 1)])
def test_experts_on_the_devices_that_share_a_layer_wait_for_all_reduces_alone(
    tensor: int, stages: int, parts: int
) -> None:
    """tp = ep: every device has all tokens, computes its own experts' share of them, and sums are reduced."""
    batch = Decoding(8, 8 * 900, 900), (Work("r", 120, 8, False),)
    laid = PhysicalCost(QWEN, H100, BARE, Parallel(tensor, stages, parts, tensor))
    plain = PhysicalCost(QWEN, H100, BARE, Parallel(tensor, stages, parts))
    one, other = laid.cost_of(*batch), plain.cost_of(*batch)
    assert (one.attention, one.kv_read, one.collectives, one.host) == (
        other.attention, other.kv_read, other.collectives, other.host,
    )  # fmt: skip
    assert one.weights == pytest.approx(other.weights, rel=1e-12)  # 128 / n whole ones, or 128 n-th parts
    skewed = PhysicalCost(QWEN, H100, BARE, Parallel(tensor, stages, parts, tensor, 1.5))
    rows = 16 / parts
    turns = (parts + stages - 1) / stages
    more = 0.5 * PhysicalCost(QWEN, H100, BARE).expert_time(rows) / tensor * turns
    assert skewed.cost_of(*batch).weights - one.weights == pytest.approx(more, rel=1e-9)


@pytest.mark.parametrize(("tensor", "expert", "stages", "parts"), [(2, 8, 1, 1), (2, 8, 2, 3), (1, 4, 4, 2)])
def test_groups_of_devices_with_requests_of_their_own_by_hand(
    tensor: int, expert: int, stages: int, parts: int
) -> None:
    rows = 96
    laid = PhysicalCost(QWEN, H100, BARE, Parallel(tensor, stages, parts, expert))
    one = PhysicalCost(QWEN, H100, BARE)
    groups = expert // tensor
    turns = (parts + stages - 1) / stages  # how often all layers' time passes, for one microbatch
    c, peak, memory = BARE, H100.peak("bfloat16"), H100.memory_bytes_s
    part = rows / parts

    dense = QWEN.attention_linear + QWEN.always_linear
    row, read = 2 * dense / tensor / (peak * c.mfu), dense * 2 / tensor / (memory * c.weight_read)
    each = QWEN.expert_linear
    touched = 128 * (1 - (1 - 8 / 128) ** part) / expert
    sparse = max(2 * each * 8 * part / expert / (peak * c.mfu), touched * each * 2 / (memory * c.weight_read))
    head = 151936 * 2048 * 2 / tensor
    seqs = rows // groups / parts
    logits = parts * max(seqs * head / (peak * c.mfu), head / (memory * c.weight_read))
    cost = laid.cost_of(Decoding(rows, 0, 0), ())
    layers = 48 * turns * (max(part / groups * row, read) + sparse)
    assert cost.weights == pytest.approx(layers + logits, rel=1e-12)

    launch, ring = 8.8e-6, 1 / c.link / 450e9
    size = part / groups * 2048 * 2
    wait = 0.0
    if tensor > 1:  # a reduce-scatter and an all-gather: each half of an all-reduce
        wait += 48 * turns * (2 * launch + size * ring) + launch + rows / groups * 151936 * 2 / 2 * ring
    sent = part / expert * 8 * (expert - 1) / expert * 2048 * 2
    link = H100.link if expert * stages <= 8 else H100.network
    wait += 2 * 48 * turns * (launch + sent / (450e9 * c.link))
    wait += (parts + stages - 2) * (max(launch, link.latency_s) + size / link.bytes_s)
    assert cost.collectives == pytest.approx(wait, rel=1e-12)

    batch = Decoding(rows, rows * 900, 900), (Work("r", 64, 128, False),)
    mine, all_of_it = (model.cost_of(*batch) for model in (laid, one))
    share = groups * parts / (parts + stages - 1) * stages
    assert mine.kv_read == pytest.approx(all_of_it.kv_read / tensor / share, rel=1e-12)
    assert mine.attention == pytest.approx(all_of_it.attention / tensor / share, rel=1e-12)


def test_dense_layers_beside_sparse_ones_are_reduced_as_usual() -> None:
    shape = model_shape.load("deepseek-v2-lite")  # 27 layers, the first of them dense
    rows = 64
    laid = PhysicalCost(shape, H100, BARE, Parallel(2, expert=8))
    ring = 1 / BARE.link / 450e9
    size = rows / 4 * shape.hidden * 2
    wait = 2 * (8.8e-6 + size * ring) + 26 * (2 * 8.8e-6 + size * ring)
    wait += 8.8e-6 + rows / 4 * shape.vocab * 2 / 2 * ring
    wait += 2 * 26 * (8.8e-6 + rows / 8 * 6 * 7 / 8 * shape.hidden * 2 * ring)
    assert laid.cost_of(Decoding(rows, 0, 0), ()).collectives == pytest.approx(wait, rel=1e-12)


def test_experts_reach_over_the_network_where_a_stage_is_larger_than_a_node() -> None:
    for expert, link in ((8, H100.link), (16, H100.network)):
        laid = PhysicalCost(QWEN, H100, BARE, Parallel(2, 2, 1, expert))
        assert laid.dispatch_s(64) == pytest.approx(laid.dispatch_bytes(64) / (link.bytes_s * BARE.link))


# -- what it costs -------------------------------------------------------------------------------------------


def test_the_bill_is_idle_power_while_up_more_while_busy_and_the_price_of_the_time() -> None:
    recorder, _ = serve(workload(1), ("prefill", "decode"))
    power = {0: Power(2, 100.0, 700.0, 3.0), 1: Power(1, 50.0, 300.0, 1.0)}
    found = summarise(recorder, block_size=16, power=power)
    busy = [sum(step.timing.total_ns for step in recorder.steps if step.replica == r) for r in (0, 1)]
    assert busy[0] > 0
    joules = sum(
        own.devices * (own.idle_w * held + (own.tdp_w - own.idle_w) * busy[r]) / 1e9
        for (r, own), held in zip(power.items(), _up(recorder), strict=True)
    )
    tokens = found["tokens"]["output"]
    assert found["energy"]["kwh"] == pytest.approx(joules / 3.6e6)
    assert found["energy"]["kwh_per_million_output_tokens"] == pytest.approx(joules / 3.6e6 / tokens * 1e6)
    usd = sum(
        own.devices * own.price_per_hour * held / 3.6e12
        for own, held in zip(power.values(), _up(recorder), strict=True)
    )
    assert found["cost"]["usd"] == pytest.approx(usd)
    assert found["transfer"]["bytes"] == sum(m.bytes for r in recorder.requests for m in r.transfers) > 0
    assert summarise(recorder, block_size=16)["energy"]["kwh"] is None


def test_a_replica_is_paid_for_from_its_start_cold_start_included_until_it_is_lost() -> None:
    failure = Failure(0, 100 * MS, 200 * MS)
    recorder, _ = serve(workload(1), (), None, replicas=2, failures=[failure], cold_start=500 * MS)
    end = max(event.at for event in recorder.fleet)
    assert end > 900 * MS
    power = {replica: Power(1, 100.0, 100.0, 3.6) for replica in range(3)}
    found = summarise(recorder, block_size=16, power=power)
    up = (100 * MS + end + end - 300 * MS) / 1e9
    assert found["fleet"]["replica_seconds"] == pytest.approx(up)
    assert found["cost"]["usd"] == pytest.approx(up / 1000)
    assert found["energy"]["kwh"] == pytest.approx(up / 36_000)


def _up(recorder: Recorder) -> list[int]:
    return [
        next(e.at for e in recorder.fleet if (e.replica, e.event) == (r, "gone"))
        - next(e.at for e in recorder.fleet if e.replica == r)
        for r in (0, 1)
    ]
