"""The Triton kernel without a GPU: in a process of its own, since Triton reads the variable when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from real_engine.attention.store import rotate_and_store
from real_engine.models.config import Rope
from real_engine.models.rope import RopeTable, rotate


def script(name: str, **environment: str) -> str:
    """What one of the scripts beside this file says."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(name))],
        env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_it_rotates_and_stores_under_the_interpreter() -> None:
    assert script("triton_interpreted.py", TRITON_INTERPRET="1") == "12 shapes agree"


def test_it_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    assert script("triton_compiled.py", TRITON_CACHE_DIR=str(tmp_path)) == "compiled for (80, 90)"


def test_without_triton_plain_torch_does_the_same_and_skips_rows_without_a_slot() -> None:
    qkv, rope = torch.randn(4, 5, 8), RopeTable(Rope(), 8, 9, torch.float32)
    positions, slots = torch.tensor([3, 0, 8, 1]), torch.tensor([5, -1, 2, -1])
    keys, values = torch.full((2, 4, 1, 8), 9.0), torch.full((2, 4, 1, 8), 9.0)
    queries = rotate_and_store(qkv, rope, positions, slots, keys, values)
    turned = rotate(qkv[:, :4], *rope.at(positions))
    assert torch.equal(queries, turned[:, :3])
    for row, slot in ((0, 5), (2, 2)):
        assert torch.equal(keys.view(8, 8)[slot], turned[row, 3])
        assert torch.equal(values.view(8, 8)[slot], qkv[row, 4])
    untouched = [0, 1, 3, 4, 6, 7]
    assert (keys.view(8, 8)[untouched] == 9).all()
    assert (values.view(8, 8)[untouched] == 9).all()
