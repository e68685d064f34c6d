"""Plans as bytes, for ranks in other processes and on other hosts. State path.

JSON, by position: a dataclass is the list of its fields in the order of their declaration (a NamedTuple too), read
back by their annotations. So a field that `StepPlan` gains travels without a word here, and what a peer sends can
become nothing but the plain values that are declared (a pickle could become anything). Both ends must have the same
declarations: `SCHEMA` is a digest of them, to be compared before the first plan.
"""

from __future__ import annotations

import collections.abc
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from lab.control.plan import StepPlan, TokenLogprobs
from lab.control.request import RequestId
from lab.errors import ExecutorError

_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Codec(NamedTuple):
    """How values of one type are written as JSON and read back."""

    write: Callable[[Any], Any] | None
    """None where JSON takes the value as it is."""
    read: Callable[[Any], Any]
    """Raises `TypeError`, `ValueError`, `KeyError` or `IndexError` for what isn't of the type."""
    schema: str


def encode(plan: StepPlan) -> bytes:
    """A plan's bytes: equal plans give equal ones."""
    return _written(_PLAN, plan)


def decode(data: bytes) -> StepPlan:
    """The plan that `encode` was given. Raises `ExecutorError` for bytes that aren't one."""
    plan: StepPlan = _read(_PLAN, data, "plan")
    return plan


def encode_logprobs(logprobs: Mapping[RequestId, TokenLogprobs]) -> bytes:
    """What a step says of its sampled tokens."""
    return _written(_LOGPROBS, logprobs)


def decode_logprobs(data: bytes) -> dict[RequestId, TokenLogprobs]:
    """As `decode`."""
    logprobs: dict[RequestId, TokenLogprobs] = _read(_LOGPROBS, data, "set of log-probabilities")
    return logprobs


def codec(hint: Any) -> Codec:
    """The codec of an annotation made of plain types, tuples, mappings, unions and dataclasses of these.

    Raises `TypeError` for any other: what can't travel has no place in a plan.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, str, bool, float):
        return _plain(hint)
    if hint is type(None):
        return Codec(None, _only(None), "None")
    if origin is typing.Literal:
        return Codec(None, _one_of(args), f"Literal{sorted(map(repr, args))}")
    if origin in (typing.Union, types.UnionType):
        return _union(args)
    if origin is collections.abc.Sequence or (origin is tuple and len(args) == 2 and args[1] is ...):
        return _many(args[0], tuple, lambda values: values)
    if origin is frozenset:
        return _many(args[0], frozenset, sorted)
    if origin is tuple:
        return _fixed(args)
    if origin in (dict, collections.abc.Mapping):
        pairs = _many(tuple[args[0], args[1]], dict, lambda mapping: mapping.items())  # type: ignore[valid-type]
        return Codec(
            pairs.write or (lambda mapping: list(mapping.items())), pairs.read, f"map {pairs.schema}"
        )
    if isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields")):
        return _record(hint)
    raise TypeError(f"{hint} can't be sent: expected plain values, tuples, mappings and dataclasses of these")


def _plain(kind: type) -> Codec:
    def read(value: Any) -> Any:
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(f"{value!r} where {kind.__name__} was expected")
        return value

    return Codec(None, read, kind.__name__)


def _only(wanted: object) -> Callable[[Any], Any]:
    return _one_of((wanted,))


def _one_of(wanted: tuple[object, ...]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in wanted:
            raise ValueError(f"{value!r} where one of {wanted} was expected")
        return value

    return read


def _many(hint: Any, make: Callable[[Any], Any], order: Callable[[Any], Any]) -> Codec:
    item = codec(hint)
    write, read = item.write, item.read

    def read_all(values: Any) -> Any:
        return make(map(read, _list(values)))

    def write_all(values: Any) -> Any:
        return list(map(write, order(values))) if write else list(order(values))

    return Codec(write_all, read_all, f"{getattr(make, '__name__', '')}[{item.schema}]")


def _fixed(hints: tuple[Any, ...]) -> Codec:
    items = [codec(hint) for hint in hints]
    writes, reads = [item.write for item in items], [item.read for item in items]

    def write(values: Any) -> Any:
        return [w(v) if w else v for w, v in zip(writes, values, strict=True)]

    def read(values: Any) -> Any:
        return tuple(r(v) for r, v in zip(reads, _list(values), strict=True))

    return Codec(write if any(writes) else None, read, f"({', '.join(item.schema for item in items)})")


def _union(hints: tuple[Any, ...]) -> Codec:
    """The place in the union, then the value; None and, where nothing else could be meant, a value are themselves."""
    rest = tuple(hint for hint in hints if hint is not type(None))
    items = [codec(hint) for hint in rest]
    schema = " | ".join(item.schema for item in items) + (" | None" if len(rest) < len(hints) else "")
    if len(items) == 1:
        write, read = items[0].write, items[0].read
        wrote = None if write is None else lambda value: None if value is None else write(value)
        return Codec(wrote, lambda value: None if value is None else read(value), schema)
    kinds = [typing.get_origin(hint) or hint for hint in rest]

    def write_one(value: Any) -> Any:
        if value is None and len(rest) < len(hints):
            return None
        place = next(i for i, kind in enumerate(kinds) if isinstance(value, kind))
        own = items[place].write
        return [place, own(value) if own else value]

    def read_one(value: Any) -> Any:
        if value is None and len(rest) < len(hints):
            return None
        place, inner = _list(value)
        return items[place].read(inner)

    return Codec(write_one, read_one, schema)


def _record(cls: type) -> Codec:
    hints = typing.get_type_hints(cls)
    named: tuple[str, ...] = getattr(cls, "_fields", ())  # of a NamedTuple
    names = [field.name for field in fields(cls) if field.init] if is_dataclass(cls) else list(named)
    items = [codec(hints[name]) for name in names]
    get = attrgetter(*names)
    several = len(names) > 1
    writes = [(i, item.write) for i, item in enumerate(items) if item.write]
    reads = [item.read for item in items]

    def write(value: Any) -> Any:
        values = list(get(value)) if several else [get(value)]
        for i, own in writes:
            values[i] = own(values[i])
        return values

    def read(values: Any) -> Any:
        found = {n: r(v) for n, r, v in zip(names, reads, _list(values), strict=True)}
        return cls(**found)

    parts = (f"{name}: {item.schema}" for name, item in zip(names, items, strict=True))
    return Codec(write, read, f"{cls.__name__}({', '.join(parts)})")


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"{value!r} where a list was expected")
    return value


def _written(how: Codec, value: Any) -> bytes:
    return _encode(how.write(value) if how.write else value).encode()


def _read(how: Codec, data: bytes, what: str) -> Any:
    try:
        return how.read(json.loads(data))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ExecutorError(f"{len(data)} bytes that should be a {what} aren't one: {error}") from error


_PLAN = codec(StepPlan)
_LOGPROBS = codec(dict[RequestId, TokenLogprobs])
SCHEMA = hashlib.blake2b(f"{_PLAN.schema};{_LOGPROBS.schema}".encode(), digest_size=16).hexdigest()
"""Digest of the declarations that both ends must share."""
