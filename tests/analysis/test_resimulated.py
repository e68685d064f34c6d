"""Runs simulated again to be compared: in memory as on disk, and with the nearest of all recorded durations."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.analysis import Diff, load
from lab.analysis.decisions import compare_decisions
from lab.analysis.frames import PARTS, scalars
from lab.analysis.runs import Run
from lab.diff import compare
from lab.experiment import main
from sim.cost.replay import Nearest
from sim.resimulate import resimulate

SMALL = ("backend=sim", "cost=reference", "run.report=false", "trace=poisson", "trace.n=30", "trace.rate=20")

shape = st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(0, 60))


@settings(max_examples=300, deadline=None)
@given(recorded=st.lists(shape, min_size=1, max_size=40), here=shape)
def test_the_nearest_recorded_step_is_the_one_a_look_at_all_finds(
    recorded: list[tuple[int, int, int]], here: tuple[int, int, int]
) -> None:
    points = np.log1p(np.array(recorded, dtype=float))
    distance = ((points - np.log1p(here)) ** 2).sum(axis=1)
    assert Nearest(recorded)(*here) == int(np.argmin(distance))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    root = tmp_path_factory.mktemp("again")
    for policy in ("fcfs", "sjf"):
        words = (f"policy={policy}", "kv.blocks=120", "trace.prompt.high=500", f"run.dir={root / policy}")
        assert main([*SMALL, *words]) == 0
    return load(root / "fcfs"), load(root / "sjf")


def test_a_run_kept_in_memory_is_the_one_on_disk(pair: tuple[Run, Run], tmp_path: Path) -> None:
    kept, written = resimulate(pair[1], pair[0], None), resimulate(pair[1], pair[0], tmp_path / "again")
    both = [scalars(run.metrics) for run in (kept, written)]
    both[1].pop("wall_s", None)
    assert both[0] == both[1]
    found = [compare_decisions(pair[0], run, ("a", "b")) for run in (kept, written)]
    assert found[0]["first_divergence"] is not None
    assert found[0] == found[1]
    for table in ("steps", "plans", "requests"):
        frame = getattr(kept, table)
        for column in frame.columns.difference(["intervals", "blocks"]):
            left, right = (list(getattr(run, table)[column]) for run in (kept, written))
            assert repr(left) == repr(right), column


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 24))]
)
def test_of_any_two_runs_the_parts_sum_to_the_whole_and_of_a_run_and_itself_all_are_zero(
    seed: int, tmp_path: Path
) -> None:
    """Random policies, caches and loads through the whole simulator; preemptions and swaps among them."""
    draw = random.Random(f"pairs/{seed}")

    def one(name: str) -> Run:
        words = (
            f"policy={draw.choice(['fcfs', 'sjf', 'srpt', 'priority'])}",
            f"kv.blocks={draw.choice([60, 90, 200])}",
            f"kv.host_blocks={draw.choice([0, 100])}",
            f"kv.prefix_cache={draw.choice(['true', 'false'])}",
            f"engine.token_budget={draw.choice([128, 512])}",
            f"eviction={draw.choice(['lru', 'fifo', 'lru_head'])}",
        )
        workload = (f"trace.seed={seed}", "trace.prefix_tokens=48", "trace.prompt.high=600")
        assert main([*SMALL, *workload, *words, f"run.dir={tmp_path / name}"]) == 0
        return load(tmp_path / name)

    a, b = one("a"), one("b")
    exact(compare(a, b))
    itself = compare(a, load(tmp_path / "a"))
    exact(itself)
    assert not itself.requests[[c for c in itself.requests if str(c).endswith("_delta_ns")]].to_numpy().any()
    assert itself.parity is True
    assert itself.counterfactual is not None
    assert not any(value for cell in itself.counterfactual.values() for value in cell.values())


def exact(found: Diff) -> None:
    for latency in ("e2e", "ttft"):
        parts = sum(found.requests[f"{latency}_{part}_delta_ns"] for part in PARTS)
        assert (found.requests[f"{latency}_delta_ns"] - parts == 0).all()
    for cell in (found.counterfactual or {}).values():
        assert cell["total"] == pytest.approx(cell["duration"] + cell["decision"], abs=1e-6)
