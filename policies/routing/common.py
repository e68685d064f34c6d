"""What several routing policies share: the least loaded, and keys that name a session or a prompt's beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lab.policy import ReplicaView, Request, Segment, stream_of


def least(replicas: Sequence[ReplicaView], load: Callable[[ReplicaView], float]) -> ReplicaView:
    """The replica of least load; the lowest index among equals."""
    return min(replicas, key=lambda replica: (load(replica), replica.index))


def uncached(request: Request, replica: ReplicaView) -> int:
    """Prompt tokens that this replica would have to compute."""
    return len(request.prompt) - replica.cached(request)


def beginning(request: Request, tokens: int) -> int:
    """A stable number for the first tokens of a prompt, the same however the prompt is cut into pieces."""
    text: list[tuple[object, ...]] = []
    left = tokens
    for piece in request.prompt.pieces:
        size = min(len(piece), left)
        left -= size
        if not size:
            continue
        if not isinstance(piece, Segment):
            if text and text[-1][0] == "literal":
                text[-1] += piece[:size]
            else:
                text.append(("literal", *piece[:size]))
            continue
        start = piece.start
        if text and text[-1][:2] == (piece.stream, start):
            text[-1] = (piece.stream, start + size, *text[-1][2:])
        else:
            text.append((piece.stream, start + size, start))
    return stream_of("beginning", *text)
