"""One simulated deployment of one model on one described device, with every mechanism as a switch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.assembly import EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.control.request import Request
from lab.control.step import Limits
from sim.cost.model import CostModel
from sim.cost.physical import ALONE, GRAPH_SIZES, MEASURED, Coefficients, PhysicalCost
from sim.cost.transfer import WithTransfers
from sim.cost.warmup import WithWarmup
from sim.driver import Simulation
from sim.executor import SimExecutor
from sim.hardware import Hardware
from sim.model_shape import ModelShape

QUANTILES = (50, 90, 99)
WARMUP_STEPS = 10.0


@dataclass(frozen=True)
class Case:
    """What is simulated. Every field that is a mechanism is one line of the ablation table."""

    shape: ModelShape
    device: Hardware
    blocks: int
    limits: Limits
    block_size: int = 16
    max_context: int = 1 << 31
    coefficients: Coefficients = MEASURED
    prefix_cache: bool = True
    last_block: bool = True
    whole_prompt: bool = True
    watermark: float = 0.0
    late: bool = True
    graphs: bool = True
    warmup: float = 0.0
    api_ms: float = 0.0
    swap: bool = False
    measured_control: bool = False

    def run(self, requests: Sequence[Request]) -> Seen:
        """Simulate; never records more than a comparison needs."""
        size = round(self.shape.kv_bytes_per_token * self.block_size)
        host = self.blocks if self.swap else 0
        speed = self.device.host_link.bytes_s / 1e9
        capacity = Capacity(
            self.blocks, self.block_size, self.max_context, self.shape.vocab, host, size, speed
        )
        graphs = GRAPH_SIZES if self.graphs else ()
        cost: CostModel = PhysicalCost(self.shape, self.device, self.coefficients, ALONE, graphs)
        cost = WithTransfers(cost, capacity)
        if self.warmup:
            cost = WithWarmup(cost, self.warmup, WARMUP_STEPS)
        policy = {"name": "vllm_v1", "whole_prompt": self.whole_prompt, "watermark": self.watermark}
        policies: dict[str, dict[str, Any]] = {"policy": policy}
        if self.swap:
            policies["preemption"] = {"name": "last", "mode": "swap"}
        spec = EngineSpec(
            policies, self.limits, self.prefix_cache, 0, joins_late=self.late, last_block=self.last_block
        )
        seen = Seen()
        control = assemble(spec, capacity, seen, requests, aggregate=True)
        executor = SimExecutor(cost, capacity)
        Simulation(
            control,
            executor,
            requests,
            api_ns=round(self.api_ms * 1e6),
            measured_control=self.measured_control,
        ).run()
        return seen


class Seen(Observer):
    """The steps' counts and the requests' times."""

    wants_work = False

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []
        self.times: list[tuple[int, int, int, float]] = []
        """(now, running, waiting, KV %) of each step."""
        self.preemptions = 0

    def on_step(self, step: StepRecord) -> None:
        total = step.blocks_free + step.blocks_cached + step.blocks_held
        self.times.append((step.plan.now, step.running, step.waiting, 100 * step.blocks_held / total))
        self.preemptions += len(step.plan.preempted)

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def latencies(self) -> dict[str, list[float]]:
        """TTFT, TPOT, E2E in seconds, by arrival."""
        done = sorted(self.requests, key=lambda r: (r.request.arrival, r.request.id))
        return latencies(
            (r.request.arrival / 1e9, r.token_times[0] / 1e9, r.token_times[-1] / 1e9, len(r.token_times))
            for r in done
        )

    def tokens_per_s(self) -> float:
        """Output tokens over the time from the first arrival to the last token."""
        first = min(r.request.arrival for r in self.requests)
        last = max(r.token_times[-1] for r in self.requests)
        return sum(len(r.token_times) for r in self.requests) / (last - first) * 1e9


def latencies(items: Iterable[tuple[float, float, float, int]]) -> dict[str, list[float]]:
    """TTFT, TPOT and E2E from (arrival, first, last, tokens); formulas as in `lab.observe.metrics`."""
    found: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "E2E": []}
    for arrival, first, last, tokens in items:
        found["TTFT"].append(first - arrival)
        found["E2E"].append(last - arrival)
        if tokens > 1:
            found["TPOT"].append((last - first) / (tokens - 1))
    return found


def summary(latency: dict[str, list[float]]) -> dict[str, float]:
    """Mean and percentiles of each, interpolated as `lab.observe.metrics` does."""
    found = {}
    for name, values in latency.items():
        found[f"{name} mean"] = statistics.fmean(values)
        found |= {f"{name} p{p}": percentile(values, p) for p in QUANTILES}
    return found


def percentile(values: Sequence[float], rank: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * rank / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
