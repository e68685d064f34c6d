"""Matrix products with packed weights. Data plane; request path.

Packing a weight once, in the layout a GEMM wants, halves the time of a decode step. Our own product reads a weight
for all rows in one pass and is the faster one where the processor multiplies bfloat16 itself; else oneDNN's is used.
Its two operators are torch's own (its compiler emits them) but private, so their absence means the plain product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from real_engine.native.library import Kernels, Packed, pack


def packed_available() -> bool:
    """Whether this torch has the packed product for CPU."""
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
    )


class Linear:
    """`x @ weight.T + bias` for `x` `[rows, in]` and `weight` `[out, in]`; gives `[rows, out]`.

    The weight is packed once, by `use` or when it is first needed, and only the packed copy is kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.native: Packed | None = None
        """The weight as our own kernels want it, where they compute this product."""
        self._product: Callable[[Tensor, torch.dtype], Tensor] | None = None

    def use(self, kernels: Kernels, *, int8: bool = False) -> bool:
        """Compute with `kernels` from now on; False, and nothing changes, if the weight doesn't suit them."""
        packed = pack(self.weight, int8=int8) if kernels.has_products else None
        if packed is None:
            return False
        self.native, self.weight = packed, self.weight[:0]
        self._product = lambda x, dtype: kernels.product(x, packed, self.bias, dtype)
        return True

    @property
    def quantized(self) -> bool:
        return self.native is not None and self.native.scale is not None

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype`: of the result, where it is not `x`'s."""
        if self._product is None:
            self._product = self._packed() if packed_available() and x.device.type == "cpu" else self._plain
        return self._product(x, dtype or x.dtype)

    def _plain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(x, self.weight, self.bias).to(dtype)

    def _packed(self) -> Callable[[Tensor, torch.dtype], Tensor]:
        weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())
        self.weight = self.weight[:0]
        product, bias = torch.ops.mkldnn._linear_pointwise.default, self.bias
        return lambda x, dtype: product(x, weight, bias, "none", [], "").to(dtype)
