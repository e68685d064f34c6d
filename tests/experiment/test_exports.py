"""Exports as a user reaches them: options of an experiment, and a command on what it left."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent import futures
from http.server import HTTPServer
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    add_TraceServiceServicer_to_server,
)

from lab.analysis.runs import load
from lab.export import info_of, main, spans_of
from lab.observe.plain import plain_spans
from tests.experiment.command import QUICK, one_sentence, run
from tests.observe.test_otlp import Collector, HttpServer, Servicer
from tests.observe.test_perfetto import opened


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Collector]:
    """An experiment on both backends that told a collector over HTTP."""
    place = tmp_path_factory.mktemp("exported")
    collector = Collector()
    server: HTTPServer
    with HttpServer(collector) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        words = ["model=tiny", *QUICK, "run.dir=out", "run.report=false", f"export.otlp_endpoint={endpoint}"]
        done = run(words, place, extra={"OTEL_EXPORTER_OTLP_HEADERS": "x-key=one%20two"})
        server.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    assert "timeline for ui.perfetto.dev: out/timeline.perfetto-trace" in done.stdout
    return place / "out", collector


def test_both_sides_reach_the_collector_and_join_on_their_ids(exported: tuple[Path, Collector]) -> None:
    _, collector = exported
    ids: dict[str, set[bytes]] = {}
    for body in collector.got:
        [group] = body.resource_spans
        backend = next(a.value.string_value for a in group.resource.attributes if a.key == "lab.backend")
        requests = {span.trace_id for span in group.scope_spans[0].spans if span.name == "request"}
        ids.setdefault(backend, set()).update(requests)
    assert ids["real"] == ids["sim"]
    assert len(ids["sim"]) == 12
    assert {header["x-key"] for header in collector.headers} == {"one two"}


def test_one_timeline_has_both_sides(exported: tuple[Path, Collector]) -> None:
    path, _ = exported
    tracks = opened(path / "timeline.perfetto-trace")
    assert {name for name, track in tracks.items() if not track.parent} == {"real", "sim"}
    for side in ("real", "sim"):
        steps = [one for one in tracks[f"{side}/replica 0/steps"].slices if one.name == "step"]
        assert [one.start for one in steps] == load(path / side).steps["start_ns"].tolist()
        assert sum(name.startswith(f"{side}/requests/") for name in tracks) == 12


def test_the_command_makes_of_a_run_directory_what_the_experiment_made(
    exported: tuple[Path, Collector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = exported
    assert main([str(path), "--perfetto", str(tmp_path / "t")]) == 0
    assert (tmp_path / "t").read_bytes() == (path / "timeline.perfetto-trace").read_bytes()
    collector = Collector()
    service = grpc.server(futures.ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(Servicer(collector), service)
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    assert main([str(path), "--otlp", f"grpc://127.0.0.1:{port}"]) == 0
    service.stop(None).wait()
    assert collector.got == before.got
    assert main([str(path / "sim"), "--otlp", str(tmp_path / "s.jsonl")]) == 0
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    count = sum(len(json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]) for line in lines)
    assert f"{count} spans of '{path / 'sim'}'" in capsys.readouterr().out


def test_a_run_without_plans_is_exported_from_its_table(tmp_path: Path) -> None:
    words = ["backend=sim", "cost=reference", *QUICK]
    for record in ("everything", "steps"):
        done = run([*words, f"run.dir={record}", f"run.record={record}"], tmp_path)
        assert done.returncode == 0, done.stderr
    whole, steps = load(tmp_path / "everything"), load(tmp_path / "steps")
    info = info_of(whole)
    expected = list(plain_spans(whole.recorded(), info, links=False))
    assert Counter(spans_of(steps, info_of(steps))) == Counter(expected)
    assert not (tmp_path / "everything" / "timeline.perfetto-trace").exists()
    assert main([str(tmp_path / "steps"), "--perfetto", str(tmp_path / "t")]) == 0
    assert len(opened(tmp_path / "t")["sim/replica 0/steps"].slices) > len(steps.steps)


def test_what_cannot_be_exported_is_one_sentence(exported: tuple[Path, Collector], tmp_path: Path) -> None:
    path, _ = exported
    for words, said in (
        ([str(path)], "nothing to export to"),
        ([str(path), "--otlp", "s.jsonl"], "there are 2 runs"),
        ([str(path), "--otlp", "ftp://x"], "it doesn't begin with"),
        (["absent", "--otlp", "s.jsonl"], "there is no run at 'absent'"),
        ([str(path), "--perfetto", "/dev/null/t"], "can't write"),
    ):
        assert said in one_sentence(run(words, tmp_path, module="lab.export"))
