"""The log is written while the run goes, and finds its way to the spans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from lab.errors import RunError
from lab.observe.boundaries import BOUNDARIES
from lab.observe.identity import RunInfo
from lab.observe.logs import JsonLog, Level
from lab.observe.recorder import Recorder
from lab.observe.spans import spans
from tests.observe.made import info_for, rich, runs


def tell(recorder: Recorder, log: JsonLog) -> None:
    for step in recorder.steps:
        log.on_step(step)
    for record in recorder.requests:
        log.on_request(record)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, recorder: Recorder, info: RunInfo, level: Level = "DEBUG") -> list[dict[str, Any]]:
    with JsonLog(path, info, level=level) as log:
        tell(recorder, log)
    return lines(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log.jsonl"


@given(recorder=runs())
def test_every_line_belongs_to_a_span_of_the_stage_it_names(recorder: Recorder, path: Path) -> None:
    info = info_for(recorder)
    written = write(path, recorder, info)
    ids = {(row.trace_id, row.span_id): row.name for row in spans(recorder, info)}
    for line in written:
        assert ids[line["trace_id"], line["span_id"]] == line["stage"]
        assert line["stage"] in BOUNDARIES
        assert {"ts_ns", "level", "stage", "event", "replica"} <= set(line)
    assert sum(line["stage"] == "step" for line in written) == len(recorder.steps)
    assert {line["request_id"] for line in written if line["stage"] == "request"} == {
        record.request.id for record in recorder.requests
    }
    told = [line for line in written if line["event"] == "preempted"]
    assert len(told) == sum(len(step.plan.preempted) for step in recorder.steps)


def test_a_step_says_its_batch_and_a_request_its_fate(tmp_path: Path) -> None:
    recorder = rich()
    written = write(tmp_path / "l", recorder, info_for(recorder))
    steps = [line["batch_size"] for line in written if line["stage"] == "step"]
    assert steps == [len(step.plan.work) for step in recorder.steps]
    fates = [(line["event"], line["reason"]) for line in written if line["stage"] == "request"]
    assert fates == [(record.outcome, record.reason) for record in recorder.requests]


@pytest.mark.parametrize(("level", "kept"), [("INFO", {"INFO", "WARNING"}), ("WARNING", {"WARNING"})])
def test_a_level_drops_what_lies_below_it(level: Level, kept: set[str], tmp_path: Path) -> None:
    recorder = rich()
    everything = write(tmp_path / "all", recorder, info_for(recorder))
    some = write(tmp_path / "some", recorder, info_for(recorder), level)
    assert some == [line for line in everything if line["level"] in kept]
    assert some


def test_what_was_told_before_a_crash_is_in_the_file(tmp_path: Path) -> None:
    recorder = rich()

    def crash() -> None:
        with JsonLog(tmp_path / "l", info_for(recorder), buffer=10**6) as log:
            tell(recorder, log)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert len(lines(tmp_path / "l")) >= len(recorder.steps) + len(recorder.requests)


def test_the_log_grows_while_the_run_goes(tmp_path: Path) -> None:
    recorder = rich()
    log = JsonLog(tmp_path / "l", info_for(recorder), buffer=2)
    log.on_step(recorder.steps[0])
    assert not lines(tmp_path / "l")
    log.on_step(recorder.steps[1])
    assert len(lines(tmp_path / "l")) >= 2
    log.close()
    log.close()


def test_a_full_disk_is_one_sentence_and_closing_again_is_quiet() -> None:
    recorder = rich()
    log = JsonLog(Path("/dev/full"), info_for(recorder), buffer=1)
    with pytest.raises(RunError, match="can't write the log '/dev/full': No space left on device"):
        log.on_step(recorder.steps[0])
    log.close()


def test_a_log_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file or directory"):
        JsonLog(tmp_path / "absent" / "l", info_for(rich()))
