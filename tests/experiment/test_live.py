"""What a run shows of itself, on a real terminal and elsewhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console as Rich

from lab import live
from lab.console import draws
from lab.live import Lines, Panel, Quantiles, Sight
from tests.experiment.command import environment, run

LONG = ("backend=sim", "cost=reference", "trace=poisson", "trace.n=20000", "trace.rate=20", "run.dir=out")
SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"
"""What a terminal is told about its cursor."""


def terminal(words: tuple[str, ...], place: Path, **more: str) -> Any:
    """A run in a pseudo-terminal of 100 columns, as on a person's screen."""
    plain = {
        name: value for name, value in environment(place / "cache").items() if name not in ("CI", "NO_COLOR")
    }
    told = {**plain, "TERM": "xterm-256color", **more}
    command = ["-m", "lab.experiment", *words]
    return pexpect.spawn(
        sys.executable, command, cwd=str(place), env=told, dimensions=(30, 100), encoding="utf-8", timeout=120
    )


def test_a_panel_is_drawn_and_ctrl_c_leaves_the_terminal_clean(tmp_path: Path) -> None:
    child = terminal(LONG, tmp_path)
    child.logfile_read = io.StringIO()
    child.expect("TTFT so far[^│]*[0-9] m?s median")
    child.expect(r"[0-9,]+ running[^│]*[0-9,]+ waiting")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    said = child.logfile_read.getvalue()
    assert said.count(HIDDEN) == said.count(SHOWN) == 1
    assert said.rindex(SHOWN) > said.rindex(HIDDEN)
    assert said.rstrip().endswith("interrupted")
    after = said[said.rindex(SHOWN) :]
    assert "─" not in after  # no piece of the panel is left behind
    assert "marked as partial" in after
    assert "Traceback" not in said


@pytest.mark.parametrize("more", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"CI": "true"}])
def test_whoever_asks_for_plain_text_gets_no_escape(more: dict[str, str], tmp_path: Path) -> None:
    child = terminal(("backend=sim", "cost=reference", "trace.limit=20", "run.dir=out"), tmp_path, **more)
    child.expect(pexpect.EOF)
    said = child.before
    child.close()
    assert child.exitstatus == 0, said
    ours, _, table = said.partition(" s of run time")
    assert "Simulator ..." in ours
    assert "\x1b" not in ours
    assert table


def test_a_short_simulation_does_not_flash(tmp_path: Path) -> None:
    child = terminal(("backend=sim", "cost=reference", "trace.limit=20", "run.dir=out"), tmp_path)
    child.expect(pexpect.EOF)
    said = child.before
    child.close()
    assert child.exitstatus == 0, said
    assert HIDDEN not in said
    assert re.search(r"Simulator: 20 requests in \d+ steps, [0-9.]+ s of run time", said)


def test_a_pipe_gets_lines(tmp_path: Path) -> None:
    done = run(("backend=sim", "cost=reference", "trace.limit=20", "run.dir=out"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"(?:.*\n)*Simulator \.\.\.\nSimulator: 20 requests in \d+ steps, [0-9.]+ s of run time\n",
        done.stderr,
    )


class _Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_what_counts_as_a_terminal() -> None:
    good = {"TERM": "xterm"}
    assert draws(_Stream(True), good)
    assert not draws(_Stream(False), good)
    for more in ({"TERM": "dumb"}, {"TERM": ""}, {"NO_COLOR": "1"}, {"CI": "true"}):
        assert not draws(_Stream(True), good | more)
    assert draws(_Stream(True), good | {"NO_COLOR": ""})


def test_looks_are_taken_by_time_and_not_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    told: list[str] = []
    lines = Lines(told.append, "Simulator")
    panel = Panel(lambda: Rich(file=io.StringIO(), force_terminal=True, width=80), "Simulator")
    drawn = 0
    for step in range(2_501):
        now[0] = 100 + step / 100
        if lines.due():
            lines.show(Sight(3, 9, step, 10**9, 1, 2, 0.5, (12.0, 20.0)))
        if panel.due():
            panel.show(Sight(3, 9, step, 10**9))
            drawn += 1
    panel.close()
    assert told == [
        f"Simulator: 3/9 requests, step {step}, 1 running, 2 waiting, KV 50 %, TTFT 12 ms (p99 20 ms), 1.0 s"
        for step in (1000, 2000)
    ]
    assert drawn == pytest.approx(24 / live.PANEL_EVERY_S, rel=0.1)


def test_quantiles_are_right_to_two_percent() -> None:
    import random

    rng = random.Random(3)
    values = [rng.lognormvariate(18, 2) for _ in range(5_000)]
    found = Quantiles()
    assert found.at(0.5) is None
    for start in range(0, 5_000, 7):
        found.add(values[start : start + 7])
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = sorted(values)[max(0, -(-round(share * 10_000) * 5_000 // 10_000) - 1)]
        assert found.at(share) == pytest.approx(exact, rel=0.021)
    zero = Quantiles()
    zero.add([0.0])
    assert zero.at(0.5) == 0.0
