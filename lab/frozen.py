"""Frozen dataclasses that are made quickly: a step makes a dozen of them. All planes.

`dataclasses` fills a frozen instance by a guarded call for each field, so that one of fifteen fields takes 3 us to
make. Here it is filled as an instance of a twin class, which isn't frozen, and becomes its own class at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """`dataclass(frozen=True, slots=True)` in all respects but the time that `__init__` takes."""
    made: type[T] = dataclass(frozen=True, slots=True)(cls)
    made.__init__ = _quick_init(made)  # type: ignore[method-assign]
    return made


def _quick_init(cls: type[Any]) -> Callable[..., None]:
    """`cls.__init__`, written out as `dataclasses` does."""
    every = fields(cls)
    names: dict[str, Any] = {
        "become": object.__setattr__,
        "Frozen": cls,
        "Filling": type(cls.__name__, (), {"__slots__": tuple(item.name for item in every)}),
    }
    parameters, body = ["self"], ['become(self, "__class__", Filling)']
    keyword_only = False
    for item in every:
        if not item.init:
            continue
        if item.kw_only and not keyword_only:
            keyword_only = True
            parameters.append("*")
        default = ""
        if item.default is not MISSING:
            names[f"default_{item.name}"] = item.default
            default = f"=default_{item.name}"
        elif item.default_factory is not MISSING:
            names[f"make_{item.name}"] = item.default_factory
            names["MISSING"] = MISSING
            default = "=MISSING"
            body.append(f"if {item.name} is MISSING: {item.name} = make_{item.name}()")
        parameters.append(f"{item.name}{default}")
        body.append(f"self.{item.name} = {item.name}")
    body.append("self.__class__ = Frozen")
    if hasattr(cls, "__post_init__"):
        body.append("self.__post_init__()")
    source = f"def __init__({', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in body)
    exec(source, names)
    init: Callable[..., None] = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = dict(cls.__init__.__annotations__)
    return init


told: Callable[..., Any] = field


def described(cls: type[Any], about: dict[str, tuple[str, Any]]) -> None:
    """Let `dataclasses` and `typing` know the fields of a compiled class (`lab.compiled.expand`): what each is
    annotated with, and its `field()`."""
    known: Any = make_dataclass(
        cls.__name__,
        [(name, *saying) for name, saying in about.items()],
        init=False,
        repr=False,
        eq=False,
        namespace={
            "__doc__": cls.__name__
        },  # else one is made of its signature, which takes longer than all the rest
    )
    given = tuple(name for name, (_, each) in about.items() if each.init and not each.kw_only)
    setattr(cls, "__dataclass_fields__", known.__dataclass_fields__)  # noqa: B010
    setattr(cls, "__match_args__", given)  # noqa: B010
    setattr(cls, "__annotations__", {name: annotation for name, (annotation, _) in about.items()})  # noqa: B010
