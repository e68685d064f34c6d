"""Workloads that have broken policies before, as values: small, printable, and shrinkable. Observation path.

Times are whole milliseconds. A step takes 1 ms and 10 µs for each of its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lab.control.request import Prompt, Request, Segment, stream_of

MS = 1_000_000
TOKEN_NS = 10_000


class Name(str):
    """Text that hashes differently with each salt, as all text does from one Python process to the next.

    A policy whose decisions follow the order of a set, or `hash()`, decides otherwise under another salt.
    """

    __slots__ = ("salt",)
    salt: int

    @classmethod
    def of(cls, text: str, salt: int) -> str:
        name = cls(text)
        name.salt = salt
        return name

    def __hash__(self) -> int:
        return hash((self.salt, str(self))) if self.salt else str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a workload."""

    prompt: int = 1
    output: int = 1
    at: int = 0
    """When it arrives."""
    shared: int = 0
    """Leading prompt tokens that are the same in every request that shares."""
    priority: int = 0
    tenant: str = ""
    session: str = ""
    ttft_slo: int | None = None
    tpot_slo: int | None = None
    abort: int | None = None
    """When its client goes away."""
    in_flight: bool = False
    """It goes away while a step is being computed, not between two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload and the engine it meets. Whatever isn't said has the default."""

    requests: tuple[Ask, ...] = (Ask(),)
    blocks: int = 64
    block_size: int = 4
    token_budget: int = 16
    max_seqs: int = 4
    chunk: int | None = None
    prefix_cache: bool = True
    host_blocks: int = 0
    pause: tuple[int, int] | None = None
    """From when until when nothing is granted."""
    pause_what: str = "all"
    replicas: tuple[int, ...] = (0,)
    """Indices of the replicas (admission, routing and scaling)."""
    stale: int = 0
    """How old what they see of the replicas is."""

    @property
    def size(self) -> tuple[int, ...]:
        """Smaller is easier to read."""
        asks = self.requests
        odd = sum(
            getattr(self, f.name) != f.default for f in dataclasses.fields(self) if f.name != "requests"
        )
        return (len(asks), sum(a.prompt + a.output for a in asks), sum(len(_said(a)) for a in asks), odd)

    @property
    def tokens(self) -> int:
        return sum(ask.prompt + ask.output for ask in self.requests)

    def made(self, salt: int = 0) -> list[tuple[Ask, Request]]:
        """The requests in order of arrival."""
        found = []
        for number, ask in enumerate(self.requests):
            shared = min(ask.shared, ask.prompt)
            own = Segment(stream_of("own", number), 0, ask.prompt - shared)
            pieces = [Segment(stream_of("shared"), 0, shared)] * bool(shared) + [own] * bool(len(own))
            request = Request(
                id=Name.of(f"r{number}", salt),
                prompt=Prompt(tuple(pieces)),
                arrival=ask.at * MS,
                output_len=ask.output,
                tenant=Name.of(ask.tenant, salt) if ask.tenant else "",
                session=Name.of(ask.session, salt) if ask.session else "",
                priority=ask.priority,
                ttft_slo=None if ask.ttft_slo is None else ask.ttft_slo * MS,
                tpot_slo=None if ask.tpot_slo is None else ask.tpot_slo * MS,
            )
            found.append((ask, request))
        return sorted(found, key=lambda pair: pair[1].arrival)

    def table(self) -> str:
        """For people: what the engine is, and a row a request."""
        engine = [
            f"{self.blocks} KV blocks of {self.block_size} tokens",
            f"{self.token_budget} tokens a step",
            f"{self.max_seqs} requests at a time",
            *([f"chunks of {self.chunk}"] if self.chunk else []),
            *([] if self.prefix_cache else ["no prefix cache"]),
            *([f"{self.host_blocks} host blocks"] if self.host_blocks else []),
            *([f"{self.pause_what} paused from {self.pause[0]} to {self.pause[1]} ms"] if self.pause else []),
            *([f"replicas {', '.join(map(str, self.replicas))}"] if self.replicas != (0,) else []),
            *([f"views {self.stale} ms old"] if self.stale else []),
        ]
        rows = [("request", "arrives", "prompt", "output", "")]
        for number, ask in enumerate(self.requests):
            notes = ", ".join(_notes(ask))
            rows.append((f"r{number}", f"{ask.at} ms", f"{ask.prompt}", f"{ask.output}", notes))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        return "\n".join([", ".join(engine), *(line.rstrip() for line in lines)])

    def code(self) -> str:
        """For Python: an expression that makes this workload again."""
        asks = [f"Ask({', '.join(_said(ask))})" for ask in self.requests]
        words = [word for word in _said(self) if not word.startswith("requests=")]
        several = ", ".join(asks) + "," * (len(asks) == 1)
        one = f"Case({', '.join([f'requests=({several})', *words])})"
        if len(one) <= 80:
            return one
        inner = "".join(f"        {ask},\n" for ask in asks)
        return f"Case(\n    requests=(\n{inner}    ),\n" + "".join(f"    {word},\n" for word in words) + ")"


def _said(value: Any) -> list[str]:
    """`name=value` of each field that isn't at its default."""
    found = []
    for field in dataclasses.fields(value):
        if getattr(value, field.name) != field.default:
            found.append(f"{field.name}={getattr(value, field.name)!r}")
    return found


def _notes(ask: Ask) -> Iterator[str]:
    if ask.shared:
        yield f"first {min(ask.shared, ask.prompt)} prompt tokens shared"
    if ask.priority:
        yield f"priority {ask.priority}"
    for name in ("tenant", "session"):
        if getattr(ask, name):
            yield f"{name} {getattr(ask, name)}"
    for name in ("ttft_slo", "tpot_slo"):
        if getattr(ask, name) is not None:
            yield f"{name} {getattr(ask, name)} ms"
    if ask.abort is not None:
        yield f"aborted at {ask.abort} ms" + (", while a step is computed" if ask.in_flight else "")


def engine_situations(st: ModuleType) -> Mapping[str, Any]:
    """Hypothesis strategies of cases for one engine, by the situation they make. `st`: hypothesis.strategies."""
    ask, case = _makers(st)
    few, some = st.integers(1, 4), st.integers(1, 24)
    tight = {
        "blocks": st.integers(2, 12),
        "max_seqs": st.integers(2, 8),
        "host_blocks": st.sampled_from([0, 8]),
    }
    long = st.integers(1, 40)
    giant = st.tuples(ask(prompt=st.integers(48, 160)), st.lists(ask(), max_size=4)).map(
        lambda pair: (pair[0], *pair[1])
    )
    twins = st.tuples(ask(), st.integers(1, 6)).map(lambda pair: (pair[0],) * pair[1])
    return {
        "a handful of requests": case(max_seqs=few, chunk=st.none() | st.integers(1, 8)),
        "KV nearly full": case(ask(output=long), **tight),
        "one giant prompt": case(asks=giant, max_seqs=few),
        "equal keys (same arrival, lengths, priority)": case(asks=twins, max_seqs=few, blocks=st.integers(6, 64)),
        "a burst after idle": case(ask(at=st.sampled_from([0, 60])), max_seqs=few, most=8),
        "clients that go away": case(
            ask(abort=st.none() | st.integers(0, 12), in_flight=st.booleans(), output=long), **tight
        ),
        "pauses": case(
            pause=st.tuples(st.integers(0, 6), st.integers(1, 30)).map(lambda p: (p[0], p[0] + p[1])),
            pause_what=st.sampled_from(["all", "admission"]),
        ),
        "shared prefixes": case(ask(shared=st.integers(0, 24)), **tight),
        "no prefix cache": case(ask(output=long), **tight, prefix_cache=st.just(False)),
        "a tiny token budget": case(token_budget=st.integers(1, 3), max_seqs=few),
        "priorities, objectives and tenants": case(
            ask(
                priority=st.integers(0, 3),
                tenant=st.sampled_from(["", "gold", "free"]),
                session=st.sampled_from(["", "s0", "s1"]),
                ttft_slo=st.none() | st.integers(1, 40),
                tpot_slo=st.none() | st.integers(1, 10),
            ),
            blocks=st.integers(6, 24),
            max_seqs=few,
        ),
        "all at once": case(
            ask(
                prompt=some,
                output=long,
                shared=st.integers(0, 16),
                priority=st.integers(0, 2),
                abort=st.none() | st.integers(0, 30),
                in_flight=st.booleans(),
            ),
            **tight,
            token_budget=st.integers(1, 16),
            chunk=st.none() | st.integers(1, 6),
            most=8,
        ),
    }  # fmt: skip


def fleet_situations(st: ModuleType) -> Mapping[str, Any]:
    """The same for replicas behind a gateway."""
    ask, case = _makers(st)
    indices = st.sampled_from([(0,), (0, 1), (1,), (1, 3), (0, 2, 5)])
    who = {"session": st.sampled_from(["", "s0", "s1"]), "tenant": st.sampled_from(["", "gold", "free"])}
    return {
        "one replica": case(ask(**who)),
        "several replicas, some gone": case(ask(**who), replicas=indices, most=8),
        "stale views": case(ask(), replicas=indices, stale=st.integers(1, 20), most=8),
        "equal keys (same arrival, lengths, session)": case(
            asks=st.tuples(ask(**who), st.integers(1, 6)).map(lambda pair: (pair[0],) * pair[1]), replicas=indices
        ),
        "a burst after idle": case(ask(at=st.sampled_from([0, 60])), replicas=indices, most=8),
        "one giant prompt": case(ask(prompt=st.sampled_from([1, 160])), replicas=indices),
        "KV nearly full": case(ask(), replicas=indices, blocks=st.integers(2, 10)),
        "clients that go away": case(ask(abort=st.none() | st.integers(0, 12)), replicas=indices),
        "shared prefixes": case(ask(shared=st.integers(0, 24), **who), replicas=indices),
    }  # fmt: skip


def _makers(st: ModuleType) -> tuple[Any, Any]:
    def ask(**fields: Any) -> Any:
        usual = {"prompt": st.integers(1, 24), "output": st.integers(1, 8), "at": st.integers(0, 6)}
        return st.builds(Ask, **{**usual, **fields})

    def case(each: Any = None, *, asks: Any = None, most: int = 6, **fields: Any) -> Any:
        several = st.lists(each if each is not None else ask(), min_size=1, max_size=most).map(tuple)
        return st.builds(Case, requests=several if asks is None else asks, **fields)

    return ask, case
