"""Installing a package for a test: without a network, and beside the environment, not into it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_DEPS": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # pip reads "0" as "no isolation"
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


def install(package: Path, scratch: Path) -> Path:
    """Build a copy of `package` and install it into a directory for PYTHONPATH."""
    copy, site = scratch / "source", scratch / "site"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", "install", *words], check=True, capture_output=True)
    return site
