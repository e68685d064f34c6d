"""Where simulated durations come from, and what is said when they don't belong to what is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.config import Config, CostConfig, KvConfig, ModelConfig
from lab.console import Console
from lab.control.executor import Capacity
from lab.control.plan import StepPlan, StepResult
from lab.errors import ConfigError
from sim.backend import SimBackend, open_backend
from sim.cost.linear import LinearCost
from sim.executor import SimExecutor
from sim.fitted import REFERENCE, calibration_file
from tests.experiment.command import one_sentence, run


class Heard(Console):
    """A console that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class Timed(SimExecutor):
    """A data plane that tells its durations by itself, as one that can be measured does."""

    def execute(self, plan: StepPlan) -> StepResult:
        self.plan_ns(plan)
        return super().execute(plan)


def engine(threads: int) -> SimBackend:
    """What the simulator is opened beside: here an engine whose steps take what the reference machine's took."""
    cost, capacity = LinearCost.load(REFERENCE), Capacity(200, 16, 2048, 49152)
    beside = SimBackend(cost, capacity, "modelled", {"threads": threads, "model": "tiny"})
    beside.executor = Timed(cost, capacity)
    return beside


def configured(cache: Path) -> Config:
    return Config(model=ModelConfig("tiny", "float32"), cache_dir=str(cache))


def test_a_kept_calibration_of_another_thread_count_is_used_with_a_warning(tmp_path: Path) -> None:
    cfg, first = configured(tmp_path), Heard()
    open_backend(cfg, first, engine(threads=4))
    assert calibration_file(cfg, os.environ).is_file()
    assert any(line.startswith("Calibrated on") for line in first.lines)
    for threads, warned in ((4, False), (2, True)):
        heard = Heard()
        found = open_backend(cfg, heard, engine(threads))
        assert found.about["calibration"]["threads"] == 4
        assert not any(line.startswith("Calibrated on") for line in heard.lines)
        said = [line for line in heard.lines if "made with 4 threads and the engine runs with 2" in line]
        assert bool(said) is warned


def test_a_cache_that_cannot_be_written_costs_the_keeping_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    cfg, heard = configured(tmp_path / "file" / "cache"), Heard()
    found = open_backend(cfg, heard, engine(threads=4))
    assert found.about["calibration"]["threads"] == 4
    (line,) = (line for line in heard.lines if "can't be kept" in line)
    assert str(calibration_file(cfg, os.environ)) in line
    assert "Not a directory" in line


@pytest.mark.parametrize(("blocks", "good"), [(None, True), (60, True), (61, False)])
def test_a_replayed_run_keeps_its_own_number_of_blocks(
    blocks: int | None, good: bool, tmp_path: Path
) -> None:
    words = ["backend=sim", "trace.limit=6"]
    recorded = run([*words, "kv.blocks=60", "run.dir=recorded"], tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    cfg = Config(cost=CostConfig("replay", path=str(tmp_path / "recorded")), kv=KvConfig(blocks=blocks))
    if good:
        assert open_backend(cfg, Heard(), None).capacity.blocks == 60
        return
    with pytest.raises(ConfigError, match=r"kv\.blocks is 61, but the run replayed by cost\.path had 60"):
        open_backend(cfg, Heard(), None)
    again = [*words, "cost=replay", "cost.path=recorded", "kv.blocks=61", "run.dir=out"]
    assert "kv.blocks is 61" in one_sentence(run(again, tmp_path))
