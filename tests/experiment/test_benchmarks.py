"""Benchmarks run and print their figures; what the figures are is for people, on a quiet machine."""

from __future__ import annotations

import json
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


def test_the_compression_benchmark_gives_a_table_and_a_picture(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Round and round the ragged rock. " * 12)
    script = ROOT / "experiments" / "benchmarks" / "kv_compression.py"
    done = subprocess.run(
        [sys.executable, script, "tiny", "budgets=32", f"text={text}", f"out={tmp_path / 'out'}"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads((tmp_path / "out" / "kv_compression.json").read_text())
    assert [row["rule"] for row in rows] == ["none", "streaming_llm", "knorm", "tova"]
    assert all(f"{row['perplexity']:.2f}" in done.stdout for row in rows)
    # 198 tokens and 63 that follow, in 17 blocks of 8 KiB; or 2 blocks and the one that fills.
    assert [row["kv_mib"] * 1024 for row in rows] == [17 * 8, 24, 24, 24]
    assert rows[0]["perplexity"] not in [row["perplexity"] for row in rows[1:]]
    assert (tmp_path / "out" / "kv_compression.png").stat().st_size > 10_000


def test_the_export_benchmark_prints_seconds_and_the_ratio_to_the_sdk(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "benchmarks" / "exporting.py", "4000"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    for what in ("OTLP file", "Perfetto timeline", "OTLP messages"):
        assert re.search(rf"{what} +[0-9.]+ s +[0-9.]+ us and +[0-9]+ bytes a span", done.stdout), done.stdout
    found = re.search(r"([0-9.]+) times as long as the messages, ([0-9.]+) times the file", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 1
