"""What to load. Data plane; request path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model by name, and how to hold it.

    `name` is `smollm2`, `tiny`, a local directory or a hub id (`organisation/model`); `path`, if given, is a
    local directory and decides, while `name` only labels. `dtype` is `float32` or `bfloat16`. `seed` draws the
    weights of `tiny`. `threads` is how many CPU threads torch uses in this process from then on (None leaves
    its own choice). `device` is `cpu`, `cuda`, or `auto`: CUDA where there is some.
    """

    name: str = "smollm2"
    dtype: str = "bfloat16"
    seed: int = 0
    path: Path | None = None
    threads: int | None = None
    device: str = "cpu"
