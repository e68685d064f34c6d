"""Diptych's ground floor: control plane, observation, analysis and the commands.

Importing this package costs next to nothing; see `lab/policy.py` for what a plug-in author needs.
"""

from __future__ import annotations

from lab.compiled import use as _use_compiled

__version__ = "0.1.0"

SIBLINGS = ("lab", "sim", "real_engine", "policies", "traces")
"""Diptych's own top-level packages. Other distributions install a `lab` or a `traces` too."""


def shadowed() -> list[str]:
    """One sentence for each of `SIBLINGS` that Python would import from somewhere else than this checkout."""
    import importlib.util
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    found = []
    for name in SIBLINGS:
        spec = importlib.util.find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        places = [Path(folder).resolve() for folder in folders] or [
            Path(spec.origin).resolve() for spec in [spec] if spec and spec.origin
        ]
        if not places:
            found.append(f"package '{name}' is missing: expected it in {root}.")
        elif any(place.parent != root for place in places):
            found.append(
                f"package '{name}' is shadowed: Python finds {places[0]}, expected {root / name}. Another "
                f"distribution has a top-level '{name}' too; uninstall it, or run from {root}."
            )
    return found


_use_compiled()
