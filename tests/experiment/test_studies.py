"""Studies: many runs by one command, kept, gone on with, and told apart from those that fail."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from lab import compose, plugins, studies
from lab.experiment import main
from lab.observe.claim import partial_reason
from lab.validation import validate
from tests.experiment.command import ROOT, environment, run

MINI = """# @package _global_
backend: sim
studies:
  schedulers:
    vary: {seam: policy, names: [fcfs, srpt]}
    workloads:
      plain: [trace=poisson, trace.n=24, trace.rate=40, trace.prompt.mean=64, trace.output.mean=24]
      tenants:
        - trace=gamma
        - trace.n=24
        - trace.rate=40
        - trace.tenants=2
        - trace.tenant_shares=[3,1]
        - trace.output.mean=16
  evictors:
    vary: {seam: eviction, names: [lru, fifo, belady]}
    overrides: [backend=cache]
    workloads:
      chat: [trace=chat, trace.limit=40]
    axes: {kv.blocks: [80, 120]}
"""
BROKEN = """
import os
from lab.policy import SchedulingPolicy

class Raises(SchedulingPolicy):
    def schedule(self, step):
        raise RuntimeError("no idea what to do")

class Dies(SchedulingPolicy):
    def schedule(self, step):
        os._exit(3)
"""


def configured(place: Path, text: str) -> Path:
    folder = place / "experiments" / "conf" / "experiment"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mini.yaml").write_text(text)
    return place


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    place = configured(tmp_path_factory.mktemp("mini"), MINI)
    done = run(["+experiment=mini", "run.dir=zoo", "seed=5"], place)
    assert done.returncode == 0, done.stderr
    return place, done


def test_every_combination_is_a_complete_run_of_its_own(
    mini: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    zoo = mini[0] / "zoo"
    runs = {str(path.parent.relative_to(zoo)) for path in zoo.rglob("_SUCCESS")}
    assert runs == {
        *(f"schedulers/{w}/{p}" for w in ("plain", "tenants") for p in ("fcfs", "srpt")),
        *(f"evictors/chat/{e}/kv.blocks={n}" for e in ("lru", "fifo", "belady") for n in (80, 120)),
    }
    config = (zoo / "schedulers/tenants/srpt/config.yaml").read_text()
    assert "seed: 5\n" in config
    assert "studies: {}\n" in config


def test_the_table_has_the_numbers_of_the_runs(mini: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    place, done = mini
    for study, keys in (
        ("schedulers", ("ttft_ms.p99", "e2e_ms.mean", "goodput.attainment", "preemptions")),
        ("evictors", ("kv.prefix_hit_ratio_blocks", "kv.hits")),
    ):
        frame = pd.read_parquet(place / "zoo" / study / "results.parquet")
        pd.testing.assert_frame_equal(
            frame, pd.read_csv(place / "zoo" / study / "results.csv"), check_dtype=False
        )
        for _, row in frame.iterrows():
            metrics = json.loads((place / "zoo" / study / row["run"] / "metrics.json").read_text())
            for key in keys:
                value = metrics
                for part in key.split("."):
                    value = value[part]
                assert row[key] == value, (row["run"], key)
    frame = pd.read_parquet(place / "zoo/schedulers/results.parquet").set_index(["workload", "name"])
    for workload in ("plain", "tenants"):
        mean = frame["e2e_ms.mean"].loc[workload]
        assert frame["percent_of_srpt"][workload, "fcfs"] == pytest.approx(100 * mean["srpt"] / mean["fcfs"])
    assert frame["fairness.jain"].notna().loc["tenants"].all()
    assert frame["fairness.jain"].isna().loc["plain"].all()
    assert f"{frame['e2e_ms.mean']['plain', 'fcfs']:,.1f}" in done.stdout


def test_nobody_hits_more_than_belady(mini: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    frame = pd.read_parquet(mini[0] / "zoo/evictors/results.parquet")
    table = frame.pivot_table(index="kv.blocks", columns="name", values="kv.prefix_hit_ratio_blocks")
    assert (table["belady"] >= table.max(axis=1)).all()
    assert (table["belady"] > table["fifo"]).any()
    of_belady = frame.set_index(["kv.blocks", "name"])["percent_of_belady"]
    assert of_belady[80, "belady"] == 100
    assert of_belady[80, "fifo"] == 0


def test_pictures_and_a_page_that_needs_nothing_else(
    mini: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    zoo = mini[0] / "zoo"
    pictures = {path.stem for path in zoo.rglob("figures/*.png")}
    assert pictures == {
        "latency-plain",
        "latency-tenants",
        "ttft-tpot",
        "fairness-tenants",
        "ranks",
        "hits",
    }
    for study in ("schedulers", "evictors"):
        page = (zoo / study / "report.html").read_text()
        markup = re.sub(
            r"<script>.*?</script>", "", page, flags=re.S
        )  # the browser's test is in tests/analysis
        assert "http://" not in markup.replace("http://www.w3.org", "")
        assert 'src="data:image/webp' in page
        assert len(page) < 3_000_000


def test_the_same_command_again_runs_only_what_is_missing(
    mini: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place = mini[0]
    zoo = place / "zoo"
    before = {path: path.stat().st_mtime_ns for path in zoo.rglob("_SUCCESS")}
    shutil.rmtree(zoo / "schedulers/plain/srpt")
    (zoo / "evictors/chat/lru/kv.blocks=80/config.yaml").write_text("another: configuration\n")
    done = run(["+experiment=mini", "run.dir=zoo", "seed=5"], place)
    assert done.returncode == 0, done.stderr
    assert "8 of 10 runs are there already." in done.stderr
    after = {path: path.stat().st_mtime_ns for path in zoo.rglob("_SUCCESS")}
    assert {path.parent.name for path in after if after[path] != before[path]} == {"srpt", "kv.blocks=80"}
    assert len([path for path in after if after[path] != before[path]]) == 2


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    place = configured(tmp_path, MINI.partition("  evictors:")[0])
    words = ["+experiment=mini", "run.dir=zoo", "studies.schedulers.workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.experiment", *words],
        cwd=place,
        env=environment(place / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not list((place / "zoo").rglob("_SUCCESS")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = [path.parent for path in (place / "zoo").rglob("_SUCCESS")]
    assert 1 <= len(kept) < 4
    assert (
        f"{len(kept)} of 4 runs are kept; to go on: python -m lab.experiment '+experiment=mini'" in errors
        or (f"{len(kept)} of 4 runs are kept; to go on: python -m lab.experiment +experiment=mini" in errors)
    )
    done = run(words, place)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 4 runs are there already." in done.stderr
    assert all(partial_reason(path.parent) is None for path in (place / "zoo").rglob("config.yaml"))
    assert len(list((place / "zoo").rglob("_SUCCESS"))) == 4


def test_a_policy_that_fails_costs_its_own_runs_only(tmp_path: Path) -> None:
    place = configured(tmp_path, MINI.partition("  evictors:")[0])
    (place / "broken.py").write_text(BROKEN)
    names = "[fcfs,'./broken.py:Raises','./broken.py:Dies','./nowhere.py:Gone']"
    done = run(
        ["+experiment=mini", "run.dir=zoo", f"studies.schedulers.vary.names={names}", "trace.limit=8"], place
    )
    assert done.returncode == 1, done.stderr
    assert "6 of 8 runs failed:" in done.stderr
    for name, why in (("Raises", "no idea what to do"), ("Dies", "exit code 3"), ("Gone", "nowhere.py")):
        assert [
            line for line in done.stderr.splitlines() if "plain ./" in line and name in line and why in line
        ]
    frame = pd.read_csv(place / "zoo/schedulers/results.csv")
    assert list(frame["name"]) == ["fcfs", "fcfs"]
    assert (frame["requests.finished"] == 8).all()


@pytest.mark.parametrize(
    ("before", "after", "words", "said"),
    [
        ("vary: {seam", "vry: {seam", [], "vry"),
        ("names: [fcfs, srpt]", "nmes: [fcfs]", [], "nmes"),
        ("seam: policy", "seam: polcy", [], "did you mean 'policy'?"),
        ("names: [fcfs, srpt]", "names: [fcsf]", [], "did you mean 'fcfs'?"),
        ("names: [fcfs, srpt]", "names: some", [], "expected all, or a list of names"),
        ("kv.blocks: [80, 120]", "kv.blocks: []", [], "kv.blocks is an empty list"),
        ("kv.blocks: [80, 120]", "kv.blocs: [80]", [], "did you mean 'kv.blocks'?"),
        ("trace.limit=40", "trace.limt=40", [], "did you mean 'trace.limit'?"),
        ("", "", ["studies.schedulers.worker=2"], "did you mean 'studies.schedulers.workers'?"),
        ("", "", ["studies.schedulers.workers=0"], "studies.schedulers.workers is 0"),
        ("", "", ["studies.schedulrs.workers=2"], "did you mean 'studies.schedulers'?"),
        ("", "", ["policy=fcfs"], "study 'schedulers' varies policy itself"),
        ("", "", ["backend=both"], "study 'schedulers' has backend=both; expected real, sim or cache"),
        ("", "", ["studies.schedulers.vary.names=['m:A','./m:A']"], "two runs that would both lie in"),
    ],
)
def test_a_study_that_makes_no_sense_is_one_sentence(
    before: str,
    after: str,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert before in MINI
    configured(tmp_path, MINI.replace(before, after, 1))
    monkeypatch.chdir(tmp_path)
    assert main(["+experiment=mini", "run.dir=zoo", *words]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert said in errors[0]
    assert not list(tmp_path.rglob("metrics.json"))


def test_the_zoo_has_every_scheduler_and_every_evictor(tmp_path: Path) -> None:
    with compose.composer(ROOT / "experiments" / "conf") as composer:
        cfg = composer.config(["+experiment=policy_zoo"])
    validate(cfg)
    planned = list(studies.plan(cfg, tmp_path))
    assert not [run.impossible for run in planned if run.impossible]
    for study, seam in (("schedulers", "policy"), ("evictors", "eviction")):
        targets = {provided[0].target for provided in plugins.providers(seam).values()}
        runs = [run for run in planned if run.study == study]
        workloads = {run.workload for run in runs}
        assert len({run.name for run in runs}) == len(targets)
        assert len(workloads) >= (3 if seam == "policy" else 1)
        capacities = len({run.axes for run in runs})
        assert capacities >= (6 if seam == "eviction" else 1)
        assert len(runs) == len(targets) * len(workloads) * capacities
    assert len({run.path for run in planned}) == len(planned)


def test_a_configuration_survives_its_yaml() -> None:
    with compose.composer() as composer:
        cfg = composer.config(
            [
                "policy=priority",
                "policy.ageing_per_s=0.5",
                "trace=gamma",
                "trace.tenant_shares=[1,2]",
                "seed=9",
            ]
        )
    text = compose.to_yaml(cfg)
    again = compose.from_yaml(text)
    assert compose.to_yaml(again) == text
    assert again.trace == cfg.trace
    assert again.trace.seed == 9
