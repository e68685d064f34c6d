"""What the control plane itself tells, seen through every output."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lab.analysis.runs import load
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.gateway import Gateway
from lab.control.plan import StepPlan, StepResult, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.observe.boundaries import BOUNDARIES
from lab.observe.latency import e2e_ns, itls_ns, ttft_ns
from lab.observe.recorder import Recorder
from lab.observe.rundir import RunDirectory
from lab.observe.spans import check, spans
from policies.admission.always import Always
from policies.compression.streaming_llm import StreamingLlm
from policies.eviction.lru import Lru
from policies.preemption.last import Last
from policies.routing.single import Single
from policies.scheduling.fcfs import Fcfs
from tests.control.harness import fleet_of
from tests.observe.made import info_for
from tests.observe.test_rundir import NOW


@pytest.fixture(scope="module", params=["", "compressed"])
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Twenty requests with shared prefixes, a pool so small that some are preempted; one never fits, uncompressed."""
    rng, recorder = random.Random(3), Recorder()
    core = EngineCore(
        Fcfs(),
        Lru(),
        capacity=Capacity(14, 4, host_blocks=8, block_bytes=1 << 20),
        limits=Limits(24, 5, 10),
        preemption=Last("swap"),
        prefix_cache=not request.param,
        compression=StreamingLlm(16, 4) if request.param else None,
        observer=recorder,
    )
    fleet = fleet_of(core)
    gateway = Gateway(Always(), Single(), fleet, recorder)
    waiting = [
        Request(
            id=f"r{n}",
            arrival=n * 40,
            output_len=rng.randint(1, 12),
            prompt=Prompt((Segment(n % 3, 0, rng.randint(1, 12)), Segment(100 + n, 0, rng.randint(1, 9)))),
        )
        for n in range(20)
    ]
    waiting.append(Request(id="huge", arrival=100, prompt=Prompt((Segment(9, 0, 1000),)), output_len=1))
    waiting.sort(key=lambda request: request.arrival)
    now = 0
    while waiting or core.has_work:
        if not core.has_work:
            now = max(now, waiting[0].arrival)
        while waiting and waiting[0].arrival <= now:
            gateway.submit(waiting.pop(0), now)
        plan: StepPlan = core.plan(now)
        if plan:
            timing = StepTiming(2, 3, 5 + plan.tokens, 1, 4, plan.moved_blocks)
            result = StepResult((1,) * sum(work.samples for work in plan.work))
            core.commit(plan, result, now + timing.plan_ns + timing.execute_ns)
            core.observe(timing)
            now += timing.total_ns
    fleet.close(now)
    return recorder


def shortened(recorder: Recorder) -> bool:
    return any(step.plan.compactions for step in recorder.steps)


def test_its_records_make_spans_as_declared_with_every_boundary_among_them(recorder: Recorder) -> None:
    assert any(record.preemptions for record in recorder.requests)
    seen = check(spans(recorder, info_for(recorder)))
    absent = {"kv.evict"} if shortened(recorder) else {"kv.compact"}
    assert seen == set(BOUNDARIES) - absent - {"step.rank"}


def test_links_count_the_tokens_that_it_counted(recorder: Recorder) -> None:
    steps = [row for row in spans(recorder, info_for(recorder)) if row.name == "step"]
    for row, step in zip(steps, recorder.steps, strict=True):
        tokens = {"prefill": 0, "decode": 0}
        for link in row.links:
            tokens[str(link.attributes["lab.seq.phase"])] += int(str(link.attributes["lab.seq.n_tokens"]))
        assert tokens == {"prefill": step.prefill_tokens, "decode": step.decode_tokens}


def test_ttft_and_gaps_add_up_to_e2e_exactly(recorder: Recorder) -> None:
    finished = [record for record in recorder.requests if record.outcome == "finished"]
    assert len(finished) == (21 if shortened(recorder) else 20)
    for record in finished:
        assert ttft_ns(record) + sum(itls_ns(record)) == e2e_ns(record)


def test_its_run_directory_gives_back_every_record(recorder: Recorder, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "x", now=NOW, key="k") as directory:
        summary = directory.save(recorder, info_for(recorder), block_size=4)
    fits = shortened(recorder)
    assert summary["requests"] == {"finished": 20 + fits, "rejected": 1 - fits, "aborted": 0, "unfinished": 0}
    again = load(tmp_path / "run").recorded()
    assert again.steps == recorder.steps
    assert {record.request.id: record for record in again.requests} == {
        record.request.id: record for record in recorder.requests
    }
    plans = tmp_path / "run" / "plans.parquet"
    pq.write_table(pq.read_table(plans).drop_columns(["reread"]), plans)  # as runs were before it was kept
    older = load(tmp_path / "run").recorded()
    assert [step.plan for step in older.steps] == [replace(step.plan, reread=0) for step in recorder.steps]
