"""What `lab.compiled.expand` writes out of a frozen class behaves as the class itself."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from types import ModuleType
from typing import Any

import pytest

from lab import compiled
from lab.compiled.expand import expand

SOURCE = '''
"""A module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from lab.frozen import frozen

START = 7


@frozen
class Plain:
    """Its docstring."""

    name: str
    count: int = START
    """A field's docstring."""
    known: Mapping[str, int] = field(default_factory=dict)

    @property
    def twice(self) -> int:
        return 2 * self.count


@dataclass(slots=True)
class Moving:
    at: int = 0
    seen: list[int] = field(default_factory=list)


@frozen
class Checked:
    parts: tuple[int, ...]
    _total: int = field(init=False, repr=False, compare=False)
    _: KW_ONLY
    label: str = "none"

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("empty")
        object.__setattr__(self, "_total", sum(self.parts))

    def __len__(self) -> int:
        return self._total


class Pair(NamedTuple):
    left: tuple[int, ...] = ()
    right: int = 0
'''


def module(name: str, source: str) -> Any:
    made = ModuleType(name)
    import sys

    sys.modules[name] = made
    exec(compile(source, name, "exec"), made.__dict__)
    return made


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    return module("as_written", SOURCE), module("as_expanded", expand(SOURCE))


def test_values_are_made_compared_shown_and_replaced_alike(both: tuple[Any, Any]) -> None:
    shown = []
    for one in both:
        plain, other = one.Plain("a"), one.Plain("a", count=7, known={})
        assert plain == other
        assert plain not in (one.Plain("b"), "a")
        assert one.Plain("a", 8) != plain
        again = dataclasses.replace(plain, count=3)
        assert (again.twice, plain.count) == (6, 7)
        assert one.Plain("a").known is not one.Plain("a").known
        moving = one.Moving(seen=[1])
        moving.at += 2
        assert moving == one.Moving(2, [1])
        checked = one.Checked((1, 2), label="x")
        assert len(checked) == 3
        assert hash(checked) == hash(one.Checked((1, 2), label="x"))
        assert {checked: 1}[one.Checked((1, 2), label="x")] == 1
        with pytest.raises(ValueError, match="empty"):
            one.Checked(())
        with pytest.raises(TypeError):
            one.Checked((1,), "x")
        with pytest.raises(TypeError):
            one.Plain()
        shown.append((repr(again), repr(checked), dataclasses.asdict(again), dataclasses.asdict(checked)))
    assert shown[0] == shown[1]


def test_what_asks_for_fields_hears_the_same(both: tuple[Any, Any]) -> None:
    told = []
    for one in both:
        names = [
            (f.name, f.type, f.init, f.compare, f.repr, f.kw_only, f.default is dataclasses.MISSING)
            for kind in (one.Plain, one.Checked)
            for f in dataclasses.fields(kind)
        ]
        hints = [typing.get_type_hints(kind) for kind in (one.Plain, one.Checked, one.Pair)]
        hints[1].pop("_", None)  # the marker isn't a field
        matched = (one.Plain.__match_args__, one.Checked.__match_args__)
        told.append(
            (
                names,
                hints,
                matched,
                inspect.getdoc(one.Plain),
                list(inspect.signature(one.Checked).parameters),
            )
        )
    assert told[0] == told[1]


@pytest.mark.parametrize("name", compiled.MODULES)
def test_every_module_expands_to_what_python_takes(name: str) -> None:
    source = compiled.source(name).read_text(encoding="utf-8")
    expanded = expand(source)
    compile(expanded, name, "exec")
    assert "@frozen" not in expanded
    assert expanded.count("described(") == source.count("@frozen\n") + source.count("slots=True)\n")


def test_constants_are_settled_but_for_tuples_which_the_compiler_loses() -> None:
    written = expand("LIMIT = 3\n_SCALE = (1.0, 2.0)\n_WHERE: dict[str, int] = {}\nHint = int\nlower = 1\n")
    assert "LIMIT: Final = 3" in written
    assert "_WHERE: Final[dict[str, int]] = {}" in written
    for line in ("_SCALE = (1.0, 2.0)", "Hint = int", "lower = 1"):
        assert line in written.splitlines()
