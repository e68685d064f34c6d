"""A run's metrics as Prometheus text, under vLLM's names, so that its dashboards work. Observation path.

Counters and histograms cover the whole run; gauges show its last step. Latency histograms hold finished
requests in seconds, by the formulas of `lab/observe/latency.py`. `engine` is the replica (-1: none chosen).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from lab.control.observer import RequestRecord, StepRecord
from lab.observe import latency
from lab.observe.recorder import Recorded

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
         20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
        20.0, 40.0, 80.0)  # fmt: skip
_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
            480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_ITERATION = (1.0, *(float(2**power) for power in range(3, 15)))
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

_Samples = Callable[[RequestRecord], Sequence[float]]


def _seconds(value: Callable[[RequestRecord], float | None]) -> _Samples:
    def samples(record: RequestRecord) -> list[float]:
        found = value(record)
        return [] if found is None else [found / 1e9]

    return samples


_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...], _Samples], ...] = (
    ("time_to_first_token_seconds", "Arrival to first token.", _TTFT,
     _seconds(lambda record: latency.ttft_ns(record) if record.token_times else None)),
    ("inter_token_latency_seconds", "Gaps between consecutive tokens.", _GAP,
     lambda record: [gap / 1e9 for gap in latency.itls_ns(record)]),
    ("request_time_per_output_token_seconds", "Mean gap between tokens, per request.", _GAP,
     _seconds(latency.tpot_ns)),
    ("e2e_request_latency_seconds", "Arrival to end.", _LATENCY, _seconds(latency.e2e_ns)),
    ("request_queue_time_seconds", "Arrival to first schedule.", _LATENCY, _seconds(latency.queue_ns)),
    ("request_prefill_time_seconds", "Time in prefill.", _LATENCY,
     _seconds(lambda record: latency.phase_ns(record, "prefill"))),
    ("request_decode_time_seconds", "Time in decode.", _LATENCY,
     _seconds(lambda record: latency.phase_ns(record, "decode"))),
    ("request_inference_time_seconds", "Time running.", _LATENCY,
     _seconds(lambda record: latency.phase_ns(record, "prefill") + latency.phase_ns(record, "decode"))),
    ("request_prompt_tokens", "Prompt tokens.", _TOKENS, lambda record: [len(record.request.prompt)]),
    ("request_generation_tokens", "Output tokens.", _TOKENS, lambda record: [len(record.token_times)]),
)  # fmt: skip


def prometheus_text(recorded: Recorded, *, model: str) -> str:
    """Prometheus text exposition, version 0.0.4."""
    replicas = sorted(
        {step.replica for step in recorded.steps} | {record.decision.replica for record in recorded.requests}
    )
    labels = {replica: f'model_name="{_escape(model)}",engine="{replica}"' for replica in replicas}
    steps: dict[int, list[StepRecord]] = {replica: [] for replica in replicas}
    requests: dict[int, list[RequestRecord]] = {replica: [] for replica in replicas}
    for step in recorded.steps:
        steps[step.replica].append(step)
    for record in recorded.requests:
        requests[record.decision.replica].append(record)

    lines: list[str] = []

    def put(name: str, kind: str, doc: str, values: Iterable[tuple[int, str, float]]) -> None:
        """One metric: (replica, further labels, value) each."""
        suffix = "_total" if kind == "counter" else ""
        lines.append(f"# HELP vllm:{name}{suffix} {doc}")
        lines.append(f"# TYPE vllm:{name}{suffix} {kind}")
        for replica, more, value in values:
            lines.append(f"vllm:{name}{suffix}{{{labels[replica]}{more}}} {_number(value)}")

    def each(
        of_steps: Callable[[list[StepRecord]], float] | None = None,
        of_requests: Callable[[list[RequestRecord]], float] | None = None,
    ) -> list[tuple[int, str, float]]:
        if of_steps:
            return [(replica, "", of_steps(steps[replica])) for replica in replicas]
        assert of_requests
        return [(replica, "", of_requests(requests[replica])) for replica in replicas]

    put("num_requests_running", "gauge", "Requests running.", each(lambda s: s[-1].running if s else 0))
    put("num_requests_waiting", "gauge", "Requests waiting.", each(lambda s: s[-1].waiting if s else 0))
    put("kv_cache_usage_perc", "gauge", "Referenced KV blocks; 1 is all.", each(_usage))
    put("num_preemptions", "counter", "Preemptions.", each(lambda s: sum(len(x.plan.preempted) for x in s)))
    ran = {
        replica: [record for record in requests[replica] if latency.first_scheduled(record) is not None]
        for replica in replicas
    }
    asked = [
        (replica, "", sum(len(record.request.prompt) for record in ran[replica])) for replica in replicas
    ]
    hits = [(replica, "", sum(record.cached_tokens for record in ran[replica])) for replica in replicas]
    put("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache.", asked)
    put("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache.", hits)
    put("prompt_tokens", "counter", "Prompt tokens of scheduled requests.", asked)
    put("prompt_tokens_cached", "counter", "Prompt tokens that needed no computation.", hits)
    made = each(of_requests=lambda records: sum(len(record.token_times) for record in records))
    put("generation_tokens", "counter", "Tokens generated.", made)
    finished = {
        replica: [record for record in requests[replica] if record.outcome == "finished"]
        for replica in replicas
    }
    endings = [
        (replica, f',finished_reason="{_escape(reason)}"', count)
        for replica in replicas
        for reason, count in _counts(record.reason for record in finished[replica])
    ]
    put("request_success", "counter", "Finished requests, by reason.", endings)

    def histogram(name: str, doc: str, bounds: tuple[float, ...], samples: dict[int, list[float]]) -> None:
        lines.append(f"# HELP vllm:{name} {doc}")
        lines.append(f"# TYPE vllm:{name} histogram")
        for replica, values in samples.items():
            counts = [0] * (len(bounds) + 1)
            for value in values:
                counts[bisect_left(bounds, value)] += 1
            below = 0
            for bound, count in zip((*map(_number, bounds), "+Inf"), counts, strict=True):
                below += count
                lines.append(f'vllm:{name}_bucket{{{labels[replica]},le="{bound}"}} {_number(below)}')
            lines.append(f"vllm:{name}_sum{{{labels[replica]}}} {_number(sum(values))}")
            lines.append(f"vllm:{name}_count{{{labels[replica]}}} {_number(len(values))}")

    tokens = {replica: [float(step.plan.tokens) for step in steps[replica]] for replica in replicas}
    histogram("iteration_tokens_total", "Tokens of a step.", _ITERATION, tokens)
    for name, doc, bounds, of in _HISTOGRAMS:
        histogram(name, doc, bounds, {r: [x for record in finished[r] for x in of(record)] for r in replicas})
    return "\n".join(lines) + "\n"


def _usage(steps: list[StepRecord]) -> float:
    if not steps:
        return 0.0
    last = steps[-1]
    return last.blocks_held / ((last.blocks_free + last.blocks_cached + last.blocks_held) or 1)


def _counts(words: Iterable[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items())


def _number(value: float) -> str:
    return repr(float(value))


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
