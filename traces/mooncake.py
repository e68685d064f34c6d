"""Mooncake traces (Apache-2.0), JSON lines. Request path.

`timestamp` (ms), `input_length`, `output_length`, `hash_ids`: one id for each 512 tokens of the input, the
last block may be partial. Ids are chained, so two requests that share an id share everything before it; here
each id names a synthetic text, and sharing ids is sharing a prefix token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lab.control.request import Segment, stream_of
from traces.files import MAX_SECONDS, Place, describe, integer, json_rows, number, shown, tokens
from traces.shape import FileOptions, Row, assemble
from traces.workload import Workload

BLOCK_TOKENS = 512
FINE_BLOCK_TOKENS = 64


@dataclass
class MooncakeOptions(FileOptions):
    """A file in Mooncake's format."""


def load_mooncake(name: str, options: MooncakeOptions, path: str) -> Workload:
    """The file at `path` as a workload called `name`."""
    return assemble(name, _rows(path), options.shape(), {"trace": name, **describe(path)})


def _rows(path: str) -> Iterator[Row]:
    streams: dict[int, int] = {}
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    for index, (place, row) in enumerate(json_rows(path, keys)):
        arrival_ms = number(place.at("timestamp"), row["timestamp"], 0, MAX_SECONDS * 1e3)
        length = tokens(place, row, "input_length")
        output = tokens(place, row, "output_length")
        ids = _hash_ids(place.at("hash_ids"), row["hash_ids"], length)
        for hash_id in ids:
            if hash_id not in streams:
                streams[hash_id] = stream_of("mooncake", hash_id)
        pieces = [
            Segment(streams[hash_id], 0, min(BLOCK_TOKENS, length - BLOCK_TOKENS * depth))
            for depth, hash_id in enumerate(ids)
        ]
        uncovered = length - BLOCK_TOKENS * len(ids)
        if uncovered > 0:
            pieces.append(Segment(stream_of("mooncake tail", index), 0, uncovered))
        yield Row(round(arrival_ms * 1e6), tuple(pieces), output)


def _hash_ids(place: Place, value: object, length: int) -> list[int]:
    """The ids, checked for number: one for each 512 tokens begun.

    Files condensed from traces with 64-token blocks leave out a last partial block shorter than that; its
    tokens belong to their request alone.
    """
    if not isinstance(value, list):
        raise place.error(f"{shown(value)}; expected a list of integers")
    most = -(-length // BLOCK_TOKENS)
    short_tail = 0 < length % BLOCK_TOKENS < FINE_BLOCK_TOKENS
    if len(value) != most and not (short_tail and len(value) == most - 1):
        expected = f"expected {most}, one for each {BLOCK_TOKENS} tokens"
        raise place.error(f"{len(value)} ids for an input_length of {length}; {expected}")
    return [integer(place, item, -(1 << 63), (1 << 64) - 1) for item in value]
