"""`python -m lab.compiled`: compile the control plane (`lab.compiled`), once for each change of its source."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from lab import compiled
from lab.cli import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    about = "Make native code of the control plane, once for each change of it: the same decisions in half the time."
    argparse.ArgumentParser(prog="python -m lab.compiled", description=about).parse_args(argv)
    return guarded(_compile)


def _compile() -> None:
    from lab.compiled.build import build

    print(f"Compiling {len(compiled.MODULES)} modules of the control plane (a minute or so) ...", flush=True)
    began = time.monotonic()
    folder = build()
    print(f"{folder}: ready after {time.monotonic() - began:.0f} s. DIPTYCH_COMPILED=0 does without it.")


if __name__ == "__main__":
    sys.exit(main())
