"""Pages of many runs, and the command that makes pages."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lab import report
from lab.analysis.page.embed import available
from lab.analysis.page.many import varied
from lab.analysis.sweep import render_sweep, write_sweep
from lab.errors import RunError
from lab.experiment import main as experiment
from tests.analysis.browser import CHROMIUM, TOOLTIPS, Browser
from tests.analysis.toy import ToyRun, toy_run


def sweep() -> list[ToyRun]:
    """Two policies at three rates."""
    out = []
    for policy in ("fcfs", "sjf"):
        for rate in (20.0, 40.0, 80.0):
            run = toy_run(3, count=30, rate_per_s=rate)
            options = {"policy": {"name": policy}, "trace": {"rate": rate}, "run": {"dir": f"{policy}{rate}"}}
            out.append(replace(run, config={**run.config, **options}))
    return out


def test_runs_are_told_apart_by_what_differs_and_nothing_else() -> None:
    runs = sweep()
    assert varied([run.config for run in runs]) == ["policy.name", "trace.rate"]
    page = render_sweep(runs)
    for label in ("fcfs, rate=20.0", "sjf, rate=80.0"):
        assert label in page
    with pytest.raises(RunError, match="at least 2 runs"):
        render_sweep(runs[:1])


@pytest.mark.skipif(not CHROMIUM or not available(), reason="needs Chromium and Bokeh")
def test_a_sweep_draws_lines_over_what_was_varied_and_tells_whose_they_are(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep.html", sweep())
    assert (tmp_path / "sweep.html").stat().st_size < 3_000_000
    with Browser(tmp_path, height=1000) as browser:
        page = browser.open(tmp_path / "sweep.html")
        figures = "[...Bokeh.index.roots].filter(view => view.model.type === 'Figure')"
        titles = page.run(f"{figures}.map(view => view.model.title.text)")
        assert len(titles) == 4 + 2 + 4
        assert "TTFT p99 (ms) over trace.rate" in titles
        x, y, label = page.run(
            f"""(() => {{
              const view = {figures}[0], at = view.el.getBoundingClientRect();
              const points = view.model.renderers.find(one => one.glyph.type === "Scatter").data_source.data;
              const where = [view.frame.x_scale.compute(points.x[1]), view.frame.y_scale.compute(points.y[1])];
              return [at.x + where[0], at.y + where[1], points.label[1]];
            }})()"""
        )
        page.mouse("mouseMoved", x, y)
        assert page.wait(f"({TOOLTIPS}).length")
        assert label in page.run(TOOLTIPS)[0]
        assert page.complaints() == []
        assert page.asked_for() == []


def test_the_command_makes_pages_of_a_run_a_window_a_pair_and_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, policy in (("a", "fcfs"), ("b", "sjf"), ("c", "prefill_first")):
        words = ["backend=sim", "cost=reference", "trace=poisson", "trace.n=30", "trace.rate=20"]
        assert experiment([*words, f"policy={policy}", f"run.dir={tmp_path / place}"]) == 0
    a, b = tmp_path / "a", tmp_path / "b"
    assert report.main([str(a), "--window", "0.5:0.8"]) == 0
    page = (a / "report.html").read_text(encoding="utf-8")
    assert "Timeline" in page
    if available():
        held = re.search(r'"total":(\d+)', page)
        assert held
        assert 0 < int(held.group(1)) < 30
    assert report.main([str(a), str(b), "--out", str(tmp_path / "pair.html")]) == 0
    assert "First divergent decision" in (tmp_path / "pair.html").read_text(encoding="utf-8")
    assert report.main([str(tmp_path)]) == 0
    assert "Sweep: 3 runs" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for words, said in (
        ([str(a), "--window", "9"], "expected FROM:TO in seconds"),
        ([str(tmp_path), "--window", "1:2"], "for one run or two"),
        ([str(tmp_path / "nowhere")], "no such directory"),
    ):
        capsys.readouterr()
        assert report.main(words) == 1
        assert said in capsys.readouterr().err
