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
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

from lab.control.request import Piece, Prompt, Segment

Run: TypeAlias = tuple[bytes, int, int]
"""Keys of blocks side by side that differ in their number alone: what comes before it, the first number, how many."""


@lru_cache(maxsize=1 << 10)
def root_key(salt: str) -> bytes:
    """Key before the first block; different salts never share."""
    return blake2b(salt.encode(), digest_size=16, person=b"diptych-kv").digest()


def key_of(base: bytes, number: int) -> bytes:
    """The key of one block of a run."""
    return base + number.to_bytes(_NUMBER, "little")


def split(key: bytes) -> tuple[bytes, int]:
    """Base and number that make a key."""
    return key[:-_NUMBER], int.from_bytes(key[-_NUMBER:], "little")


def keys_of(base: bytes, first: int, count: int) -> list[bytes]:
    """The keys of a run."""
    if count == 1:
        return [key_of(base, first)]
    if first + count > len(_NUMBERS):
        _NUMBERS.extend(n.to_bytes(_NUMBER, "little") for n in range(len(_NUMBERS), 2 * (first + count)))
    return [base + number for number in _NUMBERS[first : first + count]]


class ContentChain:
    """Keys of one request's full blocks, computed as far as asked and kept: as runs, and one by one if wanted.

    `output_stream` names the synthetic text that stands for generated tokens; None means that the real
    token ids in `output` are the content.
    """

    __slots__ = (
        "_block_size",
        "_cursor",
        "_cursor_start",
        "_inside",
        "_listed",
        "_named",
        "_output",
        "_pieces",
        "_prompt",
        "_runs",
        "_tail",
        "endless",
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
        self._runs: list[tuple[int, bytes, int, int]] = []
        """Each run's first block, and the run."""
        self._named = 0
        """Blocks that are in a run."""
        self._inside = False
        """Whether the last run lies within the stretch at the cursor, and goes on as far as that does."""
        self._listed = 0
        """The run that holds the next key of `keys`."""
        self.endless: bytes | None = None
        """Base of all keys to come, once the chain has reached generated text."""
        self.keys: list[bytes] = [root_key(salt)]
        """keys[0] is the root; keys[i + 1] belongs to block i. As far as `upto` was asked."""

    def upto(self, blocks: int) -> list[bytes]:
        """The chain with at least the keys of the first `blocks` blocks. Their tokens must be known."""
        keys = self.keys
        if len(keys) <= blocks:
            self._name(blocks)
            while len(keys) <= blocks:
                first, base, number, count = self._runs[self._listed]
                done = len(keys) - 1 - first
                if done < count:
                    keys += keys_of(base, number + done, count - done)
                else:
                    self._listed += 1
        return keys

    def runs(self, first: int, last: int) -> list[Run]:
        """The keys of blocks `first .. last` as runs. Their tokens must be known."""
        self._name(last)
        found: list[Run] = []
        for start, base, number, count in reversed(self._runs):
            low, high = max(start, first), min(start + count, last)
            if low < high:
                found.append((base, number + low - start, high - low))
            if start <= first:
                break
        found.reverse()
        return found

    def _name(self, blocks: int) -> None:
        """Extend the runs to the first `blocks` blocks."""
        size, runs = self._block_size, self._runs
        while (index := self._named) < blocks:
            low = index * size
            piece, offset, rest = self._rest(low)
            inside = min(rest // size, blocks - index)
            if not inside:
                content = self._pack(low, low + size)
                key = blake2b(self._last_key() + content, digest_size=16).digest()
                runs.append((index, *split(key), 1))
                self._named += 1
                continue
            if self._inside:
                first, base, number, count = runs[-1]
                runs[-1] = (first, base, number, count + inside)
            else:
                name = struct.pack("<cQQ", b"r", piece.stream, piece.start + offset)
                base = blake2b(self._last_key() + name, digest_size=16 - _NUMBER).digest()
                runs.append((index, base, 0, inside))
                self._inside = True
                if low >= self._prompt:
                    self.endless = base
            self._named += inside

    def _last_key(self) -> bytes:
        if not self._runs:
            return self.keys[0]
        _, base, number, count = self._runs[-1]
        return key_of(base, number + count - 1)

    def _rest(self, position: int) -> tuple[Segment, int, int]:
        """The stretch of synthetic text at a token position, the offset in it, and how much of it is left (0 of
        literal text); positions never go back."""
        if position >= self._prompt:
            if self._tail is None:
                return _NOTHING, 0, 0
            if self._cursor < len(self._pieces):
                self._cursor = len(self._pieces)
                self._inside = False
            return self._tail, position - self._prompt, _ENDLESS
        piece = self._pieces[self._cursor]
        while position >= self._cursor_start + len(piece):
            self._cursor_start += len(piece)
            self._cursor += 1
            self._inside = False
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
            self._inside = False
            piece = self._pieces[self._cursor]
        offset = position - self._cursor_start
        return piece, offset, min(len(piece) - offset, high - position)


_ENDLESS = 1 << 62
_NOTHING = Segment(0, 0, 0)
_NUMBER = 4
"""Bytes of a block's number in its key."""
_NUMBERS: list[bytes] = []
"""0, 1, 2, ... as so many bytes each."""


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
