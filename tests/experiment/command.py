"""Runs the main job as a user does: another process, words in, text and files out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK = ("trace=poisson", "trace.n=12", "trace.rate=50", "trace.prompt.mean=24", "trace.output.mean=8")
"""A workload of a fraction of a second."""


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}


def run(
    words: Sequence[str], cwd: Path, *, module: str = "lab.experiment", extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m lab.experiment WORDS` in `cwd`, which is also where its cache is."""
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env={**environment(cwd / "cache"), **(extra or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The error that a failed command printed; fails the test unless it is one line and no traceback."""
    assert result.returncode not in (0, 130), result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    return errors[0]
