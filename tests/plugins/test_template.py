"""The plug-in template: installs, is found by name, keeps its contracts, and runs on both backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.analysis import load
from tests.experiment.command import QUICK, run
from tests.plugins.installed import install

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "experiments" / "plugin_template"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(TEMPLATE, tmp_path_factory.mktemp("template"))


def test_the_templates_own_tests_pass(site: Path) -> None:
    path = os.pathsep.join((str(ROOT), str(site)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TEMPLATE / "tests")],
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@pytest.mark.parametrize("backend", ["sim", "real"])
def test_its_policies_run_by_name_on_both_backends(backend: str, site: Path, tmp_path: Path) -> None:
    path = os.pathsep.join((str(ROOT), str(site)))
    words = [
        f"backend={backend}",
        "model=tiny",
        "policy=newest_first",
        "policy.width=2",
        "eviction=any_block",
    ]
    # All arrive at once: a quick engine would have done with one before the next came.
    words += ["kv.blocks=16", "run.dir=out", *QUICK, "trace.rate=10000"]
    done = run(words, tmp_path, extra={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "name: newest_first\n  width: 2" in config
    run_ = load(tmp_path / "out")
    assert list(run_.requests["outcome"]) == ["finished"] * 12
    assert run_.steps["running"].max() == 2


def test_help_lists_what_it_adds(site: Path, tmp_path: Path) -> None:
    path = os.pathsep.join((str(ROOT), str(site)))
    done = run(["policy=newest_first", "--help"], tmp_path, extra={"PYTHONPATH": path})
    assert "newest_first" in done.stdout
    assert "Of those that wait, the latest arrival first." in done.stdout
    assert "policy.width=64" in done.stdout
