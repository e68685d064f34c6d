"""What observing costs, part by part: `python experiments/benchmarks/observation.py`.

The hot part is `Recorder` and `JsonLog`, once a step and once a request; the rest happens after the run.
For the share of a real step see `recording.py` beside this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lab.control.observer import Decision, Interval, Observer, RequestRecord, StepRecord, row_of
from lab.control.plan import GENESIS, StepPlan, StepTiming, Work
from lab.control.request import Prompt, Request, Segment
from lab.observe import export
from lab.observe.identity import RunInfo
from lab.observe.logs import JsonLog
from lab.observe.metrics import summarise
from lab.observe.otlp import write_otlp
from lab.observe.plain import plain_spans
from lab.observe.recorder import Recorder
from lab.observe.spans import spans
from lab.observe.stream import Stream


def measure(requests: int = 2_000, steps: int = 10_000, batch: int = 16) -> dict[str, float]:
    """Microseconds each: a told step and request, for a recorder and for a log; a span made, and written.

    The made-up run has `steps` steps of `batch` decoding requests.
    """
    recorder = Recorder()
    told_steps = [made_step(index, batch, requests) for index in range(steps)]
    told_requests = [made_request(number, steps) for number in range(requests)]
    info = RunInfo(
        backend="sim",
        clock="virtual",
        evidence="modelled",
        workload="0" * 32,
        model="none",
        policy="none",
        seed=0,
        run="cost",
    )

    def tell(observer: Observer) -> tuple[float, float]:
        def each_step() -> None:
            for step in told_steps:
                observer.on_step(step)

        def each_request() -> None:
            for record in told_requests:
                observer.on_request(record)

        return _us(each_step, steps), _us(each_request, requests)

    found: dict[str, float] = {}
    found["recorder.step"], found["recorder.request"] = tell(recorder)
    with TemporaryDirectory() as folder:
        where = Path(folder)
        with JsonLog(where / "log", info) as log:
            found["log.step"], found["log.request"] = tell(log)
        export.write_spans(where / "s", [])  # import what is needed before the clock runs
        count = sum(1 for _ in spans(recorder, info))
        found["spans (each)"] = _us(lambda: sum(1 for _ in spans(recorder, info)), count)
        found["spans.parquet, spans included (each)"] = _us(
            lambda: export.write_spans_of(where / "s", recorder, info), count
        )
        rows = [row_of(step) for step in told_steps]
        for kind, told in (("step", rows), ("request", told_requests)):
            stream = Stream(where, info, block_size=16, steps=kind == "step")
            tell_one: Callable[[Any], object] = stream.on_row if kind == "step" else stream.on_request

            def streamed(
                told: Sequence[Any] = told,
                tell_one: Callable[[Any], object] = tell_one,
                stream: Stream = stream,
            ) -> None:
                for one in told:
                    tell_one(one)
                stream.close()

            found[f"streamed, table and spans ({kind})"] = _us(streamed, len(told))
        found["otlp file, spans included (each)"] = _us(
            lambda: write_otlp(where / "o", plain_spans(recorder, info), info), count
        )
        found["steps.parquet (each)"] = _us(lambda: export.write_steps(where / "t", recorder.steps), steps)
        found["plans.parquet (each)"] = _us(lambda: export.write_plans(where / "p", recorder.steps), steps)
        write = export.write_requests
        found["requests.parquet (each)"] = _us(lambda: write(where / "r", recorder.requests), requests)
        found["metrics (each request)"] = _us(lambda: summarise(recorder, block_size=16), requests)
    return found


def _us(work: Callable[[], object], count: int) -> float:
    began = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - began) / 1e3 / count


def made_step(index: int, batch: int, requests: int) -> StepRecord:
    names = [f"r{(index + offset) % requests}" for offset in range(batch)]
    work = tuple(Work(name, 100 + index, 1, True, (index,)) for name in names)
    plan = StepPlan(index=index, now=index * 10**7, work=work, digest=GENESIS)
    return StepRecord(
        plan=plan,
        timing=StepTiming(10**5, 10**5, 9 * 10**6, 10**5, 10**5),
        policy="none",
        replica=0,
        running=batch,
        waiting=3,
        prefill_tokens=0,
        decode_tokens=batch,
        context_tokens=batch * (101 + index),
        blocks_free=10,
        blocks_cached=20,
        blocks_held=70,
        allocated=1,
        evicted=1,
        released_plan=0,
        released_commit=1,
    )


def made_request(number: int, steps: int) -> RequestRecord:
    start = number * 10**6
    times = tuple(start + 10**7 * (token + 1) for token in range(64))
    return RequestRecord(
        request=Request(
            id=f"r{number}", prompt=Prompt((Segment(number, 0, 100),)), arrival=start, output_len=64
        ),
        seq=number,
        decision=Decision(True, "always", 0, "single"),
        outcome="finished",
        reason="length",
        end=times[-1],
        cached_tokens=0,
        cached_blocks=0,
        computed_tokens=163,
        preemptions=0,
        token_times=times,
        intervals=(
            Interval("queue", start, start + 5, "arrival"),
            Interval("prefill", start + 5, times[0], "", 0, 0),
            Interval("decode", times[0], times[-1], "", 1, min(63, steps)),
        ),
        output=tuple(range(64)),
    )


if __name__ == "__main__":
    for name, microseconds in measure().items():
        print(f"{name:38} {microseconds:8.2f} µs")
