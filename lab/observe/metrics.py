"""What is measured of a run, by one table of formulas. Observation path.

`summarise` makes `metrics.json`, whose keys are those of `METRICS`. Populations are named with each formula,
because the same word means different sums in different tools (`aliases`): t_a is the arrival that was
intended, t_s the first time scheduled, t_1 .. t_n the times of the n output tokens.

Percentiles interpolate linearly between order statistics (numpy's default). What has no sample is null, never
NaN or 0. TTFT plus the sum of a request's ITLs is its E2E exactly, in integer nanoseconds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lab.control.observer import FleetEvent, RequestRecord, StepRecord, StepTotals
from lab.control.plan import GENESIS
from lab.observe.recorder import Recorded

if TYPE_CHECKING:
    from lab.observe.bulk.requests import RequestBatch

PERCENTILES = (50, 90, 99)


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


@dataclass(frozen=True, slots=True)
class Power:
    """What one replica draws and costs: devices, watts of each when idle and at most, and USD an hour of each."""

    devices: int
    idle_w: float
    tdp_w: float
    price_per_hour: float


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


class Tally:
    """Adds up what requests were like, so that they need not be kept. `fold` keeps gaps between tokens by how often
    each occurred, which is the same to percentiles and less to hold; means may then differ in the last digits."""

    def __init__(self, block_size: int, fold: bool = False) -> None:
        self._block_size, self._fold = block_size, fold
        self._outcomes = dict.fromkeys(("finished", "rejected", "aborted", "unfinished"), 0)
        self._samples: dict[str, list[float]] = {
            name: [] for name in ("ttft_ms", "tpot_ms", "e2e_ms", "queue_ms", "queue_total_ms")
        }
        self._gaps: list[int] = []
        self._folded: list[tuple[Any, Any]] = []
        self._sums = dict.fromkeys(
            ("output", "prompt", "computed", "good", "asked", "asked_blocks", "cached", "cached_blocks"), 0
        )
        self._foreseen: list[int] = []
        self._true: list[int] = []
        self._lags: list[int] = []
        self._moves: dict[str, list[int]] = {"queue": [], "wire": []}
        self._moved = 0
        self._first: int | None = None
        self._last = 0
        self.requests = 0

    def add(self, records: Sequence[RequestRecord]) -> None:
        """More requests, in the order of their telling."""
        sums, samples = self._sums, self._samples
        for record in records:
            request, times = record.request, record.token_times
            arrival, prompt = request.arrival, len(request.prompt)
            self._outcomes[record.outcome] += 1
            sums["computed"] += record.computed_tokens
            self._lags.append(record.decision.ingest_lag)
            for move in record.transfers:
                self._moves["queue"].append(move.queue_ns)
                self._moves["wire"].append(move.wire_ns)
                self._moved += move.bytes
            if self._first is None or arrival < self._first:
                self._first = arrival
            self._last = max(self._last, record.end)
            wait = queue_ns(record)
            if wait is not None:
                sums["asked"] += prompt
                sums["asked_blocks"] += -(-prompt // self._block_size)
                sums["cached"] += record.cached_tokens
                sums["cached_blocks"] += record.cached_blocks
            if record.outcome != "finished":
                continue
            sums["output"] += len(times)
            sums["prompt"] += prompt
            sums["good"] += record.met_objectives
            self._foreseen.append(record.predicted_output)
            self._true.append(len(times))
            if times:
                samples["ttft_ms"].append(times[0] - arrival)
            if len(times) > 1:
                samples["tpot_ms"].append((times[-1] - times[0]) / (len(times) - 1))
                if not self._fold:
                    self._gaps += itls_ns(record)
            samples["e2e_ms"].append(record.end - arrival)
            if wait is not None:
                samples["queue_ms"].append(wait)
            samples["queue_total_ms"].append(queue_total_ns(record))
        self.requests += len(records)
        if self._fold:
            self._fold_gaps([record.token_times for record in records if record.outcome == "finished"])

    def add_batch(self, batch: RequestBatch) -> None:
        """The same by column, in which gaps are folded."""
        import numpy as np

        own, sums, samples, records = batch.numbers, self._sums, self._samples, batch.records
        outcomes: list[str] = [record.outcome for record in records]
        for outcome in self._outcomes:
            self._outcomes[outcome] += outcomes.count(outcome)
        arrival, prompt, times = own["arrival_ns"], own["prompt_tokens"], own["output_tokens"]
        sums["computed"] += int(own["computed_tokens"].sum())
        self._lags += own["ingest_lag_ns"].tolist()
        for move in batch.moves:
            self._moves["queue"].append(move.queue_ns)
            self._moves["wire"].append(move.wire_ns)
            self._moved += move.bytes
        first = int(arrival.min())
        self._first = first if self._first is None else min(self._first, first)
        self._last = max(self._last, int(own["end_ns"].max()))
        ran = own["first_scheduled_ns"] >= 0
        sums["asked"] += int(prompt[ran].sum())
        sums["asked_blocks"] += int((-(-prompt[ran] // self._block_size)).sum())
        sums["cached"] += int(own["cached_tokens"][ran].sum())
        sums["cached_blocks"] += int(own["cached_blocks"][ran].sum())
        done = np.array([outcome == "finished" for outcome in outcomes])
        sums["output"] += int(times[done].sum())
        sums["prompt"] += int(prompt[done].sum())
        sums["good"] += sum([record.met_objectives for record in records])
        self._foreseen += own["predicted_output"][done].tolist()
        self._true += times[done].tolist()
        some, several = done & (times > 0), done & (times > 1)
        samples["ttft_ms"] += (own["first_token_ns"] - arrival)[some].tolist()
        spread = (own["last_token_ns"] - own["first_token_ns"])[several]
        samples["tpot_ms"] += (spread / (times[several] - 1)).tolist()
        samples["e2e_ms"] += (own["end_ns"] - arrival)[done].tolist()
        samples["queue_ms"] += (own["first_scheduled_ns"] - arrival)[done & ran].tolist()
        samples["queue_total_ms"] += own["queue_ns"][done].tolist()
        self.requests += len(records)
        self._fold_gaps([record.token_times for record in records if record.outcome == "finished"])

    def _fold_gaps(self, times: Sequence[Sequence[int]]) -> None:
        import numpy as np

        lengths = np.array([len(each) for each in times], dtype=np.int64)
        pooled = np.fromiter(chain.from_iterable(times), dtype=np.int64, count=int(lengths.sum()))
        gaps = np.diff(pooled)
        keep = np.ones(len(gaps), dtype=bool)
        borders = np.cumsum(lengths)[:-1] - 1
        keep[borders[borders >= 0]] = False
        self._folded.append(np.unique(gaps[keep], return_counts=True))

    def result(
        self,
        totals: Mapping[int, StepTotals],
        fleet: Sequence[FleetEvent],
        wall_s: float | None,
        power: Mapping[int, Power] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """The content of `metrics.json`; `totals` and `power` by replica."""
        sums, ran = self._sums, [total for total in totals.values() if total.steps]
        ends = [self._last] * bool(self.requests) + [total.end for total in ran]
        starts = [self._first] if self._first is not None else [total.start for total in ran]
        duration = (max(ends) - min(starts) if ends else 0) / 1e9
        finished = self._outcomes["finished"]
        time_ns = sum(total.time_ns for total in ran)
        stats = {name: _stats(values) for name, values in self._samples.items()}
        stats["itl_ms"] = _folded_stats(self._folded) if self._fold else _stats(self._gaps)
        return {
            "requests": self._outcomes,
            **{
                name: stats[name]
                for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms", "queue_total_ms")
            },
            "throughput": {
                "requests_per_s": _ratio(finished, duration),
                "output_tokens_per_s": _ratio(sums["output"], duration),
                "total_tokens_per_s": _ratio(sums["prompt"] + sums["output"], duration),
            },
            "goodput": {
                "requests_per_s": _ratio(sums["good"], duration),
                "attainment": _ratio(sums["good"], self.requests),
            },
            "kv": {
                "prefix_hit_ratio_tokens": _ratio(sums["cached"], sums["asked"]),
                "prefix_hit_ratio_blocks": _ratio(sums["cached_blocks"], sums["asked_blocks"]),
                "evictions": sum(total.evicted for total in ran),
                "peak_blocks": max((total.peak_held for total in ran), default=0),
                "peak_utilisation": max(
                    (total.peak_held / (total.blocks or 1) for total in ran), default=None
                ),
                "mean_utilisation": _ratio(
                    sum(total.held_ns / (total.blocks or 1) for total in ran), time_ns
                ),
            },
            "tokens": {"prompt": sums["prompt"], "output": sums["output"], "computed": sums["computed"]},
            "preemptions": sum(total.preempted for total in ran),
            "swapped_blocks": sum(total.moved for total in ran),
            "prediction": _prediction(self._foreseen, self._true),
            "fleet": _fleet(fleet),
            **_bill(totals, fleet, power, sums["output"]),
            "transfer": {"requests": len(self._moves["wire"]), "bytes": self._moved},
            "transfer_queue_ms": _stats(self._moves["queue"]),
            "transfer_wire_ms": _stats(self._moves["wire"]),
            "ingest": _ingest(self._lags),
            "steps": sum(total.steps for total in ran),
            "duration_s": duration,
            "plan_digest": joined_digest(
                {replica: total.digest for replica, total in totals.items() if total.steps}
            ),
            "wall_s": wall_s,
        }


# -- one request, in integer nanoseconds ---------------------------------------------------------------


def ttft_ns(record: RequestRecord) -> int:
    """Arrival to first token. Only for a request that has one."""
    return record.token_times[0] - record.request.arrival


def itls_ns(record: RequestRecord) -> list[int]:
    """Gaps between consecutive tokens: one fewer than tokens."""
    return [later - earlier for earlier, later in pairwise(record.token_times)]


def tpot_ns(record: RequestRecord) -> float | None:
    """Mean gap between tokens, or None with fewer than two."""
    times = record.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def e2e_ns(record: RequestRecord) -> int:
    """Arrival to end."""
    return record.end - record.request.arrival


def first_scheduled(record: RequestRecord) -> int | None:
    """When it first ran, or None if it never did."""
    return next((part.start for part in record.intervals if part.phase != "queue"), None)


def queue_ns(record: RequestRecord) -> int | None:
    """Scheduling delay: arrival to first schedule, or None if it never ran."""
    start = first_scheduled(record)
    return None if start is None else start - record.request.arrival


def phase_ns(record: RequestRecord, phase: str) -> int:
    """All time in one phase."""
    return sum(part.end - part.start for part in record.intervals if part.phase == phase)


def queue_total_ns(record: RequestRecord) -> int:
    """All time spent waiting."""
    return phase_ns(record, "queue")


def plan_digest(steps: Sequence[StepRecord]) -> str:
    """The chained digest of a run's decisions; `GENESIS` when there was no step."""
    return joined_digest({step.replica: step.plan.digest for step in steps})


def joined_digest(last: Mapping[int, str]) -> str:
    """The same from each replica's last digest."""
    if len(last) < 2:
        return next(iter(last.values()), GENESIS)
    joined = "\x1f".join(f"{replica}={last[replica]}" for replica in sorted(last))
    return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()


# -- inside --------------------------------------------------------------------------------------------


def _stats(samples_ns: Sequence[float]) -> dict[str, float | None]:
    names = ["mean", *(f"p{rank}" for rank in PERCENTILES)]
    if not samples_ns:
        return dict.fromkeys(names)
    import numpy as np

    samples = np.asarray(samples_ns, dtype=np.float64)
    values = [samples.mean(), *np.percentile(samples, PERCENTILES)]
    return {name: float(value) / 1e6 for name, value in zip(names, values, strict=True)}


def _folded_stats(folded: Sequence[tuple[Any, Any]]) -> dict[str, float | None]:
    """`_stats` of values given by how often each occurred."""
    import numpy as np

    if not sum(len(values) for values, _ in folded):
        return _stats([])
    values = np.concatenate([values for values, _ in folded])
    order = np.argsort(values, kind="stable")
    values, counts = values[order], np.concatenate([counts for _, counts in folded])[order]
    ends = np.cumsum(counts)
    number = int(ends[-1])

    def at(rank: float) -> float:
        """Linear between order statistics, as numpy does it."""
        place = rank / 100 * (number - 1)
        low = math.floor(place)
        below, above = (
            values[np.searchsorted(ends, n, side="right")] for n in (low, min(low + 1, number - 1))
        )
        return float(below + (above - below) * (place - low))

    mean = float((values.astype(np.float64) * counts).sum() / number)
    found = [mean, *map(at, PERCENTILES)]
    names = ["mean", *(f"p{rank}" for rank in PERCENTILES)]
    return {name: value / 1e6 for name, value in zip(names, found, strict=True)}


def _prediction(foreseen: Sequence[int], true: Sequence[int]) -> dict[str, float | None]:
    """How well output lengths were foreseen."""
    error = _ratio(sum(abs(guess - truth) for guess, truth in zip(foreseen, true, strict=True)), len(true))
    tau: float | None = None
    if error and len(true) > 1:  # scipy takes half a second to import: only where there is something to say
        from scipy.stats import kendalltau

        tau = float(kendalltau(foreseen, true).statistic)
    return {"kendall_tau": tau if tau == tau else None, "mean_abs_error_tokens": error}


def _ingest(lags_ns: Sequence[int]) -> dict[str, float | None]:
    measured = any(lags_ns)
    stats = _stats(lags_ns if measured else ())
    return {"lag_p99_ms": stats["p99"], "lag_max_ms": max(lags_ns) / 1e6 if measured else None}


def _fleet(events: Sequence[FleetEvent]) -> dict[str, float]:
    up: set[int] = set()
    most = 0
    for event in events:
        if event.event == "gone":
            up.remove(event.replica)
        else:
            up.add(event.replica)
        most = max(most, len(up))
    starts = sum(event.event == "start" for event in events)
    return {
        "replica_seconds": sum(_up(events).values()) / 1e9,
        "most_replicas": most,
        "cold_starts": starts,
        "failures": sum(event.event == "gone" and event.reason == "failed" for event in events),
    }


def _up(events: Sequence[FleetEvent]) -> dict[int, int]:
    """By replica, how long it was up."""
    since: dict[int, int] = {}
    up: dict[int, int] = {}
    for event in events:
        if event.event == "gone":
            up[event.replica] = event.at - since.pop(event.replica)
        else:
            since.setdefault(event.replica, event.at)
    return up


def _bill(
    totals: Mapping[int, StepTotals], events: Sequence[FleetEvent], power: Mapping[int, Power], tokens: int
) -> dict[str, dict[str, float | None]]:
    """Energy and cost of what was up, busy or not."""
    energy = dict.fromkeys(("kwh", "kwh_per_million_output_tokens", "busy_ratio"))
    cost = dict.fromkeys(("usd", "usd_per_million_output_tokens"))
    found: dict[str, dict[str, float | None]] = {"energy": {**energy}, "cost": {**cost}}
    up = {replica: time / 3.6e12 for replica, time in _up(events).items() if replica in power}
    if not up:
        return found
    busy = {replica: totals[replica].time_ns / 3.6e12 if replica in totals else 0.0 for replica in up}
    kwh = usd = 0.0
    for replica, hours in up.items():
        own = power[replica]
        kwh += own.devices * (own.idle_w * hours + (own.tdp_w - own.idle_w) * busy[replica]) / 1000
        usd += own.devices * own.price_per_hour * hours
    ratio = _ratio(sum(busy.values()), sum(up.values()))
    found["energy"] = {
        "kwh": kwh,
        "kwh_per_million_output_tokens": _ratio(kwh * 1e6, tokens),
        "busy_ratio": ratio,
    }
    found["cost"] = {"usd": usd, "usd_per_million_output_tokens": _ratio(usd * 1e6, tokens)}
    return found


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
