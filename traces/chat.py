"""Multi-turn conversations, JSON lines in a format of our own (README.md). Request path.

Turn k + 1's prompt is turn k's prompt, the tokens turn k generated, and what the user typed next. Arrivals
are in the file: open loop, a turn comes when the file says, whether or not the reply before it is finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from lab.control.request import Piece, Segment, stream_of
from traces.files import MAX_SECONDS, MAX_TOKENS, Place, describe, integer, json_rows, name, number, tokens
from traces.shape import FileOptions, Row, Shape, assemble, request_id
from traces.workload import Workload

REQUIRED = ("arrival_ms", "user_tokens", "output_tokens")
OPTIONAL = ("session", "turn", "tenant", "priority", "system", "system_tokens", "ttft_slo_ms", "tpot_slo_ms")
SAMPLE = "traces/samples/chat.jsonl"


@dataclass
class ChatOptions(FileOptions):
    """Conversations; `path` null is the sample that ships with Diptych."""


@dataclass(frozen=True, slots=True)
class _History:
    """A session so far: the next turn's number, its last arrival, and everything said."""

    turn: int
    arrival_ns: int
    tenant: str
    pieces: tuple[Piece, ...]


def load_chat(name: str, options: ChatOptions, path: str | None) -> Workload:
    """The file at `path`, or the committed sample, as a workload called `name`."""
    if path is not None:
        return _load(name, options, path, path)
    with resources.as_file(resources.files("traces") / "samples" / "chat.jsonl") as sample:
        return _load(name, options, str(sample), SAMPLE)


def _load(name: str, options: ChatOptions, path: str, label: str) -> Workload:
    shape = options.shape()
    return assemble(name, _rows(path, shape), shape, {"trace": name, **describe(path), "path": label})


def _rows(path: str, shape: Shape) -> Iterator[Row]:
    sessions: dict[str, _History] = {}
    for index, (place, row) in enumerate(json_rows(path, REQUIRED, OPTIONAL, closed=True)):
        arrival_ns = round(number(place.at("arrival_ms"), row["arrival_ms"], 0, MAX_SECONDS * 1e3) * 1e6)
        session = name(place.at("session"), row["session"]) if "session" in row else ""
        turn = integer(place.at("turn"), row["turn"], 0, MAX_TOKENS) if "turn" in row else 0
        tenant = name(place.at("tenant"), row["tenant"]) if "tenant" in row else ""
        history = sessions.get(session)
        if history is None or not session:
            history = _History(0, arrival_ns, tenant, _system(place, row))
        elif "system" in row or "system_tokens" in row:
            raise place.at("system").error("a system prompt belongs on a session's first turn")
        _check_follows(place, history, session, turn, arrival_ns, tenant)
        text = stream_of("user", session, turn) if session else stream_of("user alone", index)
        prompt = (*history.pieces, Segment(text, 0, tokens(place, row, "user_tokens")))
        output = tokens(place, row, "output_tokens")
        if session:
            reply = Segment(stream_of("output", request_id(index)), 0, shape.clip_output(output))
            sessions[session] = _History(turn + 1, arrival_ns, tenant, (*prompt, reply))
        yield Row(
            arrival_ns,
            prompt,
            output,
            tenant=tenant,
            session=session,
            priority=integer(place.at("priority"), row.get("priority", 0), -(1 << 31), (1 << 31) - 1),
            ttft_slo_ns=_slo(place, row, "ttft_slo_ms"),
            tpot_slo_ns=_slo(place, row, "tpot_slo_ms"),
        )


def _system(place: Place, row: dict[str, object]) -> tuple[Piece, ...]:
    """The shared system prompt: the same name is the same text, in any session."""
    if "system" not in row and "system_tokens" not in row:
        return ()
    for key in ("system", "system_tokens"):
        if key not in row:
            raise place.at(key).error("missing; a system prompt has a name and a length")
    text = stream_of("system", name(place.at("system"), row["system"]))
    return (Segment(text, 0, tokens(place, row, "system_tokens")),)


def _check_follows(
    place: Place, history: _History, session: str, turn: int, arrival_ns: int, tenant: str
) -> None:
    if turn != history.turn:
        of = f" of session '{session}'" if session else ""
        raise place.at("turn").error(f"{turn}; expected {history.turn}, the next turn{of}")
    if tenant != history.tenant:
        raise place.at("tenant").error(f"'{tenant}'; expected '{history.tenant}' as on the turn before")
    if arrival_ns < history.arrival_ns:
        before = history.arrival_ns / 1e6
        raise place.at("arrival_ms").error(f"{arrival_ns / 1e6:g}; expected >= {before:g}, the turn before")


def _slo(place: Place, row: dict[str, object], key: str) -> int | None:
    return None if row.get(key) is None else round(number(place.at(key), row[key], 0.001, 1e12) * 1e6)
