"""Tables that are written while a run goes hold what tables written at its end hold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lab.assembly import EngineSpec
from lab.control.executor import Capacity
from lab.control.step import Limits
from lab.observe import stream
from lab.observe.spans import spans
from lab.session import Ran, Side, run_side
from sim.backend import SimBackend
from tests.control.test_aggregates import workload
from tests.sim.test_coasting import Cost


def run(folder: Path, record: str) -> Ran:
    requests = workload(random.Random(5)) + [
        r
        for r in workload(random.Random(6))
        if r.id >= "r3"  # other ids than some before
    ]
    requests = list({request.id: request for request in requests}.values())
    requests.sort(key=lambda request: request.arrival)
    backend = SimBackend(Cost(still=False), Capacity(60, 4), "modelled", {})
    names = {"policy": "fcfs", "eviction": "lru"}
    spec = EngineSpec({seam: {"name": name} for seam, name in names.items()}, Limits(32, 6), True, 0)
    return run_side(Side(backend, spec, requests, "seed: 0\n", "m", record=record), folder / record, None)


def rows(path: Path, by: str, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(path).drop_columns(list(without)).to_pylist()
    return sorted(table, key=lambda row: str(row[by]))


def rows_of(ran: Ran) -> list[dict[str, Any]]:
    """The rows of the table of spans, from spans that were made one by one."""
    found = []
    for span in spans(ran.recorder, ran.info, links=False):
        row = span._asdict()
        del row["links"]
        row["attributes"] = json.dumps(
            span.attributes, separators=(",", ":"), sort_keys=True, ensure_ascii=False
        )
        found.append(row)
    return sorted(found, key=lambda row: str(row["span_id"]))


def test_streamed_tables_and_metrics_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER", 7)  # several row groups
    everything, *others = (run(tmp_path, record) for record in ("everything", "steps", "requests"))
    whole, steps, requests = (ran.path for ran in (everything, *others))
    by_token = ("token_times_ns", "output", "logprobs")
    for folder in (steps, requests):
        assert (folder / "_SUCCESS").exists()
        expected = rows(whole / "requests.parquet", "id", by_token)
        assert rows(folder / "requests.parquet", "id", by_token) == expected
        before, after = (json.loads((f / "metrics.json").read_text()) for f in (whole, folder))
        before["wall_s"] = after["wall_s"] = None
        assert after.pop("itl_ms") == pytest.approx(before.pop("itl_ms"), rel=1e-12)
        assert after == before
        assert not list(folder.glob(".*"))
    assert pq.read_table(steps / "steps.parquet").equals(pq.read_table(whole / "steps.parquet"))
    expected = rows_of(everything)
    assert rows(whole / "spans.parquet", "span_id") == expected
    assert rows(steps / "spans.parquet", "span_id") == expected
    assert rows(requests / "spans.parquet", "span_id") == [
        row for row in expected if row["name"].startswith(("request", "gateway"))
    ]
