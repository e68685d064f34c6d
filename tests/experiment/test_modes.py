"""The real engine's modes from the command line: the wall clock, and recorded plans executed again."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from lab.analysis.lateness import lateness
from lab.analysis.runs import load
from lab.observe.claim import partial_reason
from tests.experiment.command import QUICK, one_sentence, run
from tests.experiment.test_endings import end, start, until

ONLINE = ("backend=real", "model=tiny", *QUICK, "engine.mode=online", "run.report=false")
BURST = ("trace.rate=5000", "kv.blocks=9")
"""All at once into a cache that holds few of them."""


def test_an_online_run_takes_its_time_and_says_how_late_it_took_requests_in(tmp_path: Path) -> None:
    done = run([*ONLINE, "trace.rate=20", "run.dir=out"], tmp_path)
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


def test_lag_that_would_flatter_a_load_generator_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "from policies.admission.always import Always\n"
        "class Dawdles(Always):\n"
        "    def admit(self, request, views, now):\n"
        "        time.sleep(0.02)\n"
        "        return super().admit(request, views, now)\n"
    )
    words = [*ONLINE, "trace.rate=400", "admission=./mine.py:Dawdles", "run.dir=out"]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    ran = load(tmp_path / "out")
    said = lateness(ran)
    assert said in done.stdout
    assert "coordinated omission" in said
    found = re.search(r"up to ([\d.]+) ms after .* ([\d.]+) % of TTFT", said)
    assert found, said
    # Twelve at once, 20 ms each: the last waits for the eleven before it.
    came = ran.requests["arrival_ns"]
    assert float(found[1]) > 11 * 20 - (came.max() - came.min()) / 1e6 - 0.1
    assert 25 < float(found[2]) < 100


def test_ctrl_c_saves_an_online_run_busy_or_idle(tmp_path: Path) -> None:
    words = ["backend=real", "model=tiny", "trace=poisson", "trace.n=2000", "trace.prompt.mean=24"]
    for rate, ready in (("0.1", "PARTIAL"), ("200", "log.jsonl")):
        process = start([*words, f"trace.rate={rate}", "engine.mode=online", f"run.dir={rate}"], tmp_path)
        until(tmp_path / rate / ready, process)
        time.sleep(0.5)
        end(process, signal.SIGINT)
        assert partial_reason(tmp_path / rate) == "it was interrupted (Ctrl-C)"
        ran = load(tmp_path / rate)
        assert len(ran.steps) == len(ran.plans) == ran.metrics["steps"]
        assert (len(ran.steps) > 0) >= (rate == "200")
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


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an experiment on both backends in `out`, tight enough to preempt."""
    place = tmp_path_factory.mktemp("recordings")
    done = run(
        ["model=tiny", *QUICK, *BURST, "policy=sjf", "seed=3", "run.report=false", "run.dir=out"], place
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("side", ["real", "sim"])
def test_a_recorded_run_is_executed_again_and_differs_in_durations_alone(side: str, recordings: Path) -> None:
    words = [
        "backend=real",
        "model=tiny",
        "engine.mode=replay",
        f"engine.replay=out/{side}",
        "engine.threads=1",
        "run.report=false",
    ]
    done = run([*words, f"run.dir=again-{side}"], recordings)
    assert done.returncode == 0, done.stderr
    before, after = load(recordings / "out" / side), load(recordings / f"again-{side}")
    assert after.partial is None
    assert after.environment["evidence"] == "measured"
    assert after.environment["backend"]["recorded"] == side
    assert after.metrics["plan_digest"] == before.metrics["plan_digest"]
    assert after.metrics["preemptions"] == before.metrics["preemptions"]
    assert after.metrics["requests"] == before.metrics["requests"]
    assert after.config["policy"]["name"] == "sjf"
    assert after.config["seed"] == 3
    if side == "real":
        assert [r.output for r in after.request_records()] == [r.output for r in before.request_records()]
    for pair in [[f"out/{side}", f"again-{side}"], [f"again-{side}", f"out/{side}"]][side == "real" :]:
        told = run([*pair, "--json", "d.json"], recordings, module="lab.diff")
        assert told.returncode == 0, told.stderr
        found = json.loads((recordings / "d.json").read_text())
        assert found["decisions"]["first_divergent_step"] is None
        assert found["requests"]["matched"] == 12
        assert found["attribution"]["e2e"]["residual_ns"] == 0
        assert "executed recorded plans" in " ".join(told.stdout.split())
        assert "Parity" not in told.stdout
        assert "re-simulated" not in told.stderr + told.stdout


@pytest.mark.slow
def test_a_simulation_runs_on_the_durations_of_a_replay(recordings: Path) -> None:
    words = ["backend=real", "model=tiny", "engine.mode=replay", "engine.replay=out/sim"]
    assert run([*words, "run.dir=measured"], recordings).returncode == 0
    sim = [
        "backend=sim",
        "model=tiny",
        *QUICK,
        *BURST,
        "policy=sjf",
        "seed=3",
        "cost=replay",
        "cost.path=measured",
    ]
    done = run([*sim, "run.dir=driven"], recordings)
    assert done.returncode == 0, done.stderr
    assert load(recordings / "driven").metrics["requests"]["finished"] == 12


def test_what_a_replay_is_not_asked_is_refused(recordings: Path) -> None:
    base = ["backend=real", "engine.mode=replay", "run.dir=refused"]
    real = ["model=tiny", "engine.replay=out/real"]
    for words, said in (
        ([*real, "policy=fcfs"], "policy=fcfs has no say in a replay"),
        ([*real, "kv.blocks=20"], "kv.blocks=20 has no say in a replay"),
        ([*real, "engine.chunk=4"], "engine.chunk=4 has no say in a replay"),
        (["engine.replay=out/real"], "served the model 'tiny', and this one has model=smollm2"),
        (["model=tiny", "engine.replay=nowhere"], "there is no run at 'nowhere'"),
        (["model=tiny", "engine.replay=out"], "did you mean 'out/real'"),
    ):
        assert said in one_sentence(run([*base, *words], recordings))
    fleet = ["backend=sim", "model=tiny", *QUICK, "fleet.replicas=2", "routing=round_robin", "run.dir=fleet"]
    assert run(fleet, recordings).returncode == 0
    text = one_sentence(run([*base, "model=tiny", "engine.replay=fleet"], recordings))
    assert "steps of 2 replicas" in text
    assert not (recordings / "refused").exists()


def test_a_replay_that_is_interrupted_keeps_what_it_measured(tmp_path: Path) -> None:
    shape = ["trace=poisson", "trace.n=1200", "trace.rate=300", "trace.prompt.mean=64"]
    sim = ["backend=sim", "model=tiny", *shape, "run.dir=sim"]
    assert run(sim, tmp_path).returncode == 0
    words = ["backend=real", "model=tiny", "engine.mode=replay", "engine.replay=sim", "run.dir=out"]
    process = start(words, tmp_path)
    until(tmp_path / "out" / "log.jsonl", process)
    end(process, signal.SIGINT, signal.SIGINT)
    assert partial_reason(tmp_path / "out") == "it was interrupted (Ctrl-C)"
    ran, whole = load(tmp_path / "out"), load(tmp_path / "sim")
    steps = len(ran.steps)
    assert 0 < steps < len(whole.steps)
    assert ran.steps["digest"].tolist() == whole.steps["digest"].tolist()[:steps]
    assert {"finished", "unfinished"} >= set(ran.requests["outcome"])
