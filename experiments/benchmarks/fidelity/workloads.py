"""Workloads that no fit has seen: public traces in small, and made ones.

A trace keeps its arrivals' rhythm and its order; lengths are divided so that a small CPU serves a hundred requests in
a quarter of a minute, and arrivals are stretched to a share of what the engine can serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.control.request import Prompt, Request, Segment, stream_of
from traces.registry import build

LOADS = (0.4, 0.7, 0.95)
"""Of the requests a second that the engine serves when all are there at once."""


@dataclass(frozen=True)
class Named:
    """One workload: where its requests come from, and what it is served with."""

    name: str
    trace: str
    options: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    prompt_by: int = 1
    output_by: int = 1
    """What lengths are divided by."""
    load: float | None = None
    """Share of the capacity of `measure`, the workload in which all requests are there at once; None: as they come."""
    measure: str = ""
    blocks: int | None = None
    """KV blocks; None: all there are."""

    def requests(self, folder: Path | None, scale: int = 1) -> list[Request]:
        """As the trace has them, lengths divided (by `scale` more). Arrivals begin at 0."""
        options = dict(self.options)
        if self.file:
            assert folder is not None
            options["path"] = str(folder / self.file)
        return [
            shrunk(r, self.prompt_by * scale, self.output_by * scale)
            for r in build(self.trace, options).requests
        ]


def shrunk(request: Request, prompt_by: int, output_by: int) -> Request:
    """Each piece of the prompt and the output divided, rounded, at least one token."""
    pieces = tuple(
        Segment(piece.stream, 0, max(1, round(piece.length / prompt_by)))
        for piece in request.prompt.pieces
        if isinstance(piece, Segment)
    )
    length = max(1, round(request.output_limit / output_by))
    return replace(request, prompt=Prompt(pieces), output_len=length)


def offered(requests: Sequence[Request], rate: float) -> list[Request]:
    """The same rhythm at `rate` requests a second; infinite: all at once."""
    span = requests[-1].arrival or 1
    factor = 0.0 if rate == float("inf") else (len(requests) - 1) / rate * 1e9 / span
    return [replace(request, arrival=round(request.arrival * factor)) for request in requests]


def asked_again(requests: Sequence[Request], block: int) -> list[Request]:
    """Each prompt, made as long as whole blocks, and the same one again behind it: cached to its last token."""
    found: list[Request] = []
    for request in requests:
        length = -(-len(request.prompt) // block) * block
        prompt = Prompt((Segment(stream_of("asked again", request.id), 0, length),))
        found += [replace(request, id=f"{request.id}{turn}", prompt=prompt) for turn in ("", "-again")]
    last = max(1, found[-1].arrival)
    return [replace(r, arrival=round(last * i / (len(found) - 1))) for i, r in enumerate(found)]


def catalogue(count: int) -> list[Named]:
    """Every workload, those that measure capacity first. `count` requests each."""

    def azure(kind: str, name: str, skip: int, **more: Any) -> Named:
        return Named(
            name,
            f"azure_2023_{kind}",
            {"offset": skip, "limit": count},
            f"azure_2023_{kind}.csv.gz",
            prompt_by=12,
            output_by=8,
            **more,
        )

    conv, code = 2000, 1000  # from the middle of the day
    made = {"n": count, "prompt": {"mean": 80.0, "high": 400}, "output": {"mean": 24.0, "high": 100}}
    return [
        azure("conv", "conversation, all at once", conv, load=float("inf")),
        azure("code", "code, all at once", code, load=float("inf")),
        Named("made, all at once", "poisson", {**made, "seed": 1}, load=float("inf")),
        *(
            azure("conv", f"conversation at {load}", conv, load=load, measure="conversation, all at once")
            for load in LOADS
        ),
        *(azure("code", f"code at {load}", code, load=load, measure="code, all at once") for load in LOADS),
        Named(
            "shared prefix",
            "poisson",
            {**made, "seed": 2, "prefix_tokens": 160, "prefix_groups": 3},
            load=0.7,
            measure="made, all at once",
        ),
        Named(
            "agent sessions",
            "mooncake",
            {"limit": count},
            "agent40_mooncake.jsonl.gz",
            prompt_by=160,
            output_by=12,
            load=0.7,
            measure="made, all at once",
        ),
        Named("burst", "gamma", {**made, "seed": 3, "cv": 4.0}, load=0.7, measure="made, all at once"),
        azure("conv", "little KV", conv + count, load=0.9, measure="conversation, all at once", blocks=64),
    ]
