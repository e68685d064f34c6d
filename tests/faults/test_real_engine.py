"""The real engine when things go wrong under it: no memory, bad weights, a full disk, a killed process."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.analysis.runs import load
from lab.errors import ExecutorError, RunError
from lab.observe.claim import TABLES, partial_reason
from real_engine import kv_memory
from real_engine.kv_memory import KvMemory, KvShape
from tests.experiment.command import QUICK, environment, one_sentence, run
from tests.experiment.test_endings import start
from tests.real_engine.reference import saved

SHAPE = KvShape(layers=4, kv_heads=2, head_dim=16, block_size=16, dtype=torch.float32)


def test_memory_that_is_promised_and_not_given_says_how_many_blocks_could_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit, taken, zeros = 100 * SHAPE.block_bytes, 0, torch.zeros

    def grudging(size: tuple[int, ...], **options: object) -> torch.Tensor:
        nonlocal taken
        made = zeros(size, **options)  # type: ignore[call-overload]
        taken += made.nbytes
        if taken > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return made  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "zeros", grudging)
    with pytest.raises(
        ExecutorError, match=r"130 blocks of 16 tokens needs .*: at most (\d+) blocks fit"
    ) as caught:
        KvMemory(SHAPE, 130)
    found = re.search(r"at most (\d+) blocks fit", str(caught.value))
    assert found
    fits = int(found[1])
    assert 100 - 130 // (2 * SHAPE.layers) - 1 <= fits <= 100
    taken = 0
    assert KvMemory(SHAPE, fits).blocks == fits


def test_the_number_of_blocks_that_would_fit_does_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "available_memory", lambda: 57 * SHAPE.block_bytes + 1)
    with pytest.raises(ExecutorError, match="at most 57 blocks fit"):
        KvMemory(SHAPE, 58)
    assert KvMemory(SHAPE, 57).blocks == 57


def test_weights_with_a_nan_name_the_request_and_keep_the_run(tmp_path: Path) -> None:
    model = Path(shutil.copytree(saved("llama", tmp_path / "whole"), tmp_path / "model"))
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][7] = float("nan")  # now and then a prompt has this token
    save_file(weights, file, metadata={"format": "pt"})
    words = ["backend=real", "model=./model", "model.dtype=float32", *QUICK, "trace.n=200", "run.dir=out"]
    text = one_sentence(run(words, tmp_path))
    found = re.search(r"request '(\w+)': the logits", text)
    assert found, text
    assert found[1] in (partial_reason(tmp_path / "out") or "")
    ran = load(tmp_path / "out")
    outcomes = ran.requests.set_index("id")["outcome"]
    assert outcomes[found[1]] == "unfinished"
    assert len(ran.steps) == len(ran.plans) == ran.metrics["steps"]


def test_a_disk_that_fills_up_under_the_real_engine_keeps_what_fits(tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    words = ["backend=real", "model=tiny", "engine.attention=torch", *QUICK, "trace.n=100", "run.dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", "lab.experiment", *words],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    text = one_sentence(done)
    assert re.search(r"can't write 'out/[\w.]+'", text)
    assert "can't write" in (partial_reason(tmp_path / "out") or "")
    ran = load(tmp_path / "out")
    assert len(ran.steps) == ran.metrics["steps"] > 0
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_cache_for_one_request_at_a_time_serves_all_that_fit_and_refuses_the_rest(tmp_path: Path) -> None:
    long = ["trace=poisson", "trace.n=60", "trace.rate=500", "trace.prompt.mean=120", "trace.output.mean=60"]
    words = ["backend=real", "model=tiny", *long, "kv.blocks=14", "kv.host_blocks=9", "preemption.mode=swap"]
    done = run([*words, "run.report=false", "run.dir=out"], tmp_path)
    assert done.returncode == 0, done.stderr
    ran = load(tmp_path / "out")
    assert ran.partial is None
    room = 14 * 16
    for record in ran.request_records():
        size = len(record.request.prompt) + record.request.output_limit - 1
        assert record.outcome == ("finished" if size <= room else "rejected"), record
    assert {"finished", "rejected"} == set(ran.requests["outcome"])
    assert ran.metrics["preemptions"] > 0
    assert ran.metrics["swapped_blocks"] > 0


def whole(path: Path) -> str:
    """What kind of an end the run directory shows; fails where it shows none."""
    if not path.exists() or not any(path.iterdir()):
        return "nothing"
    try:
        reason = partial_reason(path)
    except RunError:
        return "not begun" if not list(path.glob("*.parquet")) else pytest.fail(f"{path} is no run")
    assert not list(path.glob("*.tmp"))
    ran = load(path)
    present = [name for name in TABLES if (path / f"{name}.parquet").exists()]
    for name in present:
        pq.read_table(path / f"{name}.parquet")
    if reason is None:
        assert present == list(TABLES)
        assert set(ran.requests["outcome"]) <= {"finished", "rejected"}
        return "complete"
    if "interrupted" in reason and (path / "metrics.json").exists():
        assert present == list(TABLES)
        assert len(ran.steps) == len(ran.plans) == ran.metrics["steps"]
        assert len(ran.recorded().requests) == sum(ran.metrics["requests"].values())
    return "partial"


def interrupted_somewhere(rng: random.Random, words: list[str], place: Path, within: float) -> None:
    """Signals at random moments: whatever comes of it, no traceback, a sound directory, and room for the next."""
    process = start([*words, "run.dir=out"], place)
    time.sleep(rng.uniform(0, within))
    for _ in range(rng.choice((1, 1, 2, 4))):
        if process.poll() is None:
            process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
        time.sleep(rng.uniform(0, 0.2))
    _, said = process.communicate(timeout=120)
    sides = ("real", "sim", "replay") if "backend=both" in words else ("",)
    ends = {name: whole(place / "out" / name) for name in sides}
    if "Traceback" in said:  # Python itself was interrupted, before it came to us
        assert "in guarded" not in said, said
    elif process.returncode == 0:
        assert set(ends.values()) == {"complete"}, (ends, said)
        assert "interrupted" not in said
    else:
        assert process.returncode in (130, -signal.SIGINT, -signal.SIGTERM), (process.returncode, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["backend=sim", "trace=poisson", "trace.n=400", "trace.rate=30"],
        ["backend=real", "trace=poisson", "trace.n=80", "trace.rate=30", "trace.prompt.mean=40"],
        [
            "backend=real",
            "engine.mode=online",
            "trace=poisson",
            "trace.n=60",
            "trace.rate=30",
            "trace.prompt.mean=40",
        ],
        ["backend=both", "trace=poisson", "trace.n=40", "trace.rate=30", "trace.prompt.mean=40"],
    ],
    ids=["sim", "real", "online", "both"],
)
def test_a_signal_at_any_moment_leaves_a_sound_directory(words: list[str], tmp_path: Path) -> None:
    rng = random.Random(5)
    assert run(["model=tiny", *words, "run.dir=first"], tmp_path).returncode == 0  # kernels, calibration
    began = time.monotonic()
    assert run(["model=tiny", *words, "run.dir=out"], tmp_path).returncode == 0
    within = time.monotonic() - began
    for _ in range(int(os.environ.get("DIPTYCH_INTERRUPTS", "8"))):
        interrupted_somewhere(rng, ["model=tiny", *words], tmp_path, within)
    done = run(["model=tiny", *words, "run.dir=out"], tmp_path)
    assert done.returncode == 0, done.stderr
