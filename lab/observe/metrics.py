"""What is measured of a run, by one table of formulas. Observation path.

`summarise` makes `metrics.json`, whose keys are those of `METRICS`. Populations are named with each formula,
because the same word means different sums in different tools (`aliases`): t_a is the arrival that was
intended, t_s the first time scheduled, t_1 .. t_n the times of the n output tokens.

Percentiles interpolate linearly between order statistics (numpy's default). What has no sample is null, never
NaN or 0. Times of one request are `lab/observe/latency.py`'s, sums `lab/observe/tally.py`'s, energy and cost
`lab/observe/bill.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lab.control.observer import StepTotals
from lab.observe.bill import Power
from lab.observe.recorder import Recorded
from lab.observe.tally import Tally


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of `metrics.json`: its key, what is summed over whom, and what other tools call it."""

    key: str
    formula: str
    unit: str
    aliases: Mapping[str, str] = field(default_factory=dict)


def _latency(key: str, formula: str, **aliases: str) -> Metric:
    return Metric(key, formula, "ms: mean, p50, p90, p99", aliases)


_ALL = "over all requests that arrived"
_FINISHED = "over finished requests"

METRICS: tuple[Metric, ...] = (
    Metric("requests.finished", "requests that generated all of their output", "requests",
           {"vllm bench": "completed", "aiperf": "request_count"}),
    Metric("requests.rejected", "requests refused at the gateway or given up by the policy", "requests"),
    Metric("requests.aborted", "requests cancelled by their sender", "requests"),
    Metric("requests.unfinished", "requests that the end of the run cut off", "requests"),
    _latency("ttft_ms", f"t_1 - t_a {_FINISHED}; from the intended arrival, so client-side queueing counts",
             vllm="time_to_first_token_seconds", aiperf="time_to_first_token (from send)",
             guidellm="time_to_first_token_ms", sarathi="prefill_e2e_time"),
    _latency("tpot_ms", f"(t_n - t_1) / (n - 1) {_FINISHED} with n >= 2; every request weighs the same",
             vllm="request_time_per_output_token_seconds", aiperf="inter_token_latency",
             guidellm="inter_token_latency_ms (its time_per_output_token_ms includes TTFT)"),
    _latency("itl_ms", f"t_i - t_(i-1), i >= 2, pooled {_FINISHED}; long outputs weigh more",
             vllm="inter_token_latency_seconds", aiperf="inter_chunk_latency", sarathi="tbt"),
    _latency("e2e_ms", f"end - t_a {_FINISHED}; the end is t_n",
             vllm="e2e_request_latency_seconds", aiperf="request_latency",
             guidellm="request_latency", sarathi="request_e2e_time"),
    _latency("queue_ms", f"t_s - t_a {_FINISHED}: waiting before the first schedule only",
             vllm="request_queue_time_seconds", sarathi="request_scheduling_delay"),
    _latency("queue_total_ms", f"all time spent waiting, after preemptions too, {_FINISHED}"),
    Metric("throughput.requests_per_s", "finished requests / duration_s", "1/s",
           {"vllm bench": "request_throughput", "aiperf": "request_throughput"}),
    Metric("throughput.output_tokens_per_s", f"output tokens {_FINISHED} / duration_s", "1/s",
           {"vllm bench": "output_throughput", "aiperf": "output_token_throughput"}),
    Metric("throughput.total_tokens_per_s", f"prompt and output tokens {_FINISHED} / duration_s", "1/s",
           {"vllm bench": "total_token_throughput", "aiperf": "total_token_throughput"}),
    Metric("goodput.requests_per_s", "finished requests that met every SLO they have, TTFT <= ttft_slo and "
           "TPOT <= tpot_slo (one token: TPOT is 0), / duration_s", "1/s",
           {"vllm bench": "request_goodput", "aiperf": "goodput"}),
    Metric("goodput.attainment", f"those requests / requests, {_ALL}: a refusal is a miss", "ratio",
           {"scorpio": "slo adherence", "distserve": "SLO attainment"}),
    Metric("kv.prefix_hit_ratio_tokens", "prompt tokens supplied by the prefix cache at the first admission "
           "/ prompt tokens, over requests that were ever scheduled", "ratio",
           {"vllm": "prefix_cache_hits / prefix_cache_queries"}),
    Metric("kv.prefix_hit_ratio_blocks", "the same in blocks: cached blocks / ceil(prompt tokens / block "
           "size)", "ratio", {"mooncake": "cache hit ratio"}),
    Metric("kv.evictions", "blocks whose cached content was dropped to make room", "blocks"),
    Metric("kv.peak_blocks", "most blocks referenced right after a planning", "blocks"),
    Metric("kv.peak_utilisation", "most referenced blocks / all blocks, over steps", "ratio"),
    Metric("kv.mean_utilisation", "referenced blocks / all blocks, weighted by the steps' durations", "ratio",
           {"vllm": "kv_cache_usage_perc (a gauge; also without cached but unreferenced blocks)"}),
    Metric("tokens.prompt", f"prompt tokens {_FINISHED}", "tokens"),
    Metric("tokens.output", f"output tokens {_FINISHED}", "tokens"),
    Metric("tokens.computed", f"tokens put through the model, recomputation included, {_ALL}", "tokens"),
    Metric("preemptions", "times a running request lost its blocks", "preemptions",
           {"vllm": "num_preemptions"}),
    Metric("swapped_blocks", "blocks copied between device and host, both ways", "blocks"),
    Metric("prediction.kendall_tau", f"rank correlation of foreseen and true output lengths {_FINISHED}; null "
           "where all were known", "-1 .. 1"),
    Metric("prediction.mean_abs_error_tokens", f"abs(foreseen - true output length) {_FINISHED}", "tokens"),
    Metric("fleet.replica_seconds", "time that replicas were up, each from its start, cold start included, until "
           "it was gone", "s"),
    Metric("fleet.most_replicas", "most replicas up at once, those that start or drain included", "replicas"),
    Metric("fleet.cold_starts", "replicas that were started during the run", "replicas"),
    Metric("fleet.failures", "replicas that were lost during the run", "replicas"),
    Metric("energy.kwh", "estimate: sum over replicas of devices * (idle_w * time up + (tdp_w - idle_w) * time in "
           "steps), with the powers of the hardware description; null where nothing is described", "kWh"),
    Metric("energy.kwh_per_million_output_tokens", "energy.kwh / output tokens in millions", "kWh"),
    Metric("energy.busy_ratio", "time in steps / time up, over replicas", "ratio"),
    Metric("cost.usd", "estimate: sum over replicas of devices * price_per_hour * time up", "USD"),
    Metric("cost.usd_per_million_output_tokens", "cost.usd / output tokens in millions", "USD"),
    Metric("transfer.requests", "moves of a request's KV from one replica to another", "moves"),
    Metric("transfer.bytes", "bytes of them", "bytes"),
    _latency("transfer_queue_ms", "waiting of each move, for room at its destination and for the link"),
    _latency("transfer_wire_ms", "time of each move on the link, its latency included"),
    Metric("ingest.lag_p99_ms", "wall time from the intended arrival until the request was taken in, which is part "
           f"of every latency above, {_ALL}; null under a virtual clock", "ms"),
    Metric("ingest.lag_max_ms", "the longest of these", "ms"),
    Metric("steps", "engine iterations", "steps"),
    Metric("duration_s", "from the first arrival to the end of the last request or step, run time", "s",
           {"vllm bench": "duration (from the first send)"}),
    Metric("plan_digest", "digest of the last plan, chained over all earlier ones: equal when every decision "
           "was (several replicas: a digest of theirs in order)", "hex"),
    Metric("wall_s", "wall-clock time that the run itself took; null if not measured", "s"),
)  # fmt: skip


def summarise(
    recorded: Recorded,
    *,
    block_size: int,
    wall_s: float | None = None,
    power: Mapping[int, Power] = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of `metrics.json`: nested dicts whose leaves are numbers, strings or null."""
    tally = Tally(block_size)
    tally.add(recorded.requests)
    totals: dict[int, StepTotals] = {}
    for step in recorded.steps:
        blocks = step.blocks_free + step.blocks_cached + step.blocks_held
        total = totals.setdefault(step.replica, StepTotals())
        total.step(step.start, step.timing.total_ns, blocks, step.blocks_held, step.plan.digest)
        total.decided(step.plan, step.evicted)
    return tally.result(totals, recorded.fleet, wall_s, power)
