"""Models over several devices, against closed forms: microbatches and bubbles, all-reduces, experts shared out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.control.plan import Decoding, Work
from lab.errors import ConfigError
from lab.observe.metrics import Power, summarise
from lab.observe.recorder import Recorder
from sim import hardware, model_shape
from sim.cost.physical import MEASURED, PERFECT, Parallel, PhysicalCost
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
    with pytest.raises(ConfigError, match="tp=1 and pp=1"):
        Parallel(2, expert=8).check(QWEN)


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
