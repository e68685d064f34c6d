"""The line between rank 0 and each other rank: frames over a stream socket. State path.

Plans go down it and what became of them comes back. It is not torch.distributed's, whose waits end by a timeout: a
rank may wait for the next plan as long as it likes, and knows at once when the other end is gone.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Mapping
from typing import Any

from lab.errors import ExecutorError

_HEAD = struct.Struct("<cQ")
_MOST = 1 << 32


class LinkClosed(Exception):
    """The other end is gone."""


class Link:
    """Frames of one letter and some bytes. Letters: `P` a plan, `J` an object of JSON, `B` bytes that belong to one."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        stream.setblocking(True)
        if stream.family != socket.AF_UNIX:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._buffer = bytearray()

    def send(self, letter: bytes, data: bytes) -> None:
        """Raises `LinkClosed`."""
        try:
            self._stream.sendall(_HEAD.pack(letter, len(data)) + data)
        except OSError as error:
            raise LinkClosed from error

    def say(self, **message: Any) -> None:
        """One object of JSON."""
        self.send(b"J", json.dumps(message).encode())

    def receive(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """The next frame. Raises `LinkClosed`, or `TimeoutError` after so many seconds without all of it."""
        while (frame := self._frame()) is None:
            if timeout is not None and not select.select([self._stream], [], [], timeout)[0]:
                raise TimeoutError
            try:
                more = self._stream.recv(1 << 16)
            except OSError as error:
                raise LinkClosed from error
            if not more:
                raise LinkClosed
            self._buffer += more
        return frame

    def hear(self, timeout: float | None = None) -> dict[str, Any]:
        """The next frame, which must be an object of JSON. Raises also `ExecutorError`."""
        letter, data = self.receive(timeout)
        message = json.loads(data) if letter == b"J" else None
        if not isinstance(message, Mapping):
            raise ExecutorError(
                f"a rank sent a frame '{letter.decode('latin-1')}' where a message was expected"
            )
        return dict(message)

    def close(self) -> None:
        """May be called twice."""
        self._stream.close()

    def _frame(self) -> tuple[bytes, bytes] | None:
        if len(self._buffer) < _HEAD.size:
            return None
        letter, size = _HEAD.unpack_from(self._buffer)
        if size > _MOST:
            raise LinkClosed(f"a frame of {size} bytes")
        end = _HEAD.size + size
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[_HEAD.size : end])
        del self._buffer[:end]
        return letter, data
