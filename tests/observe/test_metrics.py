"""Metrics against sums done again from scratch, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

import pytest
from hypothesis import given

from lab.control.observer import Decision, Interval, RequestRecord
from lab.control.plan import GENESIS
from lab.control.request import Prompt, Request
from lab.observe import latency
from lab.observe.metrics import METRICS, summarise
from lab.observe.prometheus import prometheus_text
from lab.observe.recorder import Recorder
from lab.observe.tally import joined_digest
from tests.observe.made import play, rich, runs

MS = 1_000_000


def leaves(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= leaves(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def percentile(samples: list[float], rank: float) -> float:
    """Linear interpolation between order statistics, spelled out."""
    ordered = sorted(samples)
    position = rank / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def served(name: str, arrival: int, start: int, tokens: list[int], **request: Any) -> RequestRecord:
    """A request that waited, was prefilled and decoded; times in ms."""
    first, last = tokens[0] * MS, tokens[-1] * MS
    return RequestRecord(
        request=Request(
            id=name, prompt=Prompt.of(range(20)), arrival=arrival * MS, output_len=len(tokens), **request
        ),
        seq=0,
        decision=Decision(True, "", 0, ""),
        outcome="finished",
        reason="length",
        end=last,
        cached_tokens=16,
        cached_blocks=1,
        computed_tokens=20 - 16 + len(tokens) - 1,
        preemptions=0,
        token_times=tuple(time * MS for time in tokens),
        intervals=(
            Interval("queue", arrival * MS, start * MS, "arrival"),
            Interval("prefill", start * MS, first, "", 0, 0),
            Interval("decode", first, last, "", 1, len(tokens) - 1),
        ),
        output=(),
    )


def test_numbers_worked_out_by_hand() -> None:
    recorder = Recorder()
    recorder.on_request(served("a", 10, 12, [20, 30, 50], ttft_slo=10 * MS, tpot_slo=15 * MS))
    recorder.on_request(served("b", 30, 30, [60], ttft_slo=29 * MS))
    got = leaves(summarise(recorder, block_size=16, wall_s=1.5))
    expected = {
        "ttft_ms.mean": 20.0,  # 10 and 30
        "ttft_ms.p50": 20.0,
        "ttft_ms.p90": 28.0,
        "tpot_ms.mean": 15.0,  # a: 30 / 2; b has one token
        "itl_ms.p50": 15.0,  # 10 and 20
        "e2e_ms.mean": 35.0,  # 40 and 30
        "queue_ms.p99": 1.98,  # 2 and 0
        "duration_s": 0.05,
        "throughput.requests_per_s": 40.0,
        "throughput.output_tokens_per_s": 80.0,
        "throughput.total_tokens_per_s": 880.0,
        "goodput.requests_per_s": 20.0,  # a just meets both, b misses by a millisecond
        "goodput.attainment": 0.5,
        "kv.prefix_hit_ratio_tokens": 0.8,
        "kv.prefix_hit_ratio_blocks": 0.5,
        "wall_s": 1.5,
    }
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_the_table_of_formulas_and_the_file_have_the_same_keys() -> None:
    summary = summarise(rich(), block_size=16)
    groups = {
        key.removesuffix(f".{name}") for key in leaves(summary) for name in ("mean", "p50", "p90", "p99")
    }
    keys = {key.removesuffix(".mean") for key in leaves(summary) if not re.search(r"\.p\d+$", key)}
    assert keys == {metric.key for metric in METRICS}
    assert groups
    for metric in METRICS:
        if metric.unit.startswith("ms:"):
            assert set(summary[metric.key]) == {"mean", "p50", "p90", "p99"}


@given(runs())
def test_every_metric_equals_its_sum_done_again(recorder: Recorder) -> None:
    got = summarise(recorder, block_size=16)
    finished = [record for record in recorder.requests if record.outcome == "finished"]
    samples: dict[str, list[float]] = {
        "ttft_ms": [record.token_times[0] - record.request.arrival for record in finished],
        "e2e_ms": [record.token_times[-1] - record.request.arrival for record in finished],
        "itl_ms": [
            record.token_times[i] - record.token_times[i - 1]
            for record in finished
            for i in range(1, len(record.token_times))
        ],
        "tpot_ms": [
            (record.token_times[-1] - record.token_times[0]) / (len(record.token_times) - 1)
            for record in finished
            if len(record.token_times) > 1
        ],
        "queue_ms": [record.intervals[0].end - record.request.arrival for record in finished],
    }
    for key, values in samples.items():
        if not values:
            assert set(got[key].values()) == {None}
            continue
        assert got[key]["mean"] == pytest.approx(sum(values) / len(values) / 1e6)
        for rank in (50, 90, 99):
            assert got[key][f"p{rank}"] == pytest.approx(percentile(values, rank) / 1e6)
    ran = [record for record in recorder.requests if len(record.intervals) > 1]
    prompts = sum(len(record.request.prompt) for record in ran)
    if prompts:
        hits = sum(record.cached_tokens for record in ran)
        assert got["kv"]["prefix_hit_ratio_tokens"] == pytest.approx(hits / prompts)
    assert sum(got["requests"].values()) == len(recorder.requests)
    assert got["preemptions"] == sum(len(step.plan.preempted) for step in recorder.steps)
    assert got["plan_digest"] == (recorder.steps[-1].plan.digest if recorder.steps else GENESIS)
    assert 0 <= (got["goodput"]["attainment"] or 0) <= 1


@given(runs())
def test_ttft_and_the_gaps_add_up_to_e2e_exactly(recorder: Recorder) -> None:
    for record in recorder.requests:
        if record.outcome == "finished":
            assert latency.ttft_ns(record) + sum(latency.itls_ns(record)) == latency.e2e_ns(record)


@given(runs())
def test_the_file_is_strict_json(recorder: Recorder) -> None:
    json.dumps(summarise(recorder, block_size=16), allow_nan=False)


def test_an_empty_run_has_nulls_and_zeros() -> None:
    got = leaves(summarise(Recorder(), block_size=16))
    assert got["ttft_ms.p99"] is None
    assert got["throughput.requests_per_s"] is None
    assert got["kv.mean_utilisation"] is None
    assert (got["steps"], got["duration_s"], got["kv.peak_blocks"]) == (0, 0, 0)


def test_a_refusal_lowers_attainment() -> None:
    recorder = Recorder()
    recorder.on_request(served("a", 0, 0, [1]))
    before = summarise(recorder, block_size=16)["goodput"]["attainment"]
    refused = next(record for record in rich().requests if record.outcome == "rejected")
    recorder.on_request(refused)
    assert (before, summarise(recorder, block_size=16)["goodput"]["attainment"]) == (1.0, 0.5)


def test_two_replicas_have_one_digest_that_depends_on_both() -> None:
    left, right, other = (play(random.Random(n), 6, replica=n % 2).steps for n in (2, 1, 3))
    one, two, three = ({part[-1].replica: part[-1].plan.digest} for part in (left, right, other))
    assert joined_digest(one | two) == joined_digest(two | one)
    assert joined_digest(one | two) != joined_digest(one | three)


@given(runs())
def test_prometheus_histograms_are_cumulative_and_agree_with_the_records(recorder: Recorder) -> None:
    values: dict[str, float] = {}
    for line in prometheus_text(recorder, model='a "model"').splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r'(vllm:\w+)\{model_name="a \\"model\\"",engine="(-?\d+)"(.*)\} (\S+)', line)
            assert match, line
            name, engine, more, value = match.groups()
            key = f"{name}|{engine}|{more}"
            assert key not in values
            values[key] = float(value)

    def total(name: str) -> float:
        return sum(value for key, value in values.items() if key.startswith(f"vllm:{name}|"))

    finished = [record for record in recorder.requests if record.outcome == "finished"]
    assert total("e2e_request_latency_seconds_count") == len(finished)
    assert total("e2e_request_latency_seconds_sum") == pytest.approx(sum(map(latency.e2e_ns, finished)) / 1e9)
    assert total("request_success_total") == len(finished)
    assert total("generation_tokens_total") == sum(len(record.token_times) for record in recorder.requests)
    assert total("num_preemptions_total") == sum(len(step.plan.preempted) for step in recorder.steps)
    for key in values:
        if "_count|" in key:
            buckets = [
                v for k, v in values.items() if k.startswith(key.replace("_count|", "_bucket|") + ",le=")
            ]
            assert buckets == sorted(buckets)
            assert buckets[-1] == values[key]


def test_a_value_on_a_bucket_bound_belongs_to_that_bucket() -> None:
    recorder = Recorder()
    recorder.on_request(served("a", 0, 0, [20, 30]))
    text = prometheus_text(recorder, model="m")
    assert 'time_to_first_token_seconds_bucket{model_name="m",engine="0",le="0.02"} 1.0' in text
    assert 'time_to_first_token_seconds_bucket{model_name="m",engine="0",le="0.01"} 0.0' in text
