"""Finds policies, backends and trace registries by name. Control plane; runs before a run begins.

A plug-in is named in one of three ways:

    policy=fcfs                         an entry point of the group `diptych.scheduling` (see KINDS)
    policy=my_package.my_module:MyPolicy
    policy=./my_file.py:MyPolicy        a loose file, relative to the working directory

Only what is chosen is ever imported. The built-ins stand in a table as well as in the distribution's entry
points, so that a checkout that isn't installed works too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType

from lab import SIBLINGS, __version__
from lab.errors import ConfigError, PolicyError, UnknownNameError
from lab.policy import AdmissionPolicy, EvictionPolicy, RoutingPolicy, SchedulingPolicy

DISTRIBUTION = "diptych"


@dataclass(frozen=True, slots=True)
class Kind:
    """One seam: its entry-point group, the base class plug-ins must have (None: any), the built-ins."""

    group: str
    base: type | None
    builtin: Mapping[str, str]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "policy": Kind(
            "diptych.scheduling",
            SchedulingPolicy,
            {
                "fcfs": "policies.scheduling.fcfs:Fcfs",
                "prefill_first": "policies.scheduling.prefill_first:PrefillFirst",
                "sjf": "policies.scheduling.sjf:ShortestJobFirst",
                "priority": "policies.scheduling.priority:Priority",
                "edf": "policies.scheduling.edf:EarliestDeadlineFirst",
            },
        ),
        "eviction": Kind(
            "diptych.eviction",
            EvictionPolicy,
            {
                "lru": "policies.eviction.lru:Lru",
                "fifo": "policies.eviction.fifo:Fifo",
                "lfu": "policies.eviction.lfu:Lfu",
            },
        ),
        "admission": Kind(
            "diptych.admission", AdmissionPolicy, {"always": "policies.admission.always:Always"}
        ),
        "routing": Kind("diptych.routing", RoutingPolicy, {"single": "policies.routing.single:Single"}),
        "backend": Kind(
            "diptych.backend",
            None,
            {"real": "real_engine.backend:open_backend", "sim": "sim.backend:open_backend"},
        ),
        "trace_registry": Kind("diptych.trace_registry", None, {"builtin": "traces.registry:TRACES"}),
    }
)
"""Kinds that are also configuration groups carry the group's name."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a name leads: `module:attribute`, and the distribution that says so ("" for the checkout)."""

    target: str
    dist: str
    version: str


def providers(kind: str) -> dict[str, list[Provider]]:
    """Every name of a kind with what provides it; built-ins first. More than one provider is a conflict."""
    spec = _kind(kind)
    found = {name: [Provider(target, DISTRIBUTION, "")] for name, target in spec.builtin.items()}
    for point in importlib.metadata.entry_points(group=spec.group):
        dist = point.dist.name if point.dist else ""
        provider = Provider(point.value.replace(" ", ""), dist, point.dist.version if point.dist else "")
        known = found.setdefault(point.name, [])
        if all(other.target != provider.target for other in known) and dist != DISTRIBUTION:
            known.append(provider)
    return {name: known for name, known in found.items() if known}


def names(kind: str) -> list[str]:
    """The names that a kind answers to, built-ins first."""
    return list(providers(kind))


def is_path(name: str) -> bool:
    """Whether a name is `module:Class` or `file.py:Class` and not a registered one."""
    return ":" in name


def load(kind: str, name: str) -> type:
    """The class behind a name. Raises `UnknownNameError`, `ConfigError` (not loadable, wrong base)."""
    found = load_object(kind, name)
    base = _kind(kind).base
    if not isinstance(found, type) or (base is not None and not issubclass(found, base)):
        what = f"a {type(found).__name__}" if not isinstance(found, type) else f"the class {found.__name__}"
        wanted = f"a subclass of lab.policy.{base.__name__}" if base else "a class"
        raise ConfigError(f"{kind} '{name}' is {what}; expected {wanted}.")
    return found


def load_object(kind: str, name: str) -> object:
    """Like `load`, for kinds whose plug-ins are functions or tables (`backend`, `trace_registry`)."""
    if is_path(name):
        return _import_target(kind, name)
    found = providers(kind)
    if name not in found:
        hint = "" if _kind(kind).base is None else f"Or {kind}=module:Class, {kind}=./file.py:Class."
        raise UnknownNameError(kind, name, found, hint)
    if len(found[name]) > 1:
        sides = " and ".join(f"{p.dist or 'an unnamed distribution'} ({p.target})" for p in found[name])
        raise ConfigError(f"{kind} '{name}' is provided twice, by {sides}; say {kind}=module:Class instead.")
    return _import_target(kind, found[name][0].target, called=name)


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
        raise PolicyError(f"{kind} '{name}' can't be made: {_said(error)}{_where(error)}.") from error


def provenance(cls: type) -> str:
    """What to write down for a run: `distribution==version module:Class`, or `path:Class`."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if cls.__module__.startswith(_LOOSE):
        return f"{file}:{cls.__qualname__}"
    top = cls.__module__.partition(".")[0]
    where = f"{cls.__module__}:{cls.__qualname__}"
    if top in SIBLINGS:
        return f"{DISTRIBUTION}=={__version__} {where}"
    for dist in importlib.metadata.packages_distributions().get(top, ()):
        return f"{dist}=={importlib.metadata.version(dist)} {where}"
    return f"{file} {where}"


def summary(kind: str, name: str) -> str:
    """What a plug-in's source says of it in one line, read without importing it; "" if out of reach.

    The module's docstring where that begins with `name:`, as a one-policy file's does; else the class's.
    """
    known = providers(kind).get(name)
    if not known:
        return ""
    module, _, attribute = known[0].target.partition(":")
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


# --- importing -------------------------------------------------------------------------------------------

_LOOSE = "diptych_loose_"


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise UnknownNameError("kind of plug-in", kind, KINDS)
    return KINDS[kind]


def _import_target(kind: str, target: str, called: str = "") -> object:
    where, _, attribute = target.rpartition(":")
    label = f"{kind} '{called or target}'"
    if not where or not attribute:
        raise ConfigError(f"{label} isn't 'module:Class' or './file.py:Class'.")
    try:
        module = _loose_module(label, where) if where.endswith(".py") else importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{where}.".startswith(f"{error.name}."):
            raise ConfigError(f"{label}: there is no module '{error.name}'.") from error
        raise ConfigError(f"{label} fails to import: {_said(error)}{_where(error)}.") from error
    if not hasattr(module, attribute):
        own = [
            value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
        ]
        public = [value.__name__ for value in own if isinstance(value, type)]
        raise UnknownNameError(f"class in {where}", attribute, public)
    return getattr(module, attribute)


def _loose_module(label: str, where: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{label}: can't read {where}: {error.strerror}.") from error
    # Path and content name the module: a changed file is a new module, an unchanged one keeps its classes.
    name = _LOOSE + hashlib.blake2b(str(path).encode() + b"\0" + source, digest_size=8).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up while it loads
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    """` (file:line)` of the innermost line that is not the import system's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    inner = [f for f in frames if f.filename != __file__ and "/importlib/" not in f.filename]
    return f" ({inner[-1].filename}:{inner[-1].lineno})" if inner else ""
