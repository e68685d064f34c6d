"""However a command ends, what was recorded is there, nothing of another run is, and a sentence says which."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.analysis.runs import load
from lab.observe.claim import partial_reason
from tests.experiment.command import QUICK, environment, one_sentence, run

LONG = ("model=tiny", "trace=poisson", "trace.n=20000", "trace.rate=20")
"""Goes on for as long as a test needs to end it."""


def start(words: list[str], place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lab.experiment", *words],
        cwd=place,
        env=environment(place / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(ready: Path, process: subprocess.Popen[str]) -> None:
    """Until the file has content."""
    deadline = time.monotonic() + 120
    while not (ready.exists() and ready.stat().st_size > 0):
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process: subprocess.Popen[str], *signals: int) -> str:
    """Send the signals one after the other; what was said on stderr."""
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)  # two at the same moment are one to the receiver
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.strip().endswith("interrupted")
    return said


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        ((signal.SIGTERM,), "SIGTERM"),
        ((signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGTERM), "Ctrl-C"),
    ],
)
def test_signals_leave_whole_tables_and_say_where(
    signals: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    process = start(["backend=sim", *LONG, "run.dir=out"], tmp_path)
    until(tmp_path / "out" / "log.jsonl", process)
    said = end(process, *signals)
    assert "'out'" in said
    assert partial_reason(tmp_path / "out") == f"it was interrupted ({reason})"
    ran = load(tmp_path / "out")
    assert len(ran.steps) == len(ran.plans) == ran.metrics["steps"] > 0
    assert (ran.requests["outcome"] == "finished").any()
    assert len(ran.spans) > 0


def test_a_second_run_into_the_same_directory_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    process = start(["backend=sim", *LONG, "run.dir=out"], tmp_path)
    until(tmp_path / "out" / "log.jsonl", process)
    text = one_sentence(run(["backend=sim", "trace.limit=5", "run.dir=out"], tmp_path))
    assert "another run is being written to 'out' now" in text
    end(process, signal.SIGINT)
    assert len(load(tmp_path / "out").workload()) == 20_000
    again = run(["backend=sim", "trace.limit=5", "run.dir=out"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert partial_reason(tmp_path / "out") is None


def test_a_policy_that_exits_is_a_policy_that_failed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "from policies.scheduling.fcfs import Fcfs\n"
        "class Leaver(Fcfs):\n"
        "    def schedule(self, step):\n"
        "        if step.now > 2 * 10**9:\n"
        "            sys.exit(0)\n"
        "        super().schedule(step)\n"
    )
    text = one_sentence(run(["backend=sim", "policy=./mine.py:Leaver", "run.dir=out"], tmp_path))
    assert "Leaver" in text
    assert "SystemExit" in text
    assert "mine.py:6" in text
    assert "mine.py:6" in (partial_reason(tmp_path / "out") or "")
    assert len(load(tmp_path / "out").steps) > 0


class Refuses(http.server.BaseHTTPRequestHandler):
    """A collector that takes nothing."""

    def do_POST(self) -> None:
        self.send_response(400)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """In silence."""


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def refused(
    tmp_path_factory: pytest.TempPathFactory, collector: str
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An experiment on both backends, with a collector that refuses its spans."""
    place = tmp_path_factory.mktemp("refused")
    return place, run(["model=tiny", *QUICK, "run.dir=out", f"export.otlp_endpoint={collector}"], place)


def test_a_collector_that_refuses_costs_an_exit_code_and_nothing_else(
    refused: tuple[Path, subprocess.CompletedProcess[str]], collector: str
) -> None:
    place, done = refused
    text = one_sentence(done)
    assert collector in text
    assert "real and sim" in text
    for side in ("real", "sim", "replay"):
        assert partial_reason(place / "out" / side) is None
    assert "TTFT" in done.stdout
    assert "report: out/report.html" in done.stdout
    assert (place / "out" / "report.html").exists()
    assert json.loads((place / "out" / "diff.json").read_text())["replay"]["parity"] is True
    assert "Failed to export" not in done.stderr


def test_an_interrupted_experiment_leaves_nothing_of_the_one_before_it(
    refused: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    for name in ("out", "cache"):
        shutil.copytree(refused[0] / name, tmp_path / name)
    process = start([*LONG, "run.dir=out"], tmp_path)
    said_real = tmp_path / "out" / "real" / "log.jsonl"
    before = said_real.stat().st_ino
    while said_real.exists() and said_real.stat().st_ino == before and process.poll() is None:
        time.sleep(0.02)
    until(said_real, process)
    text = one_sentence(run([*LONG, "run.dir=out"], tmp_path))
    assert "another run is being written to 'out' now" in text
    end(process, signal.SIGINT)
    assert os.listdir(tmp_path / "out") == ["real"]
    assert "Ctrl-C" in (partial_reason(tmp_path / "out" / "real") or "")


@pytest.mark.parametrize("backend", ["sim", "real", "cache"])
def test_a_run_alone_never_replaces_one_side_of_an_experiment(
    backend: str, refused: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    place, _ = refused
    before = (place / "out" / "sim" / "metrics.json").read_bytes()
    text = one_sentence(run([f"backend={backend}", "kv.blocks=50", "run.dir=out/sim"], place))
    assert "'out/sim' is one side of an experiment on both backends" in text
    assert (place / "out" / "sim" / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("localhost:4318", "expected"),
        ("http://", "names no host"),
        ("http:///v1/traces", "names no host"),
        ("'http://local host:4318'", "a space"),
        ("http://localhost:many", "many"),
        ("http://localhost:99999", "range"),
    ],
)
def test_an_endpoint_that_cannot_be_one_is_refused_before_the_run(
    endpoint: str, said: str, tmp_path: Path
) -> None:
    words = ["backend=sim", "trace.limit=5", "run.dir=out", f"export.otlp_endpoint={endpoint}"]
    text = one_sentence(run(words, tmp_path))
    assert "export.otlp_endpoint is" in text
    assert said in text
    assert not (tmp_path / "out").exists()


def test_a_cache_too_small_for_every_request_is_said(tmp_path: Path) -> None:
    done = run(["backend=sim", "trace.limit=9", "kv.blocks=2", "run.dir=out"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all 9 requests were rejected, for example: prompt of " in done.stdout
    assert "never fits the KV cache" in done.stdout
    some = run(["backend=sim", "trace.limit=30", "kv.blocks=12", "run.dir=some"], tmp_path)
    assert load(tmp_path / "some").metrics["requests"]["rejected"] > 0
    assert "requests were rejected" not in some.stdout


def test_help_offers_prepared_experiments_where_there_are_any(tmp_path: Path) -> None:
    from lab.usage import usage

    folder = tmp_path / "experiments" / "conf" / "experiment"
    folder.mkdir(parents=True)
    for there in (None, tmp_path / "absent", folder.parent):
        assert "a prepared one" not in usage("x", "", [], there)
    (folder / "tight.yaml").write_text("# @package _global_\nkv:\n  blocks: 60\n")
    assert "+experiment=NAME  a prepared one: tight\n" in run(["--help"], tmp_path).stdout


def test_a_partial_reference_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    words = ["trace=poisson", "trace.n=400", "trace.rate=20", "backend=sim", "seed=3"]
    whole = run([*words, "run.dir=whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "mine.py").write_text(
        "from policies.scheduling.fcfs import Fcfs\n"
        "class Stops(Fcfs):\n"
        "    def schedule(self, step):\n"
        "        if step.now > 5 * 10**9:\n"
        "            raise KeyboardInterrupt\n"
        "        super().schedule(step)\n"
    )
    cut = run([*words, "policy=./mine.py:Stops", "run.dir=cut"], tmp_path)
    assert cut.returncode == 130, cut.stderr
    done = run(["cut", "whole", "--json", "d.json"], tmp_path, module="lab.diff")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "d.json").read_text())
    steps = len(load(tmp_path / "cut").steps)
    assert set(found["decisions"]["steps"].values()) == {steps}
    assert found["decisions"]["first_divergent_step"] is None
    assert found["counterfactual"] is None
    assert found["replay"]["parity"] is None
    assert found["scope"]["same_workload"] is True  # what the first run never came to isn't missing
    assert all(not row["error_pct"] for row in found["metrics"].values())
    said = " ".join(done.stdout.split())
    assert f"compared are the {steps} steps that both took" in said
    assert "Parity" not in said
