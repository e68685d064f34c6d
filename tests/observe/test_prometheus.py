"""The text parses with Prometheus' own client, under names that vLLM's dashboards know."""

from __future__ import annotations

import math
import random
from collections import Counter

from hypothesis import given
from prometheus_client.parser import text_string_to_metric_families

from lab.observe import latency
from lab.observe.prometheus import prometheus_text
from lab.observe.recorder import Recorder
from tests.observe.made import play, rich, runs

VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "num_preemptions": "counter",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prompt_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "iteration_tokens_total": "histogram",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
}
"""As vLLM 0.32 registers them (`vllm/v1/metrics/loggers.py`); the client adds `_total` to counters."""


@given(recorder=runs())
def test_the_client_parses_the_text_and_knows_the_names(recorder: Recorder) -> None:
    families = list(text_string_to_metric_families(prometheus_text(recorder, model='a "b"\\\n')))
    assert {family.name: family.type for family in families} == {
        f"vllm:{n}": kind for n, kind in VLLM.items()
    }
    for family in families:
        assert family.documentation
        keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(set(keys)) == len(keys)
        for sample in family.samples:
            assert sample.labels["model_name"] == 'a "b"\\\n'
            assert math.isfinite(sample.value)
            assert sample.value >= 0


def test_the_values_are_the_runs_own() -> None:
    a, b = rich(), play(random.Random(9), 30, 300, replica=2)
    both = Recorder()
    both.requests += a.requests + b.requests
    both.steps += a.steps + b.steps
    families = {f.name[5:]: f for f in text_string_to_metric_families(prometheus_text(both, model="m"))}
    for recorder, engine in ((a, "0"), (b, "2")):

        def value(name: str, suffix: str = "", **labels: str) -> float:
            [found] = [
                sample.value
                for sample in families[name].samples
                if sample.name == f"vllm:{name}{suffix}"
                and sample.labels.items() >= {"engine": engine, **labels}.items()  # noqa: B023
            ]
            return found

        chosen = [r for r in recorder.requests if r.decision.replica >= 0]
        finished = [r for r in chosen if r.outcome == "finished"]
        last = recorder.steps[-1]
        assert value("num_requests_running") == last.running
        assert value("num_preemptions", "_total") == sum(len(step.plan.preempted) for step in recorder.steps)
        assert value("generation_tokens", "_total") == sum(len(r.token_times) for r in chosen)
        for reason, count in Counter(r.reason for r in finished).items():
            assert value("request_success", "_total", finished_reason=reason) == count
        assert value("e2e_request_latency_seconds", "_count") == len(finished)
        total = sum(latency.e2e_ns(r) or 0 for r in finished) / 1e9
        assert math.isclose(value("e2e_request_latency_seconds", "_sum"), total, rel_tol=1e-9)
        for name in ("time_to_first_token_seconds", "iteration_tokens_total"):
            buckets = [
                (float(s.labels["le"]), s.value)
                for s in families[name].samples
                if s.name.endswith("_bucket") and s.labels["engine"] == engine
            ]
            assert buckets == sorted(buckets)
            assert [n for _, n in buckets] == sorted(n for _, n in buckets)
            assert buckets[-1] == (math.inf, value(name, "_count"))
        sizes = [step.plan.tokens for step in recorder.steps]
        assert value("iteration_tokens_total", "_bucket", le="16.0") == sum(size <= 16 for size in sizes)
