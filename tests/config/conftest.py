"""A real command in a process of its own: what a user types, sees and gets as exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMMAND = """
import sys
from lab.cli import main

def run(cfg):
    from lab.choices import params
{body}

if __name__ == "__main__":
    sys.exit(main(run, about="A command for tests."))
"""

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a command with this task body (one argument, `cfg`)."""

    def write(body: str) -> Path:
        path = tmp_path / "command.py"
        path.write_text(COMMAND.format(body="\n".join(f"    {line}" for line in body.splitlines())))
        return path

    return write


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def command(script: Callable[[str], Path], tmp_path: Path, environment: dict[str, str]) -> Command:
    """Runs a command with words, in an empty working directory."""

    def run(
        *words: str, body: str = "print(cfg.policy.name, params(cfg.policy), cfg.model.name, cfg.run.dir)"
    ) -> subprocess.CompletedProcess[str]:
        cwd = tmp_path / "cwd"
        cwd.mkdir(exist_ok=True)
        line = [sys.executable, str(script(body)), *words]
        return subprocess.run(
            line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return run
