"""Imports point one way and stay lazy; a shadowed package is noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lab

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lab", "sim", "real_engine", "policies", "traces")
LIGHT = ("lab", "sim", "policies", "traces")
HEAVY = (
    "torch",
    "transformers",
    "pandas",
    "pyarrow",
    "seaborn",
    "scipy",
    "matplotlib",
    "gguf",
    "safetensors",
)


def python(*words: str, cwd: Path = ROOT, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def contracts(root: Path) -> subprocess.CompletedProcess[str]:
    run = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    return python("-c", run, "--no-cache", cwd=root, path=str(root))


def test_import_contracts_are_kept() -> None:
    done = contracts(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("where", "line", "broken"),
    [
        ("policies", "import lab.errors", "A policy imports lab.policy"),
        ("traces", "import lab.policy", "Traces import only"),
        ("lab", "import sim", "The ground floor"),
        ("sim", "import real_engine", "The two data planes"),
        ("sim", "def later():\n    import torch", "Only the real engine"),
    ],
)
def test_each_import_contract_can_be_broken(where: str, line: str, broken: str, tmp_path: Path) -> None:
    for package in PACKAGES:  # the smallest tree with our package names: it's the contracts that are tried
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    for module in ("policy.py", "errors.py", "control/__init__.py", "control/request.py"):
        (tmp_path / "lab" / module).parent.mkdir(exist_ok=True)
        (tmp_path / "lab" / module).touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert contracts(tmp_path).returncode == 0
    (tmp_path / where / "wrong.py").write_text(f"{line}\n")
    done = contracts(tmp_path)
    assert done.returncode != 0
    assert any(broken in row and "BROKEN" in row for row in done.stdout.splitlines()), done.stdout


def test_no_module_outside_the_real_engine_imports_anything_heavy() -> None:
    modules = []
    for package in LIGHT:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    code = (
        "import importlib, json, sys\nseen, found = set(), {}\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    new = {set(HEAVY)!r} & set(sys.modules) - seen\n"
        "    if new: found[name] = sorted(new)\n"
        "    seen |= new\n"
        "print(json.dumps(found))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(modules) > 20
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_help_needs_neither_hydra_nor_anything_heavy() -> None:
    code = (
        "import sys\nfrom lab.cli import main\ncode = main(lambda cfg: None, argv=['--help'])\n"
        f"assert code == 0\nunwanted = {{'hydra', 'omegaconf', 'simpy', 'numpy', *{HEAVY!r}}}\n"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_help_of_the_experiment_costs_about_a_second_of_cpu() -> None:
    import resource

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python("-m", "lab.experiment", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "policy" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) <= 1.5


def test_our_packages_come_from_one_place() -> None:
    assert lab.shadowed() == []
    assert set(lab.SIBLINGS) == set(PACKAGES)


def test_a_shadowed_package_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "__init__.py").write_text("raise SystemExit('the wrong one was imported')\n")
    code = "import sys\nfrom lab.cli import main\nsys.exit(main(lambda cfg: print('ran'), argv=[]))"
    done = python("-c", code, cwd=tmp_path, path=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"package 'traces' is shadowed: Python finds {tmp_path / 'traces'}" in done.stderr


def test_doctor_says_what_is_installed_and_what_is_shadowed(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "__init__.py").touch()
    done = python("-m", "lab.doctor", path=os.pathsep.join([str(tmp_path), str(ROOT)]), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("BAD  packages") and "'policies' is shadowed" in line for line in lines)
    assert any(line.startswith(" ok  hydra-core") for line in lines)
