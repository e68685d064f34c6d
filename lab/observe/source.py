"""Where a name stands in the source, found by parsing, without an import. Observation path.

A symbol is written `file:name` or `file:Class.method`, the file relative to the checkout:
`lab/control/core.py:EngineCore.plan`. What a place says of itself comes from its docstring.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout that this file lies in."""

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class Place:
    """A definition: its symbol, the line of its `def` or `class`, and its docstring's first sentence."""

    symbol: str
    line: int
    doc: str

    @property
    def file(self) -> str:
        return self.symbol.partition(":")[0]

    @property
    def name(self) -> str:
        return self.symbol.partition(":")[2]

    @property
    def owner(self) -> str:
        """The class of a method, else the function or class itself, as a symbol."""
        head, dot, _ = self.symbol.rpartition(".")
        return head if dot and ":" in head else self.symbol


def locate(symbol: str, root: Path = ROOT) -> Place:
    """The place of a symbol under `root`. Raises `LookupError` where the file or the name is gone."""
    node = _node(symbol, root)
    return Place(symbol, int(getattr(node, "lineno", 1)), first_sentence(_docstring(node)))


def module_doc(file: str, root: Path = ROOT) -> str:
    """The whole docstring of a file; `""` where it has none."""
    return _docstring(_tree(root / file))


def bases(symbol: str, root: Path = ROOT) -> list[str]:
    """The names of a class's bases, as they are written."""
    node = _node(symbol, root)
    return [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []


def attributes(symbol: str, root: Path = ROOT) -> set[str]:
    """What a class's instances hold: every `self.name` that its methods assign, every annotated field."""
    found: set[str] = set()
    for node in ast.walk(_node(symbol, root)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, on one line; `""` of nothing."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`(])", paragraph, maxsplit=1)[0]


def _node(symbol: str, root: Path) -> ast.AST:
    file, _, qualified = symbol.partition(":")
    path = root / file
    if not path.is_file():
        raise LookupError(f"'{symbol}': '{file}' isn't there")
    scope: ast.AST = _tree(path)
    for name in qualified.split("."):
        inner = [node for node in ast.iter_child_nodes(scope) if getattr(node, "name", None) == name]
        if not inner:
            raise LookupError(f"'{symbol}': '{name}' isn't there")
        scope = inner[-1] if isinstance(inner[-1], _DEFINITIONS) else inner[0]
    return scope


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _tree(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


def _docstring(node: ast.AST) -> str:
    documented = isinstance(node, (*_DEFINITIONS, ast.Module))
    return (ast.get_docstring(node) or "") if documented else ""  # type: ignore[arg-type]
