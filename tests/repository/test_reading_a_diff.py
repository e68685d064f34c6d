"""docs/reading-a-diff.md, done as it says: every command run, every quoted line looked for, its pictures made again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reading-a-diff.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def test_its_pictures_are_there_and_small() -> None:
    pictures = [ROOT / "docs" / name for name in re.findall(r"\]\((pictures/[^)]+)\)", PAGE.read_text())]
    assert len(pictures) == 2
    assert sum(path.stat().st_size for path in pictures) < 200_000


@pytest.mark.slow
def test_every_block_of_the_page_does_what_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "sim").symlink_to(ROOT / "sim")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def sh(line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    said, quoted = "", 0
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "sh":
            said = "".join(sh(line) for line in text.strip().splitlines())
        elif kind == "python":
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text)
            printed = sh(f"python {name}").split()
            assert float(printed[0]) == pytest.approx(-84.366, abs=0.001)
            assert "'residual_map'," in printed
        else:
            for line in text.strip().splitlines():
                assert line in said, f"'{line}' is not in\n{said}"
                quoted += 1
    assert quoted == 7
    text = PAGE.read_text().partition("`diff.json` has these keys")[2]
    told = {key for row in re.findall(r"^\| (`.*?) \|", text, re.M) for key in re.findall(r"`(\w+)`", row)}
    assert told == set(json.loads((tmp_path / "difference" / "diff.json").read_text()))
    assert (tmp_path / "difference.html").stat().st_size > 100_000
    for name in ("attribution", "residuals"):
        kept = matplotlib.image.imread(ROOT / "docs" / "pictures" / f"diff-{name}.png")
        made = matplotlib.image.imread(tmp_path / "difference" / f"{name}.png")
        assert kept.shape == made.shape
        assert np.abs(kept - made).mean() < 0.01
