"""Finds policies, backends and trace registries by name. Control plane; runs before a run begins.

A plug-in is named in one of three ways:

    policy=fcfs                         an entry point of the group `diptych.scheduling` (see KINDS)
    policy=my_package.my_module:MyPolicy
    policy=./my_file.py:MyPolicy        a loose file, relative to the working directory
    policy=./my_file.py                 the same, where the file defines only one policy

Only what is chosen is ever imported (`lab/importing.py`). What ships stands in `lab/shipped.py`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lab
from lab import importing, installed
from lab.errors import ConfigError, PolicyError, UnknownNameError
from lab.shipped import KINDS, Kind

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoints

try:
    SIBLINGS, __version__ = lab.SIBLINGS, lab.__version__
except AttributeError:
    # Another distribution's `lab` came first and led here all the same, as an editable install's finder does.
    # Nothing works then, and no command has begun that could say so.
    raise SystemExit(
        f"error: package 'lab' is shadowed: Python finds {lab.__file__}, expected {Path(__file__).parent}. "
        "Take its directory off PYTHONPATH, or uninstall it."
    ) from None

DISTRIBUTION = "diptych"
_PREFIX = f"{DISTRIBUTION}."


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a name leads: `module:attribute`, and the distribution that says so."""

    target: str
    dist: str


def providers(kind: str) -> dict[str, list[Provider]]:
    """Every name of a kind with what provides it; built-ins first. More than one provider is a conflict."""
    spec = _kind(kind)
    found = {name: [Provider(target, DISTRIBUTION)] for name, target in spec.builtin.items()}
    for name, provider in _entry_points(spec.group, tuple(sys.path)):
        known = found.setdefault(name, [])
        if all(other.target != provider.target for other in known) and provider.dist != DISTRIBUTION:
            known.append(provider)
    return {name: known for name, known in found.items() if known}


def _entry_points(group: str, path: tuple[str, ...]) -> list[tuple[str, Provider]]:
    """The entry points of a group with what provides them, as things stand on this `sys.path`. None at all where nobody
    but Diptych has any: what ships stands in a table."""
    found: list[tuple[str, Provider]] = []
    if not installed.extended(_PREFIX, DISTRIBUTION, path):
        return found
    for point in _installed(path).select(group=group):
        dist = _named(point.dist) if point.dist else ""
        found.append((point.name, Provider(point.value.replace(" ", ""), dist)))
    return found


@functools.cache  # looks at every distribution that is installed
def _installed(path: tuple[str, ...]) -> EntryPoints:
    from importlib import metadata

    groups = {spec.group for spec in KINDS.values()}
    every = metadata.entry_points()
    points = [point for group in sorted(groups) for point in every.select(group=group)]
    return metadata.EntryPoints(points)


@functools.cache  # reads its metadata, and all entry points of a distribution have the same
def _named(dist: Distribution) -> str:
    return dist.name


def names(kind: str) -> list[str]:
    """The names that a kind answers to, built-ins first."""
    return list(providers(kind))


def is_path(name: str) -> bool:
    """Whether a name is `module:Class`, `file.py:Class` or `file.py`, and not a registered one."""
    return ":" in name or name.endswith(".py")


def load(kind: str, name: str) -> type:
    """The class behind a name. Raises `UnknownNameError`, `ConfigError` (not loadable, wrong base)."""
    base = _kind(kind).base
    if name.endswith(".py") and base is not None:
        return importing.only_class(f"{kind} '{name}'", name, (base,))
    found = load_object(kind, name)
    if not isinstance(found, type) or (base is not None and not issubclass(found, base)):
        what = f"a {type(found).__name__}" if not isinstance(found, type) else f"the class {found.__name__}"
        wanted = f"a subclass of lab.policy.{base.__name__}" if base else "a class"
        raise ConfigError(f"{kind} '{name}' is {what}; expected {wanted}.")
    return found


def load_object(kind: str, name: str) -> object:
    """Like `load`, for kinds whose plug-ins are functions or tables (`backend`, `trace_registry`)."""
    if is_path(name):
        return importing.attribute(kind, name)
    found = providers(kind)
    if name not in found:
        hint = "" if _kind(kind).base is None else f"Or {kind}=module:Class, {kind}=./file.py:Class."
        raise UnknownNameError(kind, name, found, hint)
    if len(found[name]) > 1:
        sides = " and ".join(f"{p.dist or 'an unnamed distribution'} ({p.target})" for p in found[name])
        raise ConfigError(f"{kind} '{name}' is provided twice, by {sides}; say {kind}=module:Class instead.")
    return importing.attribute(kind, found[name][0].target, called=name)


def load_any(name: str, bases: tuple[type, ...]) -> type:
    """The class behind `module:Class`, `file.py:Class` or `file.py`, of whichever of these bases it is."""
    if name.endswith(".py"):
        return importing.only_class(f"policy '{name}'", name, bases)
    found = importing.attribute("policy", name)
    if not isinstance(found, type) or not issubclass(found, bases):
        wanted = " or ".join(base.__name__ for base in bases)
        raise ConfigError(f"policy '{name}' is {found!r}; expected a subclass of {wanted} of lab.policy.")
    return found


def parameters(cls: type) -> dict[str, tuple[object, object]]:
    """Parameters of a plug-in's `__init__`: name -> (type hint, default). `inspect.Parameter.empty`: none.

    Raises `ConfigError` for parameters that no name on a command line can reach (`*args`, positional-only).
    """
    init = vars(next(base for base in cls.__mro__ if "__init__" in vars(base)))["__init__"]
    if init is object.__init__:
        return {}
    signature = inspect.signature(init)
    try:
        hints = typing.get_type_hints(init)
    except Exception:  # a hint that only a type checker can resolve: the value is then taken as it comes
        hints = {}
    found: dict[str, tuple[object, object]] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"{cls.__qualname__}.__init__ takes '{parameter}', which has no name to set it by."
            )
        found[name] = (hints.get(name, typing.Any), parameter.default)
    return found


def create(kind: str, name: str, params: Mapping[str, object] | None = None) -> typing.Any:
    """A new plug-in object. Raises `UnknownNameError` (parameter), `PolicyError` (its `__init__` fails)."""
    cls = load(kind, name)
    given, known = dict(params or {}), parameters(cls)
    for key in given:
        if key not in known:
            raise UnknownNameError(f"parameter of {kind} '{name}'", key, known)
    for key, (_, default) in known.items():
        if default is inspect.Parameter.empty and key not in given:
            raise ConfigError(f"{kind} '{name}' needs a value for '{key}': {kind}.{key}=VALUE.")
    try:
        return cls(**given)
    except Exception as error:
        raise PolicyError(f"{kind} '{name}' can't be made: {importing.told(error)}.") from error


def provenance(cls: type) -> str:
    """What to write down for a run: `distribution==version module:Class`, or `path:Class`."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if importing.is_loose(cls):
        return f"{file}:{cls.__qualname__}"
    top = cls.__module__.partition(".")[0]
    where = f"{cls.__module__}:{cls.__qualname__}"
    if top in SIBLINGS:
        return f"{DISTRIBUTION}=={__version__} {where}"
    from importlib import metadata

    for dist in metadata.packages_distributions().get(top, ()):
        return f"{dist}=={metadata.version(dist)} {where}"
    return f"{file} {where}"


def summary(kind: str, name: str) -> str:
    """What a plug-in's source says of it in one line, read without importing it; else where it comes from.

    The module's docstring where that begins with `name:`, as a one-policy file's does; else the class's.
    """
    known = providers(kind).get(name)
    if not known:
        return ""
    origin = f"({known[0].dist or 'an unnamed distribution'}: {known[0].target})"
    return _documented(name, known[0]) or origin


def _documented(name: str, provider: Provider) -> str:
    module, _, attribute = provider.target.partition(":")
    try:
        tree = ast.parse(_source_path(module).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    if first.startswith(f"{name}: "):
        return first.removeprefix(f"{name}: ")
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise UnknownNameError("kind of plug-in", kind, KINDS)
    return KINDS[kind]


def _source_path(module: str) -> Path:
    """Where a module's source should be. Imports nothing, not even the module's package."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise OSError(f"no module {top}")
    if not rest:
        return Path(spec.origin or "")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))).joinpath(*rest)
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
