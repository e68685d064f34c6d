"""`backend=cache` against numbers computed by independent code (and equal to libCacheSim 0.3.5 where it agrees).

Block hit ratios of the Mooncake conversation trace under prefix semantics, four digits.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lab.control.request import Request
from lab.policy import EvictionPolicy
from lab.state.cache_replay import replay_accesses
from policies.eviction.fifo import Fifo
from policies.eviction.lfu import Lfu
from policies.eviction.lru import Lru
from tests.experiment.command import ROOT, run
from traces.registry import build

TRACE = (
    Path(os.environ.get("DIPTYCH_SHARED", ROOT.parent / "shared"))
    / "traces"
    / "mooncake_conversation.jsonl.gz"
)
pytestmark = pytest.mark.skipif(not TRACE.exists(), reason=f"the public Mooncake trace is not at {TRACE}")

CAPACITIES = (1000, 5859, 10_000, 30_000, 50_000)
EXPECTED = {
    Lru: (0.0445, 0.1361, 0.2116, 0.3257, 0.3546),
    Fifo: (0.0445, 0.1254, 0.1820, 0.2950, 0.3336),
    Lfu: (0.0481, 0.0969, 0.1322, 0.2761, 0.3438),
}


@pytest.fixture(scope="module")
def requests() -> tuple[Request, ...]:
    return build("mooncake", {"path": str(TRACE)}).requests


@pytest.mark.parametrize("policy", list(EXPECTED))
def test_hit_ratios_equal_the_published_table(
    policy: type[EvictionPolicy], requests: tuple[Request, ...]
) -> None:
    got = [
        round(replay_accesses(requests, policy(), blocks=blocks, block_size=512).hit_ratio_blocks, 4)
        for blocks in CAPACITIES
    ]
    assert got == list(EXPECTED[policy])


def test_an_endless_cache_hits_what_the_trace_statistics_say(requests: tuple[Request, ...]) -> None:
    study = replay_accesses(requests, Lru(), blocks=200_000, block_size=512)
    assert (study.accesses, study.peak_blocks, study.evictions) == (288_500, 182_790, 0)
    assert round(study.hit_ratio_blocks, 4) == 0.3664
    assert round(study.hit_ratio_tokens, 4) == 0.3736


def test_the_command_writes_the_same_ratio(tmp_path: Path) -> None:
    words = ["backend=cache", "trace=mooncake", f"trace.path={TRACE}", "eviction=lru", "kv.blocks=10000"]
    done = run([*words, "kv.block_size=512", "run.dir=out"], tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert round(metrics["kv"]["prefix_hit_ratio_blocks"], 4) == 0.2116
