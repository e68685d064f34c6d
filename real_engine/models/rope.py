"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split layout of Llama. Data plane."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from real_engine.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: float32 `[head_dim / 2]`."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        # 1 where the training length holds many turns (keep), 0 where it holds few (stretch by factor).
        turns = rope.original_max_position * frequencies / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope.factor)
    return frequencies


class RopeTable:
    """Cosines and signed sines of every position, made once: both `[positions, head_dim]`."""

    def __init__(
        self,
        rope: Rope,
        head_dim: int,
        positions: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        # Computed on the CPU whatever the device: every backend then turns by the same angles.
        half = torch.outer(torch.arange(positions).float(), inverse_frequencies(rope, head_dim))
        cosine, sine = half.cos(), half.sin()
        self.cos = torch.cat((cosine, cosine), -1).to(device, dtype)
        # The sign of "rotate half" sits in the table, so that applying it is one roll and two products.
        self.sin = torch.cat((-sine, sine), -1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin) of the packed tokens, each `[tokens, 1, head_dim]`; the same for every layer."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head of `x` `[tokens, heads, head_dim]` by its token's position."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
