"""The feed-forward block of a layer: one gated network, or a mixture of many. Data plane; request path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from real_engine.models.linear import Linear
from real_engine.models.ops import Ops


@dataclass(frozen=True, slots=True)
class Gated:
    """down(act(gate(x)) * up(x))."""

    gate_up: Linear
    down: Linear
    activation: Literal["silu", "gelu_tanh"] = "silu"

    @property
    def products(self) -> tuple[Linear, ...]:
        return (self.gate_up, self.down)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """`[tokens, hidden]` to the same."""
        gate_up = self.gate_up(x)
        if self.activation == "silu":
            return self.down(ops.silu_mul(gate_up))
        gate, up = gate_up.chunk(2, -1)
        return self.down(F.gelu(gate, approximate="tanh").mul_(up))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts behind a router (Shazeer et al., arXiv:1701.06538; as in Mixtral, arXiv:2401.04088).

    The reference path: expert by expert over the rows that chose it. Equal shares go to the experts that
    torch's top-k picks, which depends on the row alone.
    """

    router: Linear
    experts: Sequence[Gated]
    per_token: int
    renormalized: bool
    shared: tuple[Linear, Gated] | None = None
    """The gate and the network of the expert that every token goes to."""

    @property
    def products(self) -> tuple[Linear, ...]:
        networks = [*self.experts, *([self.shared[1]] if self.shared is not None else [])]
        return tuple(product for network in networks for product in network.products)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """`[tokens, hidden]` to the same."""
        shares, chosen = self.router(x).float().softmax(-1).topk(self.per_token)
        if self.renormalized:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number in sorted(set(chosen.flatten().tolist())):
            rows, rank = torch.where(chosen == number)
            found = self.experts[number].forward(x[rows], ops)
            out.index_add_(0, rows, (found * shares[rows, rank, None]).to(x.dtype))
        if self.shared is not None:
            gate, network = self.shared
            out += gate(x).sigmoid() * network.forward(x, ops)
        return out
