"""Benchmarks run and print their figures; what the figures are is for people, on a quiet machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.experiment.command import ROOT, environment


def test_the_recording_benchmark_prints_a_share_of_step_time(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "benchmarks" / "recording.py", "tiny", "6", "2"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"recording: ([\d.]+) us a step, ([\d.]+) % of step time", done.stdout)
    assert found, done.stdout
    assert 0 < float(found[2]) < 100
    assert re.search(r"on against off: [+-][\d.]+ % \(median of 2 interleaved pairs\)", done.stdout)
