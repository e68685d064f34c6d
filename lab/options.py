"""One option of a configuration: its default, the line that `--help` shows for it, the values it may have.

Control plane; runs before a run begins. `option` makes the field of a dataclass, `check` says in one sentence what is
wrong with the values of one, down to its sections. What two options mean together is for `lab/validation.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lab.errors import ConfigError

T = TypeVar("T")
REQUIRED = "???"
"""OmegaConf's mark of a value that must be given."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers that an option takes; None is taken where its type allows it."""

    expected: str
    holds: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        """Raise `ConfigError` for a value outside."""
        if value is not None and not self.holds(value):
            raise ConfigError(f"{key} is {value}; expected {self.expected}.")


def at_least(least: int) -> Range:
    """Counts from `least` on."""
    return Range(f"at least {least}", lambda value: value >= least)


POSITIVE = Range("a finite number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("a finite number, at least 0", lambda value: 0 <= value < math.inf)
SHARE = Range("above 0, at most 1", lambda value: 0 < value <= 1)


def option(default: T, about: str, within: Range | Sequence[object] | None = None) -> T:
    """A dataclass field with a default, the line that `--help` shows, and the numbers or words it takes."""
    found: T = field(default=default, metadata={"help": about, "within": within})
    return found


def one_of(key: str, value: object, known: Sequence[object]) -> None:
    """Raise `ConfigError` for a word that isn't among `known`, with the nearest one that is."""
    if value not in known:
        words = [str(word) for word in known if word is not None]
        near = difflib.get_close_matches(str(value), words, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"{key} is '{value}'{hint} Expected one of: {', '.join(words)}.")


def check(prefix: str, section: object) -> None:
    """Raise `ConfigError` for the first value of a dataclass, or of those within it, that its option doesn't take."""
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        key, value = f"{prefix}{item.name}", getattr(section, item.name)
        within = item.metadata.get("within")
        if isinstance(within, Range):
            within.check(key, value)
        elif within is not None:
            one_of(key, value, within)
        for below, part in _sections(key, value):
            check(f"{below}.", part)


def _sections(key: str, value: object) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value):
        yield key, value
    elif isinstance(value, list):
        yield from ((f"{key}[{n}]", part) for n, part in enumerate(value) if dataclasses.is_dataclass(part))
    elif isinstance(value, Mapping):
        yield from ((f"{key}.{name}", part) for name, part in value.items() if dataclasses.is_dataclass(part))
