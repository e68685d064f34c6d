"""An earlier run that is being replaced: whenever that ends half-way, what is left is known for what it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab.observe import claim
from lab.observe.claim import partial_reason, take
from tests.experiment.command import run

SMALL = ("backend=sim", "trace=poisson", "trace.n=5", "cost=reference")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("complete")
    done = run([*SMALL, "run.dir=out"], place)
    assert done.returncode == 0, done.stderr
    return place / "out"


@pytest.mark.parametrize("files", [1, 2, 3, 7, len(claim.FILES)])
def test_a_replacement_that_is_cut_short_leaves_a_partial_run_that_can_be_replaced(
    files: int, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(complete, tmp_path / "out"))
    assert partial_reason(path) is None
    unlink, left = Path.unlink, files

    def tired(self: Path, missing_ok: bool = False) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", tired)
    with pytest.raises(KeyboardInterrupt):
        take(path)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert partial_reason(path) == "it was being replaced by another run"
    take(path)
    assert [child.name for child in path.iterdir()] == [claim.PARTIAL]


def test_what_a_killed_run_was_writing_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / ".PARTIAL.4711.tmp").write_text("")
    take(tmp_path)
    assert not list(tmp_path.iterdir())
