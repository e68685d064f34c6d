"""backend=cache: replay a trace's block accesses and write down how often they hit. Observation path."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.assembly import EngineSpec
from lab.config import Config
from lab.console import Console
from lab.control.request import Request
from lab.errors import ConfigError
from lab.observe.environment import environment
from lab.observe.export import write_workload
from lab.observe.rundir import RunDirectory
from lab.state.cache_replay import replay_accesses


def run_cache_study(
    cfg: Config,
    requests: Sequence[Request],
    source: dict[str, Any],
    config_text: str,
    path: Path,
    console: Console,
) -> None:
    """Run the study, write `metrics.json`, print what came out."""
    if cfg.kv.blocks is None:
        raise ConfigError("backend=cache needs the size of the cache: kv.blocks=N.")
    eviction = EngineSpec.of(dataclasses.asdict(cfg)).create("eviction")
    now = datetime.datetime.now()
    with RunDirectory.create(path, "cache", now=now, key=config_text) as directory:
        directory.write_text("config.yaml", config_text)
        directory.write_json("environment.json", environment(sys.argv, workload=source))
        directory.write("workload.parquet", lambda file: write_workload(file, requests))
        began = time.perf_counter()
        with console.progress("Cache", len(requests)) as update:
            study = replay_accesses(
                requests,
                eviction,
                blocks=cfg.kv.blocks,
                block_size=cfg.kv.block_size,
                progress=lambda done: update(done, "") if done % 256 == 0 else None,
            )
        metrics = {
            "requests": {"finished": study.requests, "rejected": 0, "aborted": 0},
            "kv": {
                "prefix_hit_ratio_tokens": study.hit_ratio_tokens,
                "prefix_hit_ratio_blocks": study.hit_ratio_blocks,
                "accesses": study.accesses,
                "hits": study.hits,
                "flat_hits": study.flat_hits,
                "evictions": study.evictions,
                "peak_blocks": study.peak_blocks,
            },
            "knows_future": eviction.needs_future,
            "wall_s": time.perf_counter() - began,
        }
        directory.write_json("metrics.json", metrics)
        directory.finish()
    print(
        f"{cfg.eviction.name}, {cfg.kv.blocks} blocks of {cfg.kv.block_size} tokens: {study.hits} hits in "
        f"{study.accesses} block accesses ({study.hit_ratio_blocks:.4f}), {study.hit_ratio_tokens:.4f} of prompt "
        f"tokens, {study.evictions} evictions"
        + (" (a bound: it knows the future)" if eviction.needs_future else "")
    )
    print(f"run: {directory.path}")
