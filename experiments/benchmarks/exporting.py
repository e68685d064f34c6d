"""What exporting a run costs: `python experiments/benchmarks/exporting.py [spans]` (default: 1,000,000).

Every span of a made-up run (steps of 16 decoding requests, with their links) goes to an OTLP file, to OTLP messages as
an endpoint gets them, and to a Perfetto timeline, from the records to the last byte. Beside it, in the same process,
the SDK's own encoder on a sample of such spans, from the records to the last byte too.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from observation import made_request, made_step

from lab.observe.identity import RunInfo
from lab.observe.otel import readable
from lab.observe.otlp import messages, write_otlp
from lab.observe.perfetto import write_timeline
from lab.observe.plain import plain_spans
from lab.observe.recorder import Recorder
from lab.observe.spans import spans

TARGET_S = 30.0
SAMPLE = 20_000
INFO = RunInfo(
    backend="sim",
    clock="virtual",
    evidence="modelled",
    workload="0" * 32,
    model="none",
    policy="none",
    seed=0,
    run="cost",
)


def made(count: int) -> Recorder:
    """A run of about so many spans: 10 a step, 6 a request, 8 steps for each request."""
    recorder = Recorder()
    requests = max(1, count // 86)
    recorder.requests += [made_request(number, 8 * requests) for number in range(requests)]
    recorder.steps += [made_step(index, min(16, requests), requests) for index in range(8 * requests)]
    return recorder


def main(count: int = 1_000_000) -> float:
    """Print seconds and ratios; returns the seconds that the OTLP file took."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    recorder = made(count)
    total = sum(1 for _ in plain_spans(recorder, INFO))

    def timed(what: str, work: Callable[[], int]) -> float:
        began = time.perf_counter()
        size = work()
        took = time.perf_counter() - began
        each = size / total
        print(f"{what:22}{took:8.1f} s  {1e6 * took / total:6.2f} us and {each:5.0f} bytes a span")
        return took

    print(f"{total:,} spans")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "spans"

        def otlp_file() -> int:
            write_otlp(file, plain_spans(recorder, INFO), INFO)
            return file.stat().st_size

        took = timed("OTLP file", otlp_file)

        def timeline() -> int:
            write_timeline(file, [("sim", plain_spans(recorder, INFO, links=False))])
            return file.stat().st_size

        timed("Perfetto timeline", timeline)
        packed = timed(
            "OTLP messages",
            lambda: sum(len(message) for message, _ in messages(plain_spans(recorder, INFO), INFO)),
        )
    sample = made(min(SAMPLE, count))
    kept = readable(spans(sample, INFO), INFO)
    began, done = time.perf_counter(), 0
    while batch := list(itertools.islice(kept, 512)):
        encode_spans(batch).SerializeToString()
        done += len(batch)
    each = (time.perf_counter() - began) / done
    print(
        f"the SDK's encoder: {1e6 * each:.2f} us a span (a sample of {done:,}), {each * total / packed:.1f} times as "
        f"long as the messages, {each * total / took:.1f} times the file"
    )
    met = took / total * 1_000_000 <= TARGET_S
    print(
        f"target: 1,000,000 spans to an OTLP file in at most {TARGET_S:.0f} s: {'met' if met else 'MISSED'}"
    )
    return took


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
