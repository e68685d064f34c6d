"""Between the matrix products: normalisation with its residual, and the gated activation. Data plane."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Ops(Protocol):
    """One way to compute them."""

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """`x += added`, in place, where there is something to add; then RMS norm of the rows `[tokens, hidden]`."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of rows `[gate, up]`: `[tokens, 2 * width]` to `[tokens, width]`."""
        ...


class TorchOps:
    """Plain torch."""

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if added is not None:
            x.add_(added)
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
