"""Content keys: what makes two KV blocks the same. State path, control plane.

A full block's key is a hash of its tokens and of the key of the block before it, so a key names a whole
prefix (the idea of vLLM's automatic prefix caching). Synthetic text is hashed by its name and offset and
never turned into tokens; adjacent stretches are joined first, so the key doesn't depend on how a prompt
happens to be cut into pieces.
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
        "_output_stream",
        "_pieces",
        "_prompt",
        "keys",
    )

    def __init__(
        self, prompt: Prompt, block_size: int, salt: str, output: Sequence[int], output_stream: int | None
    ) -> None:
        self._prompt = len(prompt)
        self._pieces = prompt.pieces
        self._block_size = block_size
        self._output, self._output_stream = output, output_stream
        self._cursor, self._cursor_start = 0, 0
        self.keys: list[bytes] = [root_key(salt)]
        """keys[0] is the root; keys[i + 1] belongs to block i."""

    def upto(self, blocks: int) -> list[bytes]:
        """The chain with at least the keys of the first `blocks` blocks. Their tokens must be known."""
        keys = self.keys
        for index in range(len(keys) - 1, blocks):
            low = index * self._block_size
            content = self._pack(low, low + self._block_size)
            keys.append(blake2b(keys[-1] + content, digest_size=16).digest())
        return keys

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
            if self._output_stream is not None:
                return Segment(self._output_stream, 0, high), done, high - position
            return tuple(self._output[done : high - self._prompt]), 0, high - position
        piece = self._pieces[self._cursor]
        while position >= self._cursor_start + len(piece):
            self._cursor_start += len(piece)
            self._cursor += 1
            piece = self._pieces[self._cursor]
        offset = position - self._cursor_start
        return piece, offset, min(len(piece) - offset, high - position)


def _pack_literal(tokens: list[int]) -> bytes:
    return struct.pack(f"<cI{len(tokens)}q", b"t", len(tokens), *tokens)
