"""Requests of several tenants, CSV: arrival_s, client, prompt_tokens, output_tokens. Request path.

The columns of the fairness traces that come from VTC's artifact (Apache-2.0). No content: every prompt is
text of its own; `client` becomes the tenant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lab.control.request import Segment, stream_of
from traces.files import MAX_SECONDS, csv_rows, describe, number, tokens
from traces.files import name as checked_name
from traces.shape import FileOptions, Row, assemble
from traces.workload import Workload


@dataclass
class TenantsOptions(FileOptions):
    """A CSV file with a client column."""


def load_tenants(name: str, options: TenantsOptions, path: str) -> Workload:
    """The file at `path` as a workload called `name`."""
    return assemble(name, _rows(name, path), options.shape(), {"trace": name, **describe(path)})


def _rows(name: str, path: str) -> Iterator[Row]:
    columns = ("arrival_s", "client", "prompt_tokens", "output_tokens")
    for index, (place, row) in enumerate(csv_rows(path, columns)):
        arrival_s = number(place.at("arrival_s"), row["arrival_s"], 0, MAX_SECONDS)
        prompt = Segment(stream_of(name, index), 0, tokens(place, row, "prompt_tokens"))
        tenant = checked_name(place.at("client"), row["client"].strip())
        yield Row(round(arrival_s * 1e9), (prompt,), tokens(place, row, "output_tokens"), tenant=tenant)
