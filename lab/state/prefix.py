"""Content keys: what makes two KV blocks the same. State path, control plane.

A full block's key is a hash of its tokens and of the key of the block before it, so a key names a whole
prefix (the idea of vLLM's automatic prefix caching). Synthetic text is hashed by its name and offset and
never turned into tokens; adjacent stretches are joined first, so the key doesn't depend on how a prompt
happens to be cut into pieces. Blocks that lie within one such stretch are numbered: the first of them is hashed,
and the others are told apart by their number behind the same hash.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

from lab.control.request import Piece, Prompt, Segment

_Run = list[int] | list[object]


def root_key(salt: str) -> bytes:
    """Key before the first block; different salts never share."""
    return blake2b(salt.encode(), digest_size=16, person=b"diptych-kv").digest()


class ContentChain:
    """Keys of one request's full blocks, computed as far as asked and kept.

    `output_stream` names the synthetic text that stands for generated tokens; None means that the real
    token ids in `output` are the content.
    """

    __slots__ = (
        "_block_size",
        "_cursor",
        "_cursor_start",
        "_output",
        "_pieces",
        "_prompt",
        "_stretch",
        "_tail",
        "keys",
    )

    def __init__(
        self, prompt: Prompt, block_size: int, salt: str, output: Sequence[int], output_stream: int | None
    ) -> None:
        self._prompt = len(prompt)
        self._pieces = prompt.pieces if len(prompt.pieces) < 2 else _joined(prompt.pieces)
        self._block_size = block_size
        self._output = output
        self._cursor, self._cursor_start = 0, 0
        self._tail = None if output_stream is None else Segment(output_stream, 0, _ENDLESS)
        self._stretch: tuple[int, bytes] | None = None
        """The first block that lies within the stretch at the cursor, and the hash that names it and the others."""
        self.keys: list[bytes] = [root_key(salt)]
        """keys[0] is the root; keys[i + 1] belongs to block i."""

    def upto(self, blocks: int) -> list[bytes]:
        """The chain with at least the keys of the first `blocks` blocks. Their tokens must be known."""
        keys, size = self.keys, self._block_size
        if self._stretch is not None and self._cursor == len(self._pieces) and blocks == len(keys):
            # One more block of generated text: the usual case while a request decodes.
            first, base = self._stretch
            number = blocks - 1 - first
            if number >= len(_NUMBERS):
                _count_to(number + 1)
            keys.append(base + _NUMBERS[number])
            return keys
        while (index := len(keys) - 1) < blocks:
            low = index * size
            piece, offset, rest = self._rest(low)
            inside = min(rest // size, blocks - index)
            if not inside:
                content = self._pack(low, low + size)
                keys.append(blake2b(keys[-1] + content, digest_size=16).digest())
                continue
            if self._stretch is None:
                name = struct.pack("<cQQ", b"r", piece.stream, piece.start + offset)
                self._stretch = index, blake2b(keys[-1] + name, digest_size=12).digest()
            first, base = self._stretch
            start = index - first
            if start + inside > len(_NUMBERS):
                _count_to(start + inside)
            keys += [base + number for number in _NUMBERS[start : start + inside]]
        return keys

    def _rest(self, position: int) -> tuple[Segment, int, int]:
        """The stretch of synthetic text at a token position, the offset in it, and how much of it is left (0 of
        literal text); positions never go back."""
        if position >= self._prompt:
            if self._tail is None:
                return _NOTHING, 0, 0
            if self._cursor < len(self._pieces):
                self._cursor = len(self._pieces)
                self._stretch = None
            return self._tail, position - self._prompt, _ENDLESS
        piece = self._pieces[self._cursor]
        while position >= self._cursor_start + len(piece):
            self._cursor_start += len(piece)
            self._cursor += 1
            self._stretch = None
            piece = self._pieces[self._cursor]
        offset = position - self._cursor_start
        return (piece, offset, len(piece) - offset) if isinstance(piece, Segment) else (_NOTHING, 0, 0)

    def _pack(self, low: int, high: int) -> bytes:
        """Canonical bytes of tokens `low .. high`: literal runs by their ids, segments by name and offset."""
        out: list[bytes] = []
        literal: list[int] = []
        stream, start, length = -1, 0, 0
        while low < high:
            piece, offset, size = self._at(low, high)
            low += size
            if isinstance(piece, Segment):
                if literal:
                    out.append(_pack_literal(literal))
                    literal = []
                if piece.stream == stream and piece.start + offset == start + length:
                    length += size
                else:
                    if length:
                        out.append(struct.pack("<cQQI", b"s", stream, start, length))
                    stream, start, length = piece.stream, piece.start + offset, size
            else:
                if length:
                    out.append(struct.pack("<cQQI", b"s", stream, start, length))
                    stream, length = -1, 0
                literal.extend(piece[offset : offset + size])
        if literal:
            out.append(_pack_literal(literal))
        if length:
            out.append(struct.pack("<cQQI", b"s", stream, start, length))
        return b"".join(out)

    def _at(self, position: int, high: int) -> tuple[Piece, int, int]:
        """(piece, offset in it, tokens of it before `high`) at a token position; positions never go back."""
        if position >= self._prompt:
            done = position - self._prompt
            if self._tail is not None:
                return self._tail, done, high - position
            return tuple(self._output[done : high - self._prompt]), 0, high - position
        piece = self._pieces[self._cursor]
        while position >= self._cursor_start + len(piece):
            self._cursor_start += len(piece)
            self._cursor += 1
            self._stretch = None
            piece = self._pieces[self._cursor]
        offset = position - self._cursor_start
        return piece, offset, min(len(piece) - offset, high - position)


_ENDLESS = 1 << 62
_NOTHING = Segment(0, 0, 0)
_NUMBERS: list[bytes] = []
"""0, 1, 2, ... as four bytes each."""


def _count_to(count: int) -> None:
    _NUMBERS.extend(number.to_bytes(4, "little") for number in range(len(_NUMBERS), 2 * count))


def _joined(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """The pieces, with stretches that continue each other as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if not len(piece):
            continue
        if (
            isinstance(piece, Segment)
            and isinstance(last, Segment)
            and last.stream == piece.stream
            and last.start + last.length == piece.start
        ):
            joined[-1] = Segment(last.stream, last.start, last.length + piece.length)
        else:
            joined.append(piece)
    return joined


def _pack_literal(tokens: list[int]) -> bytes:
    return struct.pack(f"<cI{len(tokens)}q", b"t", len(tokens), *tokens)
