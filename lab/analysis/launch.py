"""An experiment started from a notebook: the command's own words, its run opened. Observation path.

run = launch("backend=sim", "policy=sjf", "run.dir=runs/sjf")
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from lab.analysis.runs import Run, load
from lab.errors import ConfigError, RunError


def launch(*words: str) -> Run:
    """`python -m lab.experiment WORDS`, quietly; `words` say `run.dir=DIR`, and an earlier run there is replaced.

    For backend=both the real side is returned; the other lies beside it. Raises `RunError` with what the command
    complained of.
    """
    from lab.experiment import main

    folder = next((word.partition("=")[2] for word in words if word.startswith("run.dir=")), "")
    if not folder:
        raise ConfigError("launch() needs to know where the run goes; expected a word run.dir=DIR.")
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(list(words))
    if code:
        complaint = said.getvalue().strip().splitlines() or [f"exit code {code}"]
        raise RunError(complaint[-1].removeprefix("error: "))
    real = Path(folder) / "real"
    return load(real if real.is_dir() else folder)
