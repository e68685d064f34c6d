"""The few words of protobuf's wire format that exporters write. Observation path."""

from __future__ import annotations

_SMALL = tuple(bytes((n,)) for n in range(0x80))


def varint(value: int) -> bytes:
    """A number from 0, in groups of seven bits."""
    if value < 0x80:
        return _SMALL[value]
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(value: int) -> bytes:
    """An `int64`: negative ones as their two's complement."""
    return varint(value if value >= 0 else value & 0xFFFF_FFFF_FFFF_FFFF)


def number(tag: int, value: int) -> bytes:
    """Field `tag`, an integer."""
    return varint(tag << 3) + integer(value)


def field(tag: int, content: bytes) -> bytes:
    """Field `tag`, bytes or a message."""
    return varint(tag << 3 | 2) + varint(len(content)) + content


def text(tag: int, content: str) -> bytes:
    """Field `tag`, a string."""
    return field(tag, content.encode())
