"""Tidy tables say the same as the records they come from, and figures show all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.analysis import Run, launch, plots
from lab.errors import ConfigError, RunError

WORDS = (
    "backend=sim",
    "cost=reference",
    "trace=poisson",
    "trace.n=40",
    "trace.rate=30",
    "trace.prompt.mean=80",
    "trace.output.mean=20",
    "kv.blocks=30",
    "kv.host_blocks=30",
    "preemption.mode=swap",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return launch(*WORDS, f"run.dir={tmp_path_factory.mktemp('runs') / 'run'}")


def test_latencies_are_those_of_the_metrics(run: Run) -> None:
    done = run.latencies[run.latencies.outcome == "finished"]
    for name in ("ttft", "tpot", "e2e", "queue", "queue_total"):
        said = run.metrics[f"{name}_ms"]
        assert done[f"{name}_ms"].mean() == pytest.approx(said["mean"])
        assert done[f"{name}_ms"].quantile(0.99) == pytest.approx(said["p99"])


def test_stages_tile_each_request_and_tokens_its_answer(run: Run) -> None:
    latencies = run.latencies.set_index("id")
    assert (run.stages.groupby("id").duration_ms.sum() - latencies.e2e_ms).abs().max() < 1e-6
    assert "swapped" in set(run.stages.stage)
    by_request = run.tokens.groupby("id")
    assert (by_request.size() == latencies.output_tokens).all()
    assert (by_request.gap_ms.sum() + latencies.ttft_ms - latencies.e2e_ms).abs().max() < 1e-6
    assert by_request.gap_ms.count().sum() == len(run.tokens) - len(latencies)
    assert run.tokens.gap_ms.quantile(0.9) == pytest.approx(run.metrics["itl_ms"]["p90"])


def test_phases_add_up_to_their_steps(run: Run) -> None:
    steps = run.steps
    whole = run.phases.groupby("step").duration_ms.sum()
    expected = ((steps["end_ns"] - steps["start_ns"]) / 1e6).set_axis(steps["step"])
    assert (whole - expected).abs().max() < 1e-6
    assert run.phases.duration_ms[run.phases.phase == "transfer"].max() > 0


def test_bars_end_where_the_means_are(run: Run) -> None:
    (axis, *_) = plots.time_by_stage([run]).axes
    assert max(bar.get_x() + bar.get_width() for bar in axis.patches) == pytest.approx(
        run.latencies.e2e_ms.mean()
    )
    (axis, *_) = plots.slowest_requests(run, most=5).axes
    ends = sorted({round(bar.get_y(), 3) for bar in axis.patches})
    assert len(ends) == 5
    longest = max(bar.get_x() + bar.get_width() for bar in axis.patches)
    assert longest == pytest.approx(run.latencies.e2e_ms.max())
    (axis, *_) = plots.time_by_phase([run, run]).axes
    assert len(axis.get_yticklabels()) == 4


def test_cache_figures_end_where_the_metrics_are(run: Run) -> None:
    (axis, *_) = plots.cache_hits([run]).axes
    (line,) = axis.lines
    assert line.get_ydata()[-1] == pytest.approx(100 * run.metrics["kv"]["prefix_hit_ratio_tokens"])
    taken, back, evicted = plots.block_flows(run).axes[0].lines
    assert evicted.get_ydata()[-1] == run.metrics["kv"]["evictions"] > 0
    assert taken.get_ydata()[-1] == run.steps["allocated"].sum()
    assert back.get_ydata()[-1] >= taken.get_ydata()[-1]  # what was hit is given back, too


def test_a_launch_that_can_t_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir"):
        launch("backend=sim")
    with pytest.raises(RunError, match="did you mean 'fcfs'"):
        launch("backend=sim", "policy=fcsf", f"run.dir={tmp_path / 'x'}")
