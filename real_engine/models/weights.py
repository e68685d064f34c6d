"""Weights out of safetensors files, each checked against the shape the configuration implies. Data plane."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lab.errors import ModelError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Weights(Protocol):
    """Where a decoder's tensors come from."""

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name and exactly this shape. Raises `ModelError`."""
        ...


class TensorWeights:
    """Weights that are in memory already. `where` names them in errors."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._tensors, self._where = tensors, where

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self._tensors:
            raise ModelError(f"{self._where} has no tensor {name}")
        return _checked(self._tensors[name], name, shape, self._where)


class CheckpointWeights:
    """Weights of a model directory: `model.safetensors`, or shards listed in its index. Read when taken."""

    def __init__(self, directory: Path) -> None:
        """Opens every file, so that a missing or truncated one is known before anything is computed."""
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        self._files: dict[str, tuple[Path, Any]] = {}
        if single.exists():
            paths = [single]
        elif index.exists():
            paths = _shards(index)
        else:
            raise ModelError(
                f"no weights in '{directory}': expected model.safetensors, or its index and shards"
            )
        for path in paths:
            file = _open(path)
            self._files.update(dict.fromkeys(file.keys(), (path, file)))
        self._directory = directory

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self._files:
            raise ModelError(f"'{self._directory}' has no tensor {name}")
        path, file = self._files[name]
        return _checked(file.get_tensor(name), name, shape, f"'{path}'")

    def check_floats(self, wanted: Callable[[str], bool]) -> None:
        """Raises `ModelError` for a tensor among the `wanted` names whose type we don't load."""
        for name, (path, file) in self._files.items():
            found = file.get_slice(name).get_dtype()
            if wanted(name) and found not in ("F32", "F16", "BF16"):
                raise ModelError(
                    f"tensor {name} of '{path}' is of type {found}; expected float32, float16 or bfloat16"
                )


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...], where: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"tensor {name} of {where} has shape {tuple(tensor.shape)}; by config.json expected {shape}"
        )
    if tensor.dtype not in _FLOATS:
        raise ModelError(
            f"tensor {name} of {where} is of type {tensor.dtype}; expected float32, float16 or bfloat16"
        )
    return tensor


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"'{index}' isn't a readable index of safetensors shards: {error!r}") from error
    return [index.parent / name for name in sorted(names)]


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ModelError(f"no weights file '{path}'") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weights file '{path}' is truncated or not safetensors: {error}") from error
