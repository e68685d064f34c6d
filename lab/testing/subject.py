"""Which policy is to be checked: a class, a factory, or what one would write on a command line. Observation path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lab import importing, plugins
from lab.errors import ConfigError, PolicyError, UnknownNameError
from lab.testing.contracts import KINDS

Policy = Any
"""A class, a function without arguments that makes one, or a name as on a command line."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy under test."""

    make: Callable[[], Any]
    kind: str
    name: str
    spec: str
    """How to write it in Python, for `replay`."""


def resolve(policy: Policy, kind: str) -> Subject:
    """What `policy` means; `kind` is needed only where a name exists in several. Raises `ConfigError`."""
    if isinstance(policy, str):
        said, _, word = policy.rpartition("=")
        said = said or kind
        kind, cls = _named(word, said)
        for parameter, (_, default) in plugins.parameters(cls).items():
            if default is inspect.Parameter.empty:
                raise ConfigError(f"{word} needs a value for '{parameter}': {kind}.{parameter}=VALUE.")
        return Subject(cls, kind, word, repr(f"{said}={word}" if said else word))
    if isinstance(policy, type):
        kind = _kind_of(policy, kind)
        spec = f"{policy.__qualname__}" if policy.__module__ == "__main__" else repr(_dotted(policy))
        return Subject(policy, kind, policy.__name__, spec)
    if not callable(policy):
        raise ConfigError(f"policy is {policy!r}; expected a class, a function that makes one, or a name.")
    name = getattr(policy, "__name__", "policy").replace("<lambda>", "the policy")
    try:
        cls = type(policy())
    except Exception as error:
        raise PolicyError(f"{name}() raised {type(error).__name__}: {error}") from error
    return Subject(policy, _kind_of(cls, kind), cls.__name__, cls.__name__ if "<" in name else name)


def _dotted(cls: type) -> str:
    if importing.is_loose(cls):
        return plugins.provenance(cls)
    return f"{cls.__module__}:{cls.__qualname__}"


def _named(word: str, kind: str) -> tuple[str, type]:
    if kind:
        if kind not in KINDS:
            raise UnknownNameError("kind of policy", kind, KINDS)
        return kind, plugins.load(kind, word)
    if plugins.is_path(word):
        cls = plugins.load_any(word, tuple(each.base for each in KINDS.values()))
        return _kind_of(cls, ""), cls
    there = [each for each in KINDS if word in plugins.names(each)]
    if not there:
        known = {name for each in KINDS for name in plugins.names(each)}
        raise UnknownNameError("policy", word, known, "Or module:Class, ./file.py:Class.")
    if len(there) > 1:
        kinds = " and ".join(KINDS[each].words for each in there)
        raise ConfigError(f"'{word}' is {kinds}; say {there[0]}={word}.")
    return there[0], plugins.load(there[0], word)


def _kind_of(cls: type, kind: str) -> str:
    found = [name for name, each in KINDS.items() if issubclass(cls, each.base)]
    if not found or (kind and kind not in found):
        bases = [KINDS[kind].base] if kind in KINDS else [each.base for each in KINDS.values()]
        wanted = " or ".join(base.__name__ for base in bases)
        raise ConfigError(f"{cls.__name__} is no policy; expected a subclass of lab.policy's {wanted}.")
    return kind or found[0]
