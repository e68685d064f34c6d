"""Imports what `module:NAME`, `./file.py:NAME` or `./file.py` means, or says in one sentence why not. Control plane.

A loose file becomes a module named by its path and content, so that two runs of one process agree on its classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from lab.errors import ConfigError, UnknownNameError

_LOOSE = "diptych_loose_"


def attribute(kind: str, target: str, called: str = "") -> object:
    """What `module:NAME` or `file.py:NAME` leads to; `called` is the name that a user gave for it.

    Raises `ConfigError` for what isn't there or fails to import, with the file and line at fault.
    """
    where, _, name = target.rpartition(":")
    if target.endswith(".py"):
        raise ConfigError(f"{kind} '{target}' names a file only; say {target}:NAME.")
    label = f"{kind} '{called or target}'"
    if not where or not name:
        raise ConfigError(f"{label} isn't 'module:Class' or './file.py:Class'.")
    if where.endswith(".py"):
        module = _loose(label, where)
    else:
        with _importing(label, where):
            module = importlib.import_module(where)
    if not hasattr(module, name):
        own = [
            value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
        ]
        public = [value.__name__ for value in own if isinstance(value, type)]
        raise UnknownNameError(f"class in {where}", name, public)
    return getattr(module, name)


def only_class(label: str, path: str, bases: tuple[type, ...]) -> type:
    """The one class with one of these bases that a loose file defines. Raises `ConfigError` unless it's one."""
    module = _loose(label, path)
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, bases)
    ]
    leaves = [cls for cls in own if not any(other is not cls and issubclass(other, cls) for other in own)]
    if len(leaves) == 1:
        return leaves[0]
    wanted = " or ".join(f"lab.policy.{base.__name__}" for base in bases)
    if not own:
        raise ConfigError(f"{label} defines no subclass of {wanted}.")
    several = ", ".join(f"{path}:{cls.__name__}" for cls in own)
    raise ConfigError(f"{label} defines several policies; say which: {several}.")


def is_loose(cls: type) -> bool:
    """Whether a class comes from a file named by its path."""
    return cls.__module__.startswith(_LOOSE)


@contextlib.contextmanager
def _importing(label: str, where: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{where}.".startswith(f"{error.name}."):
            raise ConfigError(f"{label}: there is no module '{error.name}'.") from error
        raise ConfigError(f"{label} fails to import: {told(error)}.") from error


def _loose(label: str, where: str) -> ModuleType:
    with _importing(label, where):
        return _loose_module(label, where)


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


def told(error: BaseException) -> str:
    """`Kind: first line (file:line)` of an error in a plug-in's code, seen from the frame that caught it."""
    return f"{_said(error)}{_where(error)}"


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    """` (file:line)` of the innermost line that is not the import system's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is of whoever caught it
    inner = [
        f
        for f in frames
        if f.filename != __file__ and "/importlib/" not in f.filename and not f.filename.startswith("<frozen")
    ]
    return f" ({inner[-1].filename}:{inner[-1].lineno})" if inner else ""
