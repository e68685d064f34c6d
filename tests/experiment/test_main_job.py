"""The main job end to end: what it prints, what it leaves, and that a simulation repeats byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab.analysis.runs import load
from lab.observe.claim import partial_reason
from tests.experiment.command import QUICK, ROOT, environment, run

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run of both backends with the tiny model."""
    place = tmp_path_factory.mktemp("both")
    done = run(["policy=fcfs", "model=tiny", *QUICK, "run.dir=out"], place)
    assert done.returncode == 0, done.stderr
    return place / "out", done


def test_both_sides_a_diff_and_a_report_are_left_and_named(
    both: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = both
    for side in ("real", "sim"):
        assert partial_reason(out / side) is None
        assert f"{side}: out/{side}" in done.stdout
    assert "report: out/report.html" in done.stdout
    assert (out / "report.html").stat().st_size > 10_000
    for words in ("TTFT", "TPOT", "ITL", "E2E", "p50", "p90", "p99", "Throughput", "Goodput", "Preemptions"):
        assert words in done.stdout


def test_a_new_run_directory_is_named_by_policy_and_trace_not_by_where_a_file_lies(tmp_path: Path) -> None:
    (tmp_path / "ideas").mkdir()
    source = "from policies.scheduling.fcfs import Fcfs\n\n\nclass Mine(Fcfs): ...\n"
    (tmp_path / "ideas" / "mine.py").write_text(source)
    for word in ("./ideas/mine.py", "./ideas/mine.py:Mine", "policies.scheduling.fcfs:Fcfs"):
        done = run(["backend=sim", f"policy={word}", *QUICK], tmp_path)
        assert done.returncode == 0, done.stderr
    names = {path.name.split("-", 2)[2].rpartition("-")[0] for path in (tmp_path / "runs").iterdir()}
    assert names == {"mine-poisson", "mine-Mine-poisson", "policies.scheduling.fcfs-Fcfs-poisson"}


def test_the_machines_speed_around_the_real_run_is_kept_and_said(
    both: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = both
    found = json.loads((out / "sim" / "cost.json").read_text())["machine_ns"]
    assert found.keys() == {"calibrated", "before", "after"}
    for speed in found.values():
        assert speed.keys() == {"1", "4", "16", "128"}
        assert all(0 < ns < 1e9 for ns in speed.values())
    assert "The machine against when it was calibrated" in done.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The machine against when it was calibrated" in page
    assert "machine&#39;s drift, the rest the model&#39;s" in page
    assert not (out / "real" / "cost.json").exists()


def test_metrics_have_every_documented_key(both: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    for side in ("real", "sim"):
        metrics = json.loads((both[0] / side / "metrics.json").read_text())
        assert metrics["requests"]["finished"] == 12
        assert {"finished", "rejected", "aborted"} <= set(metrics["requests"])
        for latency in LATENCIES:
            assert set(metrics[latency]) == {"mean", "p50", "p90", "p99"}
        assert set(metrics["throughput"]) == {"requests_per_s", "output_tokens_per_s", "total_tokens_per_s"}
        kv = {"prefix_hit_ratio_tokens", "prefix_hit_ratio_blocks", "evictions", "peak_blocks"}
        assert kv <= set(metrics["kv"])
        assert {"preemptions", "steps", "duration_s", "plan_digest", "wall_s"} <= set(metrics)


def test_the_diff_says_how_far_decisions_agree_and_the_replay_has_parity(
    both: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    diff = json.loads((both[0] / "diff.json").read_text())
    assert diff["replay"]["parity"] is True
    assert "first_divergent_step" in diff["decisions"]
    for latency in LATENCIES:
        row = diff["metrics"][f"{latency}.p50"]
        assert set(row) == {"real", "sim", "error_pct"}
    real, sim = (json.loads((both[0] / side / "metrics.json").read_text()) for side in ("real", "sim"))
    row = diff["metrics"]["e2e_ms.mean"]
    assert (row["real"], row["sim"]) == (real["e2e_ms"]["mean"], sim["e2e_ms"]["mean"])
    assert row["error_pct"] == pytest.approx(100 * (row["sim"] / row["real"] - 1))
    assert diff["attribution"]


def test_the_second_run_on_a_machine_does_not_calibrate_again(
    both: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, first = both
    again = run(["policy=sjf", "model=tiny", *QUICK, "run.dir=again"], out.parent)
    assert again.returncode == 0, again.stderr
    assert "Calibrated on" in first.stderr
    assert "Calibrated on" not in again.stderr
    once_more = run(["backend=sim", "model=tiny", *QUICK, "run.dir=alone"], out.parent)
    assert "reference machine" not in once_more.stderr  # a simulation alone finds the calibration too


def test_a_recorded_run_can_drive_a_simulation(both: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out = both[0]
    words = ["backend=sim", "model=tiny", *QUICK, "cost=replay", "cost.path=out/real", "run.dir=replayed"]
    done = run(words, out.parent)
    assert done.returncode == 0, done.stderr
    assert load(out.parent / "replayed").metrics["plan_digest"] == load(out / "real").metrics["plan_digest"]


def test_diff_of_two_runs_by_command_says_the_same_as_the_main_job(
    both: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out = both[0]
    done = run(["out/real", "out/sim", "--json", "diff2.json"], out.parent, module="lab.diff")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(p.read_text()) for p in (out / "diff.json", out.parent / "diff2.json"))
    assert first["metrics"] == second["metrics"]
    assert first["decisions"] == second["decisions"]
    same = run(["out/sim", "out/sim", "--json", "same.json"], out.parent, module="lab.diff")
    assert same.returncode == 0, same.stderr
    zero = json.loads((out.parent / "same.json").read_text())
    assert zero["decisions"]["first_divergent_step"] is None
    assert all(not row["error_pct"] for row in zero["metrics"].values())


def test_two_simulations_of_one_configuration_are_equal_byte_by_byte(tmp_path: Path) -> None:
    words = ["backend=sim", "trace.limit=40", "kv.blocks=60", "kv.block_size=16", "export.otlp_file=true"]
    for name in ("one", "two"):
        done = run(
            [*words, f"run.dir={name}"], tmp_path, extra={"PYTHONHASHSEED": str(len(name) + ord(name[0]))}
        )
        assert done.returncode == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert {"config.yaml", "requests.parquet", "steps.parquet", "spans.parquet", "plans.parquet"} <= set(
        files
    )
    for name in files:
        one, two = (tmp_path / side / name for side in ("one", "two"))
        if name == "environment.json":
            continue
        if name == "metrics.json":
            a, b = (json.loads(p.read_text()) for p in (one, two))
            a.pop("wall_s"), b.pop("wall_s")
            assert a == b
        else:
            assert one.read_bytes() == two.read_bytes(), f"{name} differs"


def test_a_simulation_imports_neither_torch_nor_transformers_nor_pandas(tmp_path: Path) -> None:
    code = (
        "import sys; from lab.experiment import main; "
        "code = main(['backend=sim', 'trace.limit=5', 'run.dir=out']); "
        "print('LOADED', [m for m in ('torch', 'transformers', 'pandas', 'matplotlib') if m in sys.modules]); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_a_sweep_runs_every_combination_into_directories_of_its_own(tmp_path: Path) -> None:
    done = run(["-m", "backend=sim", "policy=fcfs,sjf", "trace.limit=6", "run.dir=sweep"], tmp_path)
    assert done.returncode == 0, done.stderr
    chosen = [load(tmp_path / "sweep" / str(i)).config["policy"]["name"] for i in range(2)]
    assert chosen == ["fcfs", "sjf"]


def test_a_policy_of_the_users_own_runs_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lab.policy import SchedulingPolicy\n"
        "class Newest(SchedulingPolicy):\n"
        "    def __init__(self, width: int = 3):\n"
        "        self.waiting, self.width = [], width\n"
        "    def on_arrival(self, request, now):\n"
        "        self.waiting.append(request)\n"
        "    def on_preempt(self, request, how, now):\n"
        "        self.waiting.append(request)\n"
        "    def schedule(self, step):\n"
        "        for request in step.running.values():\n"
        "            step.run(request)\n"
        "        while self.waiting and len(step.running) < self.width and step.run(self.waiting[-1]):\n"
        "            self.waiting.pop()\n"
    )
    words = [
        "policy=./mine.py:Newest",
        "policy.width=2",
        "model=tiny",
        *QUICK,
        "run.dir=out",
        "run.report=false",
    ]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "diff.json").read_text())["replay"]["parity"] is True
    assert int(load(tmp_path / "out" / "real").steps["running"].max()) <= 2


def test_example_of_the_policy_module_is_a_working_policy() -> None:
    from tests.control.harness import drain, engine, request

    text = (ROOT / "lab" / "policy.py").read_text()
    start = text.index("    class Newest")
    end = text.index("(`RequestView`s stay valid")
    source = "\n".join(line.removeprefix("    ") for line in text[start:end].splitlines())
    space: dict[str, object] = {}
    exec("from lab.policy import SchedulingPolicy\n" + source.replace("'''", '"""'), space)
    core, notes = engine(space["Newest"](), max_seqs=1)  # type: ignore[operator]
    for name in "abc":
        core.add(request(name, 8), 0)
    drain(core)
    assert list(notes.requests) == ["c", "b", "a"]
