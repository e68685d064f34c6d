"""Public traces as streams of block accesses, and replays of them, for the oracles of eviction."""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path

from lab import plugins
from lab.control.request import Prompt, Request, Segment, stream_of
from lab.state.cache_replay import CacheStudy, replay_accesses
from tests.experiment.command import ROOT

FOLDER = Path(os.environ.get("DIPTYCH_SHARED", ROOT.parent / "shared")) / "traces"
CONVERSATION = FOLDER / "mooncake_conversation.jsonl.gz"
AGENTS = FOLDER / "agent40_mooncake.jsonl.gz"
BLOCK = 512
ENDLESS = 10**11


@cache
def rows(trace: Path) -> list[list[int]]:
    """The block ids of each request, in file order."""
    with gzip.open(trace, "rt") as file:
        return [json.loads(line)["hash_ids"] for line in file]


@cache
def requests(trace: Path) -> list[Request]:
    """One request for each row, of its named blocks only: tokens behind the last id belong to nobody else."""
    with gzip.open(trace, "rt") as file:
        times = [round(json.loads(line)["timestamp"] * 1e6) for line in file]
    return [
        made(f"r{index}", ids, arrival=time)
        for index, (ids, time) in enumerate(zip(rows(trace), times, strict=True))
    ]


def made(name: str, ids: list[int], arrival: int = 0, block: int = BLOCK, **options: str) -> Request:
    """A request of whole blocks with these contents."""
    pieces = tuple(Segment(stream_of(hash_id), 0, block) for hash_id in ids)
    return Request(id=name, prompt=Prompt(pieces), arrival=arrival, output_len=1, **options)  # type: ignore[arg-type]


def replay(
    policy: str, stream: list[Request], blocks: int, block_size: int = BLOCK, **parameters: object
) -> CacheStudy:
    eviction = plugins.create("eviction", policy, parameters)
    return replay_accesses(stream, eviction, blocks=blocks, block_size=block_size)
