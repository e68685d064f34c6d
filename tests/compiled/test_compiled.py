"""The compiled control plane is built, found while its source is what it was, and decides as the interpreted one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab import compiled
from lab.compiled.build import build

ROOT = Path(__file__).resolve().parents[2]

POLICIES = (
    ("policy=fcfs", "trace=chat", "cost=reference"),
    ("policy=mlfq", "trace=poisson", "trace.rate=50", "kv.blocks=200", "cost=reference"),
    (
        "policy=srpt",
        "trace=gamma",
        "kv.blocks=200",
        "kv.host_blocks=100",
        "preemption=cost_benefit",
        "cost=reference",
    ),
    ("policy=vllm_v1", "trace=chat", "eviction=arc", "topology=pd_1p1d", "cost=physical"),
    ("policy=sarathi", "trace=poisson", "fleet.replicas=3", "routing=power_of_two", "cost=roofline"),
    ("policy=prefill_first", "trace=poisson", "topology=ep8", "cost=physical", "cost.model=qwen3-30b-a3b"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    build({**os.environ, "XDG_CACHE_HOME": str(folder)})
    return folder


def python(words: Sequence[str], cache: Path, cwd: Path, on: bool = True) -> str:
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
        "DIPTYCH_COMPILED": str(int(on)),
    }
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


WHICH = "import lab.control.core as core; from lab.compiled import in_use; print(in_use(), core.__file__)"


@pytest.mark.slow
def test_it_is_used_unless_it_is_switched_off(cache: Path, tmp_path: Path) -> None:
    assert python(["-c", WHICH], cache, tmp_path).startswith("True " + str(cache))
    assert python(["-c", WHICH], cache, tmp_path, on=False).startswith("False " + str(ROOT))
    assert python(["-c", WHICH], tmp_path, tmp_path).startswith("False")


def test_code_of_another_source_is_not_used(tmp_path: Path) -> None:
    other = compiled.home({"XDG_CACHE_HOME": str(tmp_path)}) / "another"
    other.mkdir(parents=True)
    before = list(sys.meta_path)
    assert compiled.use({"XDG_CACHE_HOME": str(tmp_path)}) is None
    assert sys.meta_path == before


@pytest.mark.slow
@pytest.mark.parametrize("words", POLICIES, ids=lambda words: words[0])
def test_every_byte_of_a_run_is_the_same(words: tuple[str, ...], cache: Path, tmp_path: Path) -> None:
    for name, on in (("compiled", True), ("interpreted", False)):
        python(["-m", "lab.experiment", "backend=sim", *words, f"run.dir={name}"], cache, tmp_path, on)
    tables = sorted(file.name for file in (tmp_path / "interpreted").glob("*.parquet"))
    assert {"requests.parquet", "steps.parquet", "spans.parquet"} <= set(tables)
    for name in tables:
        assert (tmp_path / "compiled" / name).read_bytes() == (
            tmp_path / "interpreted" / name
        ).read_bytes(), name


@pytest.mark.slow
def test_the_control_planes_own_tests_pass(cache: Path) -> None:
    tests = ["tests/conformance", "tests/control"]
    python(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], cache, ROOT)


def test_a_word_too_many_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab.compiled", "now"],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unrecognized arguments: now" in done.stderr


def test_a_cache_that_can_not_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "diptych").write_text("a file", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lab.compiled"],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "can't be made (Not a directory)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
