"""Fixtures of the trace tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def public_trace():
    """Path of a public trace by file name; skips when this machine has no copy."""
    root = Path(__file__).resolve().parents[2]
    shared = Path(os.environ.get("DIPTYCH_SHARED", root.parent / "shared"))

    def find(name: str) -> str:
        path = shared / "traces" / name
        if not path.is_file():
            pytest.skip(
                f"public trace {name} isn't at {path}; set DIPTYCH_SHARED to the folder above traces/"
            )
        return str(path)

    return find
