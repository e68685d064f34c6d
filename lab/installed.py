"""Which distributions are installed, by the names of their folders. Control plane; runs before a run begins.

`importlib.metadata` says the same in 30 ms: it parses what each says of itself, by the package for e-mail. Where
anything is installed in another way than pip's of today it is asked all the same.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple


class Installed(NamedTuple):
    """What a `sys.path` holds."""

    folders: dict[str, tuple[str, Path]]
    """By normalised name: version ("": its folder doesn't say), and the folder; the first on the path."""
    whole: bool
    """Whether that is all; not where there are archives or eggs."""


def version(package: str) -> str | None:
    """The version of a distribution; None where it isn't installed."""
    found = _look(tuple(sys.path))
    said, _ = found.folders.get(_normal(package), ("", None))
    if said or (found.whole and _normal(package) not in found.folders):
        return said or None
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def extended(prefix: str, own: str, path: tuple[str, ...]) -> bool:
    """Whether another distribution than `own` may have entry points in a group whose name begins with `prefix`."""
    found = _look(path)
    return not found.whole or any(
        f"[{prefix}" in _text(folder / "entry_points.txt")
        for name, (_, folder) in found.folders.items()
        if name != own
    )


@functools.cache  # looks at every folder on the path
def _look(path: tuple[str, ...]) -> Installed:
    folders: dict[str, tuple[str, Path]] = {}
    for place in path:
        try:
            names = sorted(os.listdir(place or "."))
        except OSError:  # nothing is there, or nobody may look
            continue
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix in (".dist-info", ".egg-info"):
                called, _, said = stem.partition("-")
                said = said if suffix == ".dist-info" else ""
                folders.setdefault(_normal(called), (said, Path(place, name)))
    return Installed(folders, not any(place.endswith(".egg") or os.path.isfile(place) for place in path))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
