"""`python -m lab.compiled`: compile the control plane (`lab.compiled`), once for each change of its source."""

from __future__ import annotations

import sys
import time

from lab import compiled
from lab.errors import DiptychError


def main(words: list[str]) -> int:
    """Returns the exit status."""
    if words:
        print(f"'{words[0]}' was given; expected no words: python -m lab.compiled", file=sys.stderr)
        return 2
    from lab.compiled.build import build

    print(f"Compiling {len(compiled.MODULES)} modules of the control plane (a minute or so) ...", flush=True)
    began = time.monotonic()
    try:
        folder = build()
    except DiptychError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: ready after {time.monotonic() - began:.0f} s. DIPTYCH_COMPILED=0 does without it.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
