"""docs/write-a-policy.md, done as it says: every file written, every command run, every output looked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab import compose
from lab.testing import check_policy
from tests.plugins.installed import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "write-a-policy.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def test_the_policies_of_the_page_do_in_the_kit_what_the_page_says(tmp_path: Path) -> None:
    versions = [text for kind, text in BLOCK.findall(PAGE.read_text()) if kind == "python"]
    found = []
    for number, text in enumerate(t for t in versions if t.startswith(("# mine.py", "# mru.py"))):
        path = tmp_path / f"v{number}.py"
        path.write_text(text)
        report = check_policy(str(path), examples=8)
        found.append([problem.contract for problem in report.problems] or len(report.advice))
    assert found == [["progress"], 1, 0, 0]


def test_every_option_of_the_page_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in ((text.partition("\n")[0][2:], text) for _, text in BLOCK.findall(PAGE.read_text())):
        if name in ("mine.py", "mru.py"):
            (tmp_path / name).write_text(text)
    commands = re.findall(r"^python -m lab\.experiment (.+=.+)$", PAGE.read_text(), re.M)
    with compose.composer() as composer:
        for line in commands:
            words = [w for w in line.replace("=shortest_prompt", "=./mine.py").split() if w != "-m"]
            for job in composer.jobs(words, sweep=True):
                composer.config(job)
    assert len(commands) == 7


@pytest.mark.slow
def test_every_block_of_the_page_does_what_the_page_says(tmp_path: Path) -> None:
    site = tmp_path / "site"
    env = {
        **os.environ,
        **OFFLINE,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{site}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_TARGET": str(site),  # the environment the tests run in stays as it is
    }
    said, kinds = "", []
    for kind, text in BLOCK.findall(PAGE.read_text()):
        kinds.append(kind)
        if kind in ("python", "toml"):
            name = text.partition("\n")[0].removeprefix("# ")
            assert re.fullmatch(r"[\w/]+\.(py|toml)", name), text
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        elif kind == "sh":
            said = ""
            for line in text.strip().splitlines():
                done = subprocess.run(
                    ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
                )
                assert done.returncode == ("# exits with 1" in line), f"{line}\n{done.stdout}{done.stderr}"
                assert "Traceback" not in done.stderr, done.stderr
                said += done.stdout
        else:
            assert kind == "text"
            for line in text.strip().splitlines():
                assert line in said, f"'{line}' is not in\n{said}"
    assert (kinds.count("sh"), kinds.count("python")) == (10, 6)
    assert (tmp_path / "fcfs-mine.png").stat().st_size > 20_000
    assert {"0", "1"} <= {path.name for path in (tmp_path / "sweep").iterdir()}
    assert (tmp_path / "named" / "_SUCCESS").exists()
