"""A workload over and over, for runs of any length: requests are made when they are asked for. Request path."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import overload

from lab.control.request import Prompt, Request, Segment, stream_of


class Repeated(Sequence[Request]):
    """`count` requests: those of a workload, then the same again with other names and other text, and so on.

    Each round begins one mean gap between arrivals after the last arrival of the round before. Synthetic text alone
    is renamed; rounds share literal tokens.
    """

    def __init__(self, requests: Sequence[Request], count: int) -> None:
        self._requests, self._count = requests, count
        last = requests[-1].arrival
        self._round = last + max(1, last // max(1, len(requests) - 1))
        self._made: tuple[int, Request] = (0, requests[0])

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | Sequence[Request]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        index += self._count if index < 0 else 0
        if not 0 <= index < self._count:
            raise IndexError(index)
        if self._made[0] != index:
            number, place = divmod(index, len(self._requests))
            self._made = (index, self._again(self._requests[place], number))
        return self._made[1]

    def _again(self, request: Request, number: int) -> Request:
        if not number:
            return request
        salt = stream_of("round", number)
        pieces = tuple(
            Segment(piece.stream ^ salt, piece.start, piece.length) if isinstance(piece, Segment) else piece
            for piece in request.prompt.pieces
        )
        return dataclasses.replace(
            request,
            id=f"{request.id}.{number}",
            prompt=Prompt(pieces),
            arrival=request.arrival + number * self._round,
            session=f"{request.session}.{number}" if request.session else "",
        )
