"""Noise is not called a regression, a slower run is, and another schedule always."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from lab import regress as command
from lab.analysis import load
from lab.analysis.baseline import Baseline, Measured, gather, read
from lab.analysis.regression import Row, _Test, regress
from lab.errors import RunError
from lab.experiment import main as experiment

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted(p for p in (ROOT / "experiments" / "baselines").glob("*.json") if p.stem != "fidelity")
WORDS = ("backend=sim", "cost=reference", "trace=chat", "trace.limit=24", "kv.blocks=40")


def measured(rng: random.Random, noise: float, scale: float = 1.0, error: float = 5.0) -> Measured:
    """A made-up run: requests of very different sizes, and one factor for all of what the machine was busy with."""
    factor = scale * rng.lognormvariate(0.0, noise)
    sizes = {f"r{i}": 1_000_000 * 3 ** (i % 8) for i in range(24)}
    times = {name: round(size * factor * rng.lognormvariate(0.0, 0.02)) for name, size in sizes.items()}
    return Measured(
        digest=f"{rng.random()}",
        steps=100,
        marks={},
        metrics={"throughput.output_tokens_per_s": 50.0 / factor, "preemptions": 0.0},
        latencies_ns={"ttft": times, "e2e": {name: 2 * time for name, time in times.items()}},
        errors_pct={"e2e_ms.mean": rng.gauss(error, 0.3)},
        parity=True,
    )


def side(runs: list[Measured], **about: Any) -> Baseline:
    said = {"workload": "w", "backend": "real", "evidence": "measured", "machine": "m", "policy": "fcfs"}
    return Baseline("made up", said | about, {}, runs)


def group(seed: int, count: int, noise: float = 0.03, scale: float = 1.0, error: float = 5.0) -> Baseline:
    rng = random.Random(seed)
    return side([measured(rng, noise, scale, error) for _ in range(count)])


def row(rows: list[Row], start: str) -> Row:
    return next(found for found in rows if found.name.startswith(start))


def test_the_interval_is_student_s() -> None:
    from scipy import stats

    rng = random.Random(4)
    a, b = [rng.gauss(0, 1) for _ in range(5)], [rng.gauss(0.3, 1) for _ in range(4)]
    expected = stats.ttest_ind(b, a, equal_var=True).confidence_interval(0.99)
    found = _Test(0.99, 5, 4).interval(a, b)
    assert found is not None
    assert found[1:] == pytest.approx((expected.low, expected.high))


def test_noise_alone_is_seldom_called_worse_and_a_fifth_slower_nearly_always() -> None:
    alarms = power = 0
    for seed in range(200):
        baseline = group(seed, 5)
        quiet = regress(baseline, group(seed + 1000, 5)).rows
        alarms += row(quiet, "e2e,").verdict in ("worse", "better")
        slow = regress(baseline, group(seed + 2000, 5, scale=1.2)).rows
        power += row(slow, "e2e,").verdict == row(slow, "throughput").verdict == "worse"
    assert alarms <= 6  # 1 % is promised: 2 of 200
    assert power >= 195


def test_requests_are_paired_so_their_sizes_add_nothing_to_the_noise() -> None:
    found = row(regress(group(1, 5, noise=0.01), group(2, 5, noise=0.01, scale=1.1)).rows, "ttft,")
    assert found.verdict == "worse"
    assert found.low is not None
    assert found.high is not None
    assert 0.05 < found.low < 0.1 < found.high < 0.15
    spread = statistics.pstdev([3.0 ** (i % 8) for i in range(24)])
    assert spread > 100 * (found.high - found.low)


def test_one_measured_run_on_each_side_gets_no_verdict_on_its_times() -> None:
    result = regress(group(1, 1), group(2, 1, scale=3.0))
    assert {found.verdict for found in result.rows if found.kind == "performance"} == {"unknown"}
    assert not result.failed
    assert any("Give repeats" in note for note in result.notes)
    assert row(regress(group(1, 5), group(2, 1, scale=2.0)).rows, "e2e,").verdict == "worse"


def test_times_of_another_machine_are_not_compared() -> None:
    a, b = group(1, 4), group(2, 4, scale=2.0)
    elsewhere = dataclasses.replace(b, about=b.about | {"machine": "other"})
    result = regress(a, elsewhere)
    assert {found.kind for found in result.rows} == {"schedule", "fidelity"}
    assert any("another machine" in note for note in result.notes)


def test_fidelity_gets_worse_when_errors_grow_and_parity_must_hold() -> None:
    a = group(1, 4)
    assert row(regress(a, group(2, 4)).rows, "error of e2e").verdict == "same"
    assert row(regress(a, group(2, 4, error=-9.0)).rows, "error of e2e").verdict == "worse"
    assert row(regress(a, group(2, 4, error=1.0)).rows, "error of e2e").verdict == "better"
    broken = side([dataclasses.replace(run, parity=False) for run in group(2, 4).runs])
    assert [found.name for found in regress(a, broken).failed] == ["parity"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = {"base": (), "same": (), "tight": ("kv.blocks=38",), "other": ("trace.limit=20",)}
    for name, words in made.items():
        kept = [word for word in WORDS if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
        assert experiment([*kept, *words, f"run.dir={folder / name}"]) == 0
    return {name: folder / name for name in made}


def test_a_simulation_repeats_exactly_and_a_changed_schedule_is_found(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--folder", str(tmp_path))
    assert command.main(["record", "chat", str(runs["base"]), *folder]) == 0
    assert command.main(["check", "chat", str(runs["same"]), *folder, "--tolerance", "0"]) == 0
    assert "no regression" in capsys.readouterr().out
    assert command.main(["check", "chat", str(runs["tight"]), *folder]) == 1
    out = capsys.readouterr().out
    assert "differ in kv.blocks" in out
    said = next(line for line in out.splitlines() if "other decision is in one of" in line).split()
    low, high = int(said[-3]), int(said[-1])
    pair = [load(runs[name]).steps["digest"].tolist() for name in ("base", "tight")]
    first = next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b)
    assert low <= first <= high
    assert high - low < len(pair[0]) / 16
    assert (tmp_path / "chat.json").stat().st_size < 20_000


def test_what_can_t_be_compared_is_one_sentence(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--folder", str(tmp_path))
    with pytest.raises(RunError, match="differ in workload"):
        gather("x", [runs["base"], runs["other"]])
    with pytest.raises(RunError, match=r"differ in kv\.blocks"):
        gather("x", [runs["base"], runs["tight"]])
    command.main(["record", "chat", str(runs["base"]), *folder])
    partial = tmp_path / "partial"
    shutil.copytree(runs["base"], partial)
    (partial / "_SUCCESS").unlink()
    (partial / "PARTIAL").write_text("diptych run partial: it was interrupted.\n")
    (tmp_path / "torn.json").write_text('{"format": 1, "runs": [')
    (tmp_path / "old.json").write_text('{"format": 0}')
    capsys.readouterr()
    for words, says in (
        (["check", "chta", str(runs["base"])], "did you mean 'chat'"),
        (["check", "chat", str(runs["other"])], "differ in workload"),
        (["check", "chat", str(partial)], "is partial"),
        (["check", "torn", str(runs["base"])], "can't read the baseline"),
        (["check", "old", str(runs["base"])], "another format"),
        (["check", "chat", str(runs["base"]), "--confidence", "101"], "--confidence is 101"),
    ):
        assert command.main([*words, *folder]) in (1, 2)
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert says in errors[0]


def test_an_experiment_records_a_baseline_that_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.json"
    words = [*WORDS, f"run.dir={tmp_path / 'run'}", f"run.baseline={kept}"]
    monkeypatch.setattr("sys.argv", ["experiment", *words])
    assert experiment(words) == 0
    assert "kept.json" not in (tmp_path / "run" / "config.yaml").read_text()
    assert read(kept).about["words"] == list(WORDS)
    said = json.loads(kept.read_text())
    said["runs"][0]["digest"] = "0" * 32
    (tmp_path / "changed.json").write_text(json.dumps(said))
    capsys.readouterr()
    assert command.main(["again", str(kept)]) == 0
    assert capsys.readouterr().out.startswith("baseline 'kept': 1 runs of fcfs on sim")
    assert command.main(["again", str(tmp_path / "changed.json")]) == 1
    assert "regression: digest" in capsys.readouterr().out


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_simulator_still_decides_as_it_did(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a change is meant: `python -m lab.experiment <words> run.baseline=NAME`, and say so in the commit."""
    assert command.main(["again", str(path)]) == 0, capsys.readouterr().out


def test_baselines_are_there() -> None:
    assert len(KEPT) >= 2
