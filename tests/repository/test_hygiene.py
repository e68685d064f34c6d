"""What must not, and what must, stand in the repository's files."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Joined here, so that this file doesn't hold what it looks for.
FOLDERS = "|".join(("ro" + "ot", "wo" + "rk", "ho" + "me", "Us" + "ers"))
PRIVATE = re.compile(rf"(?<![\w.~$}}-])/(?:{FOLDERS})/\w")
HOSTS = re.compile(
    r"pypi\.(?:org|python)|pythonhosted|registry\.npm|whl/c[pu]|index-url|find-links|deb\.debian".replace(
        "-", "[-]"
    )
)


def texts() -> list[tuple[Path, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the repository's own files")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__).resolve():
            try:
                found.append((Path(name), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return found


@pytest.mark.parametrize("pattern", [PRIVATE, HOSTS], ids=["path of one machine", "package registry"])
def test_no_file_names_a_place_that_only_one_machine_has(pattern: re.Pattern[str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert PRIVATE.search("x = '/" + "root/data'")
    assert HOSTS.search("--index" + "-url https://example.invalid")
    assert not PRIVATE.search("$HOME/.cache/home/x and ~/work/x")


def locked() -> dict[str, str]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([\w.]+)", line)
        assert match, f"constraints.txt has '{line}'; expected name==version"
        found[canonicalize_name(match[1])] = match[2]
    return found


def test_the_lock_has_one_version_within_range_for_every_requirement_of_an_installed_set() -> None:
    extras = PROJECT["optional-dependencies"]
    pins = locked()
    for text in [*PROJECT["dependencies"], *extras["engine"], *extras["test"]]:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} excludes the locked {pin}"


def test_the_base_install_has_no_engine() -> None:
    base = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    engine = {
        canonicalize_name(Requirement(text).name) for text in PROJECT["optional-dependencies"]["engine"]
    }
    assert not base & engine
    assert "torch" in engine


def test_every_package_is_typed() -> None:
    for package in ("lab", "sim", "real_engine", "policies", "traces"):
        assert (ROOT / package / "__init__.py").is_file()
        assert (ROOT / package / "py.typed").is_file()
