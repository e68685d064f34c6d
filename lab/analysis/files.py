"""Writing a result so that a reader sees all of it or none. Observation path."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lab.errors import RunError


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it. Raises `RunError` when that can't be done."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise RunError(f"can't write '{path}': {error.strerror or error}") from error
