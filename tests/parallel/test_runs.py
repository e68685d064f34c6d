"""The main job on several ranks: records of every rank, and whatever ends it early, nobody is left and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.analysis.diff import diff
from lab.analysis.runs import load
from lab.analysis.verdict import verdict
from lab.observe.claim import partial_reason
from tests.experiment.command import QUICK, environment, one_sentence, run
from tests.experiment.test_endings import LONG, end, start, until

TWO = ("model=tiny", "engine.tensor_parallel=2", "engine.threads=1", "engine.attention=torch")


def workers_of(parent: int) -> list[int]:
    """Processes that are ranks of this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(status[1]) == parent and "real_engine.parallel.worker" in command and status[0] != "Z":
                found.append(int(entry.name))
    return found


def gone(pids: list[int], patience: float = 10) -> bool:
    deadline = time.monotonic() + patience
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(["backend=real", *TWO, *LONG[1:], "run.dir=out", "run.report=false"], tmp_path)
    until(tmp_path / "out" / "log.jsonl", process)
    yield process
    process.kill()
    process.wait()


def test_a_killed_rank_ends_the_run_and_what_was_recorded_stays(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    [worker] = workers_of(running.pid)
    os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    _, said = running.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert running.returncode == 1
    assert "Traceback" not in said
    [sentence] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"rank 1 (process {worker}) was killed by SIGKILL" in sentence
    assert "was killed by SIGKILL" in (partial_reason(tmp_path / "out") or "")
    ran = load(tmp_path / "out")
    assert len(ran.steps) == len(ran.plans) > 0
    ranks = ran.spans[ran.spans["name"] == "step.rank"]
    assert len(ranks) == 2 * len(ran.steps)
    assert (ran.spans["name"] == "step.forward").sum() == 2 * len(ran.steps)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_interrupted_or_killed_leaves_no_rank_behind(
    number: int, running: subprocess.Popen[str], tmp_path: Path
) -> None:
    workers = workers_of(running.pid)
    assert len(workers) == 1
    if number == signal.SIGINT:
        end(running, number)
        assert partial_reason(tmp_path / "out") == "it was interrupted (Ctrl-C)"
    else:
        running.kill()
    assert gone(workers)


@pytest.mark.slow
def test_both_sides_of_two_ranks_are_compared_as_those_of_one(tmp_path: Path) -> None:
    done = run(["backend=both", *TWO, *QUICK, "run.dir=out", "run.report=false"], tmp_path)
    assert done.returncode == 0, done.stderr
    real, sim = load(tmp_path / "out" / "real"), load(tmp_path / "out" / "sim")
    assert real.environment["backend"]["tensor_parallel"] == 2
    assert sim.environment["backend"]["calibration"]["tensor_parallel"] == 2
    recorded = real.recorded()
    assert all([part.rank for part in step.ranks] == [0, 1] for step in recorded.steps)
    alone = run(["backend=real", "model=tiny", *QUICK, "run.dir=one", "run.report=false"], tmp_path)
    assert alone.returncode == 0, alone.stderr
    one = load(tmp_path / "one").recorded().requests
    outputs = {record.request.id: record.output for record in recorded.requests}
    assert {record.request.id: record.output for record in one} == outputs


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "lab.experiment", "backend=real", *TWO, *QUICK, "run.dir=out", "run.report=false"]
    done = subprocess.run(
        [*torchrun, *words],
        cwd=tmp_path,
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran = load(tmp_path / "out")
    assert partial_reason(tmp_path / "out") is None
    assert all(len(step.ranks) == 2 for step in ran.recorded().steps)


def test_what_torchrun_started_must_fit_the_configuration(tmp_path: Path) -> None:
    three = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    said = one_sentence(run(["backend=real", *TWO, *QUICK], tmp_path, extra=three))
    assert "torchrun started 3 processes" in said
    assert "engine.tensor_parallel=2" in said


@pytest.mark.parametrize("skew_ms", [5.0, -40.0])
def test_a_clock_that_is_wrong_on_one_rank_is_named_first(skew_ms: float, tmp_path: Path) -> None:
    """Planted in the worker's process: its time of day is another one than rank 0's."""
    (tmp_path / "skewed").mkdir()
    (tmp_path / "skewed" / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if 'real_engine.parallel.worker' in sys.orig_argv:\n"
        f"    time.time_ns = lambda true=time.time_ns: true() + {int(skew_ms * 1e6)}\n"
    )
    right = environment(tmp_path)["PYTHONPATH"]
    for out, path in (("before", right), ("after", f"{tmp_path / 'skewed'}{os.pathsep}{right}")):
        words = ["backend=real", *TWO, *QUICK, f"run.dir={out}", "run.report=false"]
        done = run(words, tmp_path, extra={"PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
    before, after = load(tmp_path / "before"), load(tmp_path / "after")
    d = diff(before, after)
    [true], [wrong] = d.clocks
    assert not true.wrong
    assert wrong.low - 1e6 < skew_ms * 1e6 < wrong.high + 1e6
    first = verdict(d)[0]
    way = "ahead of" if skew_ms > 0 else "behind"
    assert first.startswith("Clock skew: rank 1's clock is ")
    assert f"ms {way} rank 0's" in first
    assert "Clock skew" not in " ".join(verdict(diff(before, before)))
