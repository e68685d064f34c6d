"""The table, the figures, the page and the command show what was found, and survive what is missing."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lab.analysis.architecture import architecture_svg
from lab.analysis.diff import diff
from lab.analysis.plots import aligned_steps, figures
from lab.analysis.report import write_report
from lab.analysis.table import WIDTH, show
from lab.analysis.timelines import MOST_LANES, swimlanes
from lab.errors import RunError
from lab.observe.boundaries import DECLARED
from tests.analysis.toy import pair, toy_run


def printed(what: object) -> str:
    out = io.StringIO()
    show(what, out)  # type: ignore[arg-type]
    return out.getvalue()


def test_printed_comparison_is_plain_text_within_100_columns() -> None:
    real, sim, again = pair(1, count=40, blocks=60)
    text = printed(diff(real, sim, again))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()
    for word in (
        "TTFT",
        "TPOT",
        "ITL",
        "E2E",
        "p99",
        "Throughput",
        "Prefix hit rate",
        "Preemptions",
        "KV use",
    ):
        assert word in text
    assert "first diverged at step" in text
    assert "from step durations" in text


def test_one_run_prints_alone_and_says_when_it_is_partial() -> None:
    text = printed(toy_run(0, count=5, backend="real", partial=True))
    assert "real" in text
    assert "Partial run" in text


def test_a_duration_is_never_printed_as_a_ratio() -> None:
    line = next(line for line in printed(toy_run(0, count=5)).splitlines() if "seconds" in line)
    assert "%" not in line


@pytest.mark.parametrize("count", [0, 1, 12])
def test_every_figure_draws_for_any_number_of_requests(count: int) -> None:
    real, sim, again = pair(2, count=count)
    for runs, found in (([real, sim], diff(real, sim, again)), ([real], None)):
        for (anchor, title, text), figure in figures(runs, found):
            assert anchor
            assert title
            assert text.endswith(".")
            out = io.BytesIO()
            figure.savefig(out, format="png", dpi=40)
            assert out.tell() > 1000
            assert all(axis.get_title(loc="left") for axis in figure.axes)


def test_swimlanes_are_capped_and_say_so() -> None:
    figure = swimlanes([toy_run(0, count=MOST_LANES + 30)])
    assert f"{MOST_LANES} of {MOST_LANES + 30}" in figure.axes[0].get_title(loc="left")


def test_steps_are_aligned_only_while_decisions_agree() -> None:
    real, sim, _ = pair(1, count=60, blocks=60)
    first = diff(real, sim).decisions["first_divergent_step"]
    assert aligned_steps(real, sim)["step"].tolist() == list(range(first))


def test_page_is_self_contained_small_and_escapes_what_runs_say(tmp_path: Path) -> None:
    real, sim, again = pair(1, count=300, rate_per_s=200.0)
    evil = "</script><script>alert(1)</script>"
    sim = replace(sim, config={**sim.config, "note": evil}, partial=True)
    sim.requests.loc[0, "id"] = evil
    path = tmp_path / "deep" / "report.html"
    write_report(path, [real, sim], diff(real, sim, again))
    page = path.read_text(encoding="utf-8")
    assert evil not in page
    assert len(page) < 3_000_000
    markup = re.sub(
        r"<script>.*?</script>", "", page, flags=re.S
    )  # what scripts ask for, the browser's test sees
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", markup)
    assert "@import" not in page
    assert "Partial run" in page
    assert "Decisions " in page
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_architecture_shows_every_declared_boundary_with_its_code() -> None:
    svg = architecture_svg({"request": 1234})
    for boundary in DECLARED:
        assert f">{boundary.name}</text>" in svg
        assert boundary.emitted_at.partition(":")[0] in svg
    assert "1,234" in svg
    for layer in ("Entry and control", "Execution and state", "Observation and validation"):
        assert layer in svg


def test_architecture_names_only_code_that_exists() -> None:
    from lab.analysis.architecture import OBSERVATION

    root = Path(__file__).resolve().parents[2]
    for _, code, _ in OBSERVATION:
        file, _, name = code.partition(":")
        assert re.search(rf"^(def|class) {name}\b", (root / file).read_text(encoding="utf-8"), re.M), code


def test_a_page_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't write"):
        write_report(tmp_path / "file" / "report.html", toy_run(0, count=2))


def test_command_reports_a_missing_run_in_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab.diff", "nowhere/a", "nowhere/b"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "nowhere/a" in done.stderr


def test_importing_the_command_pulls_in_nothing_heavy() -> None:
    heavy = (
        "pandas",
        "matplotlib",
        "seaborn",
        "pyarrow",
        "torch",
        "scipy",
        "simpy",
        "rich",
        "jinja2",
        "bokeh",
    )
    code = f"import sys, lab.diff, lab.analysis.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
