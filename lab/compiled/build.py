"""Making native code of the control plane: mypyc, and the C compiler that it needs. No plane."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from lab import compiled
from lab.compiled.expand import expand
from lab.errors import ConfigError, DiptychError

_SETUP = """
import sys
from mypyc.build import mypycify
from setuptools import setup

flags = ["--strict", "--ignore-missing-imports", "--follow-imports=silent", "--python-version", sys.argv[1]]
modules = mypycify([*flags, *sys.argv[2:]], opt_level="2", debug_level="0")
told = ["-q", "build_ext", "--inplace"]
setup(name="diptych-compiled", ext_modules=modules, packages=[], py_modules=[], script_args=told)
"""


def build(environment: Mapping[str, str] = os.environ) -> Path:
    """Compile, unless that was done; returns the folder. Older builds go.

    Raises `ConfigError` where the compiler can't be had or the folder can't be made, `DiptychError` with the compiler's
    last words where it fails.
    """
    home = compiled.home(environment)
    folder = home / compiled.digest()
    if folder.is_dir():
        return folder
    missing = [name for name in ("mypyc", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} can't be found; expected what `pip install mypy setuptools` installs"
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"'{home}' can't be made ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    with tempfile.TemporaryDirectory(dir=home, prefix=".building.") as name:
        place = Path(name) / "source"
        _lay_out(place)
        files = [_relative(module) for module in compiled.MODULES]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        done = subprocess.run(
            [sys.executable, "-c", _SETUP, version, *files],
            cwd=place,
            env={**environment, "DIPTYCH_COMPILED": "0", "PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
            raise DiptychError(
                f"the control plane could not be compiled; mypyc or the C compiler said:\n{words}"
            )
        finished = Path(name) / "finished"
        for module in place.glob(f"**/*{EXTENSION_SUFFIXES[0]}"):
            if "build" not in module.relative_to(place).parts[:1]:
                target = finished / module.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(module, target)
        with contextlib.suppress(OSError):  # somebody else was quicker
            finished.rename(folder)
    for old in home.iterdir():
        if old != folder and not old.name.startswith("."):
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _lay_out(place: Path) -> None:
    """A copy of the package, with what is to be compiled written out."""
    for package in sorted({name.partition(".")[0] for name in compiled.MODULES}):
        shutil.copytree(
            compiled.source(package).with_suffix(""),
            place / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for module in compiled.MODULES:
        target = place / _relative(module)
        target.write_text(expand(target.read_text(encoding="utf-8")), encoding="utf-8")


def _relative(module: str) -> str:
    return module.replace(".", "/") + ".py"
