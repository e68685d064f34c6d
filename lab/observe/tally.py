"""Adds up a run: request by request, or in columns, to the content of `metrics.json`. Observation path.

What each sum means stands in `lab/observe/metrics.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lab.control.observer import FleetEvent, RequestRecord, StepTotals
from lab.control.plan import GENESIS
from lab.observe.bill import Power, bill, uptime
from lab.observe.gaps import counted_gaps
from lab.observe.latency import itls_ns, queue_ns, queue_total_ns
from lab.observe.percentiles import folded_stats, ratio, stats

if TYPE_CHECKING:
    from lab.observe.bulk.requests import RequestBatch


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
            self._folded.append(counted_gaps([r.token_times for r in records if r.outcome == "finished"]))

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
        self._folded.append(counted_gaps([r.token_times for r in records if r.outcome == "finished"]))

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
        spread = {name: stats(values) for name, values in self._samples.items()}
        spread["itl_ms"] = folded_stats(self._folded) if self._fold else stats(self._gaps)
        return {
            "requests": self._outcomes,
            **{
                name: spread[name]
                for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms", "queue_total_ms")
            },
            "throughput": {
                "requests_per_s": ratio(finished, duration),
                "output_tokens_per_s": ratio(sums["output"], duration),
                "total_tokens_per_s": ratio(sums["prompt"] + sums["output"], duration),
            },
            "goodput": {
                "requests_per_s": ratio(sums["good"], duration),
                "attainment": ratio(sums["good"], self.requests),
            },
            "kv": {
                "prefix_hit_ratio_tokens": ratio(sums["cached"], sums["asked"]),
                "prefix_hit_ratio_blocks": ratio(sums["cached_blocks"], sums["asked_blocks"]),
                "evictions": sum(total.evicted for total in ran),
                "peak_blocks": max((total.peak_held for total in ran), default=0),
                "peak_utilisation": max(
                    (total.peak_held / (total.blocks or 1) for total in ran), default=None
                ),
                "mean_utilisation": ratio(sum(total.held_ns / (total.blocks or 1) for total in ran), time_ns),
            },
            "tokens": {"prompt": sums["prompt"], "output": sums["output"], "computed": sums["computed"]},
            "preemptions": sum(total.preempted for total in ran),
            "swapped_blocks": sum(total.moved for total in ran),
            "prediction": _prediction(self._foreseen, self._true),
            "fleet": uptime(fleet),
            **bill(totals, fleet, power, sums["output"]),
            "transfer": {"requests": len(self._moves["wire"]), "bytes": self._moved},
            "transfer_queue_ms": stats(self._moves["queue"]),
            "transfer_wire_ms": stats(self._moves["wire"]),
            "ingest": _ingest(self._lags),
            "steps": sum(total.steps for total in ran),
            "duration_s": duration,
            "plan_digest": joined_digest(
                {replica: total.digest for replica, total in totals.items() if total.steps}
            ),
            "wall_s": wall_s,
        }


def joined_digest(last: Mapping[int, str]) -> str:
    """The chained digest of a run's decisions, from each replica's last; `GENESIS` when there was no step."""
    if len(last) < 2:
        return next(iter(last.values()), GENESIS)
    joined = "\x1f".join(f"{replica}={last[replica]}" for replica in sorted(last))
    return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()


def _prediction(foreseen: Sequence[int], true: Sequence[int]) -> dict[str, float | None]:
    """How well output lengths were foreseen."""
    error = ratio(sum(abs(guess - truth) for guess, truth in zip(foreseen, true, strict=True)), len(true))
    tau: float | None = None
    if error and len(true) > 1:  # scipy takes half a second to import: only where there is something to say
        from scipy.stats import kendalltau

        tau = float(kendalltau(foreseen, true).statistic)
    return {"kendall_tau": tau if tau == tau else None, "mean_abs_error_tokens": error}


def _ingest(lags_ns: Sequence[int]) -> dict[str, float | None]:
    measured = any(lags_ns)
    return {
        "lag_p99_ms": stats(lags_ns if measured else ())["p99"],
        "lag_max_ms": max(lags_ns) / 1e6 if measured else None,
    }
