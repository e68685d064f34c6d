"""The control plane, compiled: the same source, the same decisions, about twice the speed. No plane.

`python -m lab.compiled` has mypyc make native code of `MODULES`, which are typed throughout, into the cache directory,
under a digest of their source. From then on `import lab` takes them from there, as long as the source is what it was:
a changed line means interpreted code again, until it is compiled anew. `DIPTYCH_COMPILED=0` means interpreted code
always, which a debugger can step through.

Policies, observers and cost models stay as they are, Python that is called by compiled code; but for the queue that
most of the shipped policies keep their order in.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from types import ModuleType

MODULES = (
    "lab.control.answers",
    "lab.control.blame",
    "lab.control.coast",
    "lab.control.compress",
    "lab.control.core",
    "lab.control.decodes",
    "lab.control.estimate",
    "lab.control.executor",
    "lab.control.flight",
    "lab.control.gateway",
    "lab.control.live",
    "lab.control.loop",
    "lab.control.observer",
    "lab.control.plan",
    "lab.control.relocation",
    "lab.control.request",
    "lab.control.results",
    "lab.control.step",
    "lab.control.token_times",
    "lab.state.blocks",
    "lab.state.prefix",
    "lab.state.tiers",
    "policies.keyed_heap",
    "sim.cost.physical",
    "sim.cost.tables",
    "sim.cost.terms",
    "sim.cost.transfer",
    "sim.driver",
    "sim.executor",
)
"""Each is typed throughout, and hot. Names alone: nothing is imported by them here."""

_BESIDE = (
    "lab.assembly",
    "lab.compiled.build",
    "lab.compiled.expand",
    "lab.control.clock",
    "lab.control.fleet",
    "lab.control.laws",
    "lab.errors",
    "lab.frozen",
    "lab.policy",
    "lab.topology",
    "sim.cost.model",
    "sim.layerwise",
    "sim.links",
    "sim.moves",
)
"""What else decides what is compiled: how, and what it is compiled against."""

_ROOT = Path(__file__).resolve().parents[2]


def source(name: str) -> Path:
    """The file of one of Diptych's modules."""
    return _ROOT.joinpath(*name.split(".")).with_suffix(".py")


def home(environment: Mapping[str, str]) -> Path:
    """Where compiled code is kept, one folder for each source that it was made of."""
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "diptych" / "compiled"


def digest() -> str:
    """What names the code that this source and this Python make."""
    seen = hashlib.blake2b(f"{sys.implementation.cache_tag} {EXTENSION_SUFFIXES[0]}".encode(), digest_size=12)
    for name in (*MODULES, *_BESIDE):
        seen.update(hashlib.blake2b(source(name).read_bytes(), digest_size=16).digest())
    return seen.hexdigest()


class _Finder:
    """Finds compiled modules before Python finds their source."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _NAMES and not name.endswith("__mypyc"):
            return None
        from importlib.util import spec_from_file_location

        file = self._folder.joinpath(*name.split(".")).with_suffix(EXTENSION_SUFFIXES[0])
        return spec_from_file_location(name, file) if file.exists() else None


_NAMES = frozenset(MODULES)


def use(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Let imports find compiled modules, if there are any of this very source; returns where."""
    folder = home(environment)
    if environment.get("DIPTYCH_COMPILED", "1") == "0" or not folder.is_dir():
        return None
    try:
        folder /= digest()
    except OSError:  # no source beside the packages: nothing to compare with
        return None
    if not folder.is_dir():
        return None
    sys.meta_path.insert(0, _Finder(folder))
    return folder


def in_use() -> bool:
    """Whether this process decides by compiled code."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)
