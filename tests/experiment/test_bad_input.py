"""What goes wrong is one clear sentence and a non-zero exit, and what was recorded is kept and marked."""

from __future__ import annotations

import gzip
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.analysis.runs import load
from lab.observe.claim import partial_reason
from tests.experiment.command import QUICK, environment, one_sentence, run

BACKEND = ("backend=sim", "cost=physical", "cost.model=llama-3.1-8b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["policy=fcsf"], "did you mean 'fcfs'?"),
        (["polcy=fcfs"], "did you mean 'policy'?"),
        (["policy.windw=3"], "policy.windw"),
        (["eviction=lur"], "did you mean 'lru'?"),
        (["model=smollm"], "did you mean 'smollm2'?"),
        (["model=./nowhere/at/all", "backend=real"], "nowhere/at/all"),
        (["trace=azure_2023_con"], "did you mean 'azure_2023_conv'?"),
        (["trace=mooncake"], "trace.path"),
        (["trace=mooncake", "trace.path=missing.jsonl"], "missing.jsonl"),
        (["trace.rate_scale=-1"], "rate_scale"),
        (["trace=poisson", "trace.rate=-2"], "trace.rate"),
        (["trace.limit=0"], "trace.limit"),
        (["kv.blocks=0"], "kv.blocks is 0"),
        (["kv.blocks=99999999999", "backend=sim"], "kv.blocks is 99999999999; expected at most 2147483647"),
        (["kv.host_blocks=99999999999", "backend=sim"], "expected at most 2147483647"),
        (["fleet.replicas=99999999", "routing=round_robin", "backend=sim"], "99999999 replicas"),
        (["model=./nowhere/at/all", "backend=sim"], "'./nowhere/at/all' is no directory"),
        (["kv.block_size=0"], "kv.block_size is 0"),
        (["kv.blocks=many"], "kv.blocks"),
        (["engine.token_budget=0"], "engine.token_budget is 0"),
        (["backend=simm"], "did you mean 'sim'?"),
        (["cost=replay", "backend=sim"], "cost.path"),
        (["cost=replay", "cost.path=nowhere", "backend=sim"], "nowhere"),
        (["backend=cache"], "kv.blocks"),
        (["policy=prefill_first", "policy.watermark=2"], "watermark is 2"),
        (["policy=./missing.py:Mine"], "missing.py"),
        (["policy=no.such.module:Mine"], "no.such.module"),
        (["sampling.top_p=3"], "top_p"),
        ([*BACKEND, "topology=tp2", "topology.groups.replica.tp=3"], "or the tp of a topology's group"),
        ([*BACKEND, "topology=pp2", "topology.groups.replica.pp=99"], "or the pp of a topology's group"),
        (["--helpp"], "--help"),
    ],
)
def test_a_wrong_word_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in one_sentence(run([*words, "run.dir=out"] if "--helpp" not in words else words, tmp_path))
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_what_is_refused_leaves_no_empty_run_directory_of_its_own(tmp_path: Path) -> None:
    words = [*BACKEND, "topology=tp2", "topology.groups.replica.tp=3"]
    one_sentence(run(words, tmp_path))
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "mine").mkdir()
    one_sentence(run([*words, "run.dir=mine"], tmp_path))
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("azure_2023_conv", b"TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.6805900,374\n", "GeneratedTokens"),
        (
            "azure_2023_conv",
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,3x4,44\n",
            "line 2",
        ),
        ("mooncake", b'{"timestamp": 0, "input_length": 6\n', "line 1"),
        ("mooncake", b"", "bad.trace"),
        ("mooncake", gzip.compress(b'{"timestamp": 0}\n' * 500, mtime=0)[:40], "bad.trace"),
    ],
)
def test_a_malformed_trace_says_which_line_or_column(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.trace").write_bytes(content)
    text = one_sentence(
        run(["backend=sim", f"trace={name}", "trace.path=bad.trace", "run.dir=out"], tmp_path)
    )
    assert said in text
    assert "bad.trace" in text


def test_a_prompt_longer_than_the_cache_is_rejected_and_the_rest_is_served(tmp_path: Path) -> None:
    done = run(["backend=sim", "trace.limit=30", "kv.blocks=12", "run.dir=out"], tmp_path)
    assert done.returncode == 0, done.stderr
    ran = load(tmp_path / "out")
    rejected = ran.requests[ran.requests["outcome"] == "rejected"]
    assert 0 < len(rejected) < 30
    assert rejected["reason"].str.contains("never fits the KV cache").all()
    assert ran.metrics["requests"]["rejected"] == len(rejected)


def test_a_policy_that_raises_ends_the_run_with_its_line_and_keeps_what_was_recorded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from policies.scheduling.fcfs import Fcfs\n"
        "class Bad(Fcfs):\n"
        "    def schedule(self, step):\n"
        "        if len(step.running) == 1 and step.now > 2 * 10**9:\n"
        "            raise KeyError('what now')\n"
        "        super().schedule(step)\n"
    )
    words = ["backend=sim", "policy=./mine.py:Bad", "trace.limit=48", "trace.rate_scale=20", "run.dir=out"]
    text = one_sentence(run(words, tmp_path))
    assert "Bad" in text
    assert "mine.py:5" in text
    assert "KeyError" in text
    assert "mine.py:5" in (partial_reason(tmp_path / "out") or "")
    ran = load(tmp_path / "out")
    assert len(ran.steps) > 0
    assert (ran.requests["outcome"] == "unfinished").any()


def test_a_full_disk_is_one_sentence_and_the_run_is_marked(tmp_path: Path) -> None:
    # A limit on file size is what a full disk looks like to a writer, for this process alone.
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run(
        [sys.executable, "-m", "lab.experiment", "backend=sim", "trace.limit=48", "run.dir=out"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    one_sentence(done)
    assert partial_reason(tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").exists()


def interrupted(words: list[str], place: Path, ready: Path) -> subprocess.CompletedProcess[str]:
    """Start the command, wait for `ready` to have content, send Ctrl-C, and wait for the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.experiment", *words],
        cwd=place,
        env=environment(place / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (ready.exists() and (ready.is_dir() or ready.stat().st_size > 0)):
        assert process.poll() is None, f"ended before it could be interrupted: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("backend", ["sim", "real"])
def test_ctrl_c_during_a_run_keeps_what_it_had_and_says_it_is_partial(backend: str, tmp_path: Path) -> None:
    words = [
        f"backend={backend}",
        "model=tiny",
        "trace=poisson",
        "trace.n=20000",
        "trace.rate=20",
        "run.dir=out",
    ]
    done = interrupted(words, tmp_path, tmp_path / "out" / "log.jsonl")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("interrupted")
    assert "Ctrl-C" in (partial_reason(tmp_path / "out") or "")
    ran = load(tmp_path / "out")
    assert ran.partial
    assert len(ran.steps) > 0
    assert ran.metrics["requests"]["unfinished"] >= 0
    assert len(ran.workload()) == 20_000


def test_ctrl_c_during_calibration_leaves_no_calibration(tmp_path: Path) -> None:
    words = ["model=tiny", "engine.max_seqs=64", *QUICK, "run.dir=out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.experiment", *words],
        cwd=tmp_path,
        env=environment(tmp_path / "cache"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Calibrating"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))
