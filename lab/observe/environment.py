"""Where a run took place: what the machine and the checkout are, never what came out. Observation path."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import compiled, installed

PACKAGES = (
    "hydra-core",
    "numpy",
    "omegaconf",
    "opentelemetry-sdk",
    "pandas",
    "pyarrow",
    "safetensors",
    "simpy",
    "tokenizers",
    "torch",
    "transformers",
)
_REVISION = "# branch.oid "
_CHECKOUT = Path(__file__).resolve().parents[2]


def environment(argv: Sequence[str], **more: Any) -> dict[str, Any]:
    """The content of `environment.json`. Imports nothing: torch is asked only if the run has loaded it."""
    revision, dirty = git_state(_CHECKOUT)
    found: dict[str, Any] = {
        "argv": list(argv),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := installed.version(name))},
        "compiled": compiled.in_use(),
        "git": {"revision": revision, "dirty": dirty},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = {"version": str(torch.__version__), "threads": torch.get_num_threads()}
    return found | more


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """(revision, has uncommitted changes) of a checkout; (None, None) when it is none or git is missing."""
    if not (root / ".git").exists():
        return None, None
    told = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(told, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if done.returncode:
        return None, None
    lines = done.stdout.splitlines()
    revision = next(
        (line.removeprefix(_REVISION) for line in lines if line.startswith(_REVISION)), "(initial)"
    )
    return None if revision == "(initial)" else revision, any(not line.startswith("#") for line in lines)


def cpu_model() -> str:
    """The processor's name, as well as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or platform.machine()
