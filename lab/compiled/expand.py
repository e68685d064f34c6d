"""Source as the compiler takes it best: what a decorator does when the program starts, written out. No plane.

mypyc makes a fast class of one that it understands, and it doesn't understand `lab.frozen.frozen`; and the `__init__`
that `dataclass` makes stays interpreted. So each such class gets its `__init__`, `__eq__`, `__hash__` and `__repr__`
as code, and gives up what only interpreted code enforces: compiled, assigning to a field isn't refused.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_VALUES = ("frozen", "dataclass(frozen=True, slots=True)", "dataclass(slots=True)")
"""Decorators that make a class of its fields; the last one's instances change, and have no hash."""

_BUILTINS = ("dict", "list", "set", "tuple")

_OPEN = ("Observer",)
"""Classes that interpreted code derives its own from."""


def expand(source: str) -> str:
    """A module's source, with the same meaning, ready to be compiled."""
    module = ast.parse(source)
    added: list[str] = []
    body: list[ast.stmt] = []
    for node in module.body:
        node = _settled(node)
        body.append(node)
        if not isinstance(node, ast.ClassDef):
            continue
        decorators = [ast.unparse(each) for each in node.decorator_list]
        if any(each in _VALUES for each in decorators):
            body += _written_out(node, hashed=_VALUES[-1] not in decorators)
            added += [
                "from typing import Any, ClassVar",
                "from lab.frozen import described, told",
            ]
        elif [ast.unparse(base) for base in node.bases] == ["NamedTuple"]:
            body.append(_statement(f"setattr({node.name}, '__annotations__', {_annotations(node)})"))
        elif node.name in _OPEN:
            node.decorator_list.insert(0, _expression("mypyc_attr(allow_interpreted_subclasses=True)"))
            added.append("from mypy_extensions import mypyc_attr")
        elif any(ast.unparse(base).split("[")[0] in _BUILTINS for base in node.bases):
            node.decorator_list.insert(0, _expression("mypyc_attr(native_class=False)"))
            added.append("from mypy_extensions import mypyc_attr")
    module.body = body
    if any(isinstance(node, ast.AnnAssign) for node in body):
        added.append("from typing import Final")
    after = next(i for i, node in enumerate(body) if not _prologue(node))
    module.body[after:after] = [_statement(line) for line in sorted(set(added))]
    return ast.unparse(ast.fix_missing_locations(module))


@dataclass
class _Field:
    name: str
    annotation: ast.expr
    default: str = ""
    factory: str = ""
    init: bool = True
    compare: bool = True
    shown: bool = True
    keyword_only: bool = False


def _written_out(node: ast.ClassDef, hashed: bool) -> list[ast.stmt]:
    """Write out in `node` what its decorator makes of it; returns what is to come after the class."""
    fields = list(_fields(node))
    name = node.name
    given = [field for field in fields if field.init]
    parameters = ["self", *(_parameter(field) for field in given if not field.keyword_only)]
    if len(parameters) <= len(given):
        parameters += ["*", *(_parameter(field) for field in given if field.keyword_only)]
    lines = [f"self.{field.name} = {_value(field)}" for field in given]
    methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
    if "__post_init__" in methods:
        lines.append("self.__post_init__()")
    compared = [f"self.{field.name}" for field in fields if field.compare]
    others = [f"other.{field.name}" for field in fields if field.compare]
    shown = ", ".join(f"{field.name}={{self.{field.name}!r}}" for field in fields if field.shown)
    made = {
        "__init__": f"def __init__({', '.join(parameters)}) -> None:\n    "
        + "\n    ".join(lines or ["pass"]),
        "__eq__": f"def __eq__(self, other: object) -> bool:\n"
        f"    if not isinstance(other, {name}):\n        return NotImplemented\n"
        f"    return ({_tuple(compared)}) == ({_tuple(others)})",
        "__hash__": f"def __hash__(self) -> int:\n    return hash(({_tuple(compared)}))",
        "__repr__": f"def __repr__(self) -> str:\n    return f'{name}({shown})'",
    }
    if not hashed:
        del made["__hash__"]
    kept: list[ast.stmt] = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            if ast.unparse(item.annotation) == "KW_ONLY":
                continue
            item.value = None
        kept.append(item)
    documented = int(ast.get_docstring(node) is not None)
    kept.insert(documented, _statement("__dataclass_fields__: ClassVar[dict[str, Any]] = {}"))
    node.body = kept + [_statement(text) for key, text in made.items() if key not in methods]
    node.decorator_list = [each for each in node.decorator_list if ast.unparse(each) not in _VALUES]
    rows = ", ".join(
        f"{field.name!r}: ({ast.unparse(field.annotation)!r}, {_call(field)})" for field in fields
    )
    return [_statement(f"described({name}, {{{rows}}})")]


def _settled(node: ast.stmt) -> ast.stmt:
    """A module's constant, which by the house's naming never changes: no need to look it up by name each time.

    Tuples stay as they are: mypyc 2.4 forgets those of numbers ("value for final name was not set").
    """
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if not (isinstance(target, ast.Name) and target.id.strip("_").isupper()):
        return node
    assert isinstance(node, ast.Assign | ast.AnnAssign)
    if isinstance(node.value, ast.Tuple):
        return node
    said = f"Final[{ast.unparse(node.annotation)}]" if isinstance(node, ast.AnnAssign) else "Final"
    return ast.AnnAssign(target, _expression(said), node.value, simple=1)


def _annotations(node: ast.ClassDef) -> dict[str, str]:
    """As they are written: the compiler keeps less of them."""
    return {field.name: ast.unparse(field.annotation) for field in _fields(node)}


def _call(field: _Field) -> str:
    """What `described` is told of a field, so that `dataclasses.fields` knows it."""
    words = [
        f"{word}={text}"
        for word, text in (("default", field.default), ("default_factory", field.factory))
        if text
    ]
    flags = (("init", field.init), ("compare", field.compare), ("repr", field.shown))
    words += [f"{word}=False" for word, on in flags if not on]
    words += ["kw_only=True"] if field.keyword_only else []
    return f"told({', '.join(words)})"


def _fields(node: ast.ClassDef) -> Iterator[_Field]:
    keyword_only = False
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        annotation = ast.unparse(item.annotation)
        if annotation == "KW_ONLY":
            keyword_only = True
        elif not annotation.startswith("ClassVar"):
            field = _Field(item.target.id, item.annotation, keyword_only=keyword_only)
            value = item.value
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
                for word in value.keywords:
                    text = ast.unparse(word.value)
                    if word.arg == "default":
                        field.default = text
                    elif word.arg == "default_factory":
                        field.factory = text
                    elif word.arg == "init":
                        field.init = text == "True"
                    elif word.arg == "compare":
                        field.compare = text == "True"
                    elif word.arg == "repr":
                        field.shown = text == "True"
                    else:
                        raise ValueError(
                            f"{node.name}.{field.name}: no field({word.arg}=) in a compiled class"
                        )
            elif value is not None:
                field.default = ast.unparse(value)
            yield field


def _parameter(field: _Field) -> str:
    annotation = ast.unparse(field.annotation)
    if field.factory:
        return f"{field.name}: {annotation} | None = None"
    return f"{field.name}: {annotation}" + (f" = {field.default}" if field.default else "")


def _value(field: _Field) -> str:
    return f"{field.factory}() if {field.name} is None else {field.name}" if field.factory else field.name


def _tuple(names: list[str]) -> str:
    return ", ".join(names) + ("," if len(names) == 1 else "")


def _prologue(node: ast.stmt) -> bool:
    """The module's docstring and its imports from the future."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _statement(text: str) -> ast.stmt:
    return ast.parse(text).body[0]
