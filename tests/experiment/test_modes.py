"""The real engine's modes from the command line: the wall clock, and recorded plans executed again."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from lab.analysis.lateness import lateness
from lab.analysis.runs import load
from lab.observe.claim import partial_reason
from tests.experiment.command import QUICK, one_sentence, run
from tests.experiment.test_endings import end, start, until


def test_an_online_run_takes_its_time_and_says_how_late_it_took_requests_in(tmp_path: Path) -> None:
    words = ["backend=real", "model=tiny", *QUICK, "engine.mode=online", "run.dir=out"]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    ran = load(tmp_path / "out")
    assert ran.environment["clock"] == "wall"
    assert ran.metrics["requests"]["finished"] == 12
    last = ran.requests["arrival_ns"].max() / 1e9
    assert last < ran.steps["end_ns"].max() / 1e9 <= ran.metrics["wall_s"]
    lags = ran.requests["ingest_lag_ns"]
    assert lags.max() / 1e6 == ran.metrics["ingest"]["lag_max_ms"] > 0
    assert "requests were taken in up to" in done.stdout
    assert all(row.token_times[0] > row.request.arrival for row in ran.request_records())
    admits = ran.spans[ran.spans["name"] == "request.admit"]
    assert sum(f'"lab.admit.ingest_lag_ns":{lag}' in " ".join(admits["attributes"]) for lag in lags) == 12


@pytest.mark.parametrize(("rate", "warned"), [(20, False), (400, True)])
def test_lag_that_would_flatter_a_load_generator_is_a_warning(
    rate: int, warned: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "from policies.admission.always import Always\n"
        "class Dawdles(Always):\n"
        "    def admit(self, request, views, now):\n"
        "        time.sleep(0.02)\n"
        "        return super().admit(request, views, now)\n"
    )
    words = ["backend=real", "model=tiny", *QUICK, "engine.mode=online", f"trace.rate={rate}"]
    done = run([*words, *["admission=./mine.py:Dawdles"] * warned, "run.dir=out"], tmp_path)
    assert done.returncode == 0, done.stderr
    ran = load(tmp_path / "out")
    said = lateness(ran)
    assert said in done.stdout
    assert ("coordinated omission" in said) == warned, said
    found = re.search(r"up to ([\d.]+) ms after .* ([\d.]+) % of TTFT", said)
    assert found, said
    if warned:  # twelve at once, 20 ms each: the last waits for the eleven before it
        came = ran.requests["arrival_ns"]
        assert float(found[1]) > 11 * 20 - (came.max() - came.min()) / 1e6 - 0.1
        assert 25 < float(found[2]) < 100


def test_ctrl_c_saves_an_online_run_busy_or_idle(tmp_path: Path) -> None:
    words = ["backend=real", "model=tiny", "trace=poisson", "trace.n=2000", "trace.prompt.mean=24"]
    for rate in ("0.5", "200"):
        process = start([*words, f"trace.rate={rate}", "engine.mode=online", f"run.dir={rate}"], tmp_path)
        until(tmp_path / rate / "log.jsonl", process)
        end(process, signal.SIGINT)
        assert partial_reason(tmp_path / rate) == "it was interrupted (Ctrl-C)"
        ran = load(tmp_path / rate)
        assert len(ran.steps) == len(ran.plans) > 0
        assert len(ran.workload()) == 2000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["backend=sim", "engine.mode=online"], "engine.mode=online is a clock of the real engine"),
        (["backend=real", "engine.mode=onlin"], "did you mean 'online'?"),
        (["backend=real", "engine.mode=replay"], "needs the recorded run: engine.replay=RUN"),
        (["backend=real", "engine.replay=x"], "only read with engine.mode=replay"),
        (["backend=sim", "engine.mode=replay", "engine.replay=x"], "expected backend=real"),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in one_sentence(run([*words, "model=tiny", "run.dir=out"], tmp_path))
    assert not (tmp_path / "out").exists()
