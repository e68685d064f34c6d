"""All layers of a decoder in one call of the kernels. Data plane; request path.

What stack.h reads: addresses of weights and of the cache, once a model, and of a step's arrays, once a step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from real_engine.models.config import AttentionRule, DecoderConfig
from real_engine.models.linear import Linear
from real_engine.models.rope import RopeTable
from real_engine.native.library import PANEL, Kernels, WeightStruct

if TYPE_CHECKING:
    from real_engine.attention.native_cpu import NativePrepared
    from real_engine.kv_memory import KvMemory

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


def _fields(
    kind: type[ctypes._SimpleCData[Any]], names: str
) -> list[tuple[str, type[ctypes._SimpleCData[Any]]]]:
    return [(name, kind) for name in names.split()]


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(_POINTER, "attention_norm mlp_norm qkv_bias"),
        *((name, WeightStruct) for name in ("qkv", "output", "gate_up", "down")),
        *_fields(_POINTER, "keys values"),
        *_fields(_INT, "window"),
        *_fields(_FLOAT, "scale"),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *_fields(_POINTER, "cos sin"),
        *_fields(_INT, "depth hidden heads kv_heads dim inner block_size"),
        *_fields(_FLOAT, "eps"),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *_fields(
            _POINTER, "x normed qkv attended activated bytes scales positions slots starts lengths table"
        ),
        *_fields(ctypes.c_int64, "table_stride"),
        *_fields(_INT, "tokens sequences"),
    )


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One layer: the weights of its norms (before attention, before the feed-forward block), its products (qkv, output,
    gate and up, down), and how it attends."""

    norms: tuple[Tensor, Tensor]
    products: tuple[Linear, ...]
    rule: AttentionRule

    @property
    def suits(self) -> bool:
        """Whether our own kernels compute all of it; only the first product may have a bias."""
        plain = all(product.bias is None for product in self.products[1:])
        native = all(product.native is not None for product in self.products)
        alike = len({product.quantized for product in self.products}) == 1
        return plain and native and alike and not self.rule.needs - {"window"}


class Stack:
    """The layers of a Llama-shaped decoder in bfloat16. Each layer `suits`, and heads have a multiple of 32 numbers."""

    def __init__(
        self, kernels: Kernels, config: DecoderConfig, layers: Sequence[StackLayer], rope: RopeTable
    ) -> None:
        assert all(layer.suits for layer in layers)
        assert config.head_dim % PANEL == 0
        self._kernels, self._config, self._layers, self._rope = kernels, config, layers, rope
        self._memory: KvMemory | None = None
        self._model = _Model()
        self._rows = 0
        self._room: tuple[Tensor | None, ...] = ()

    def forward(self, x: Tensor, attention: NativePrepared) -> Tensor:
        """The residual stream `[tokens, hidden]` after the last layer, in place of `x`; keys and values are stored."""
        if attention.memory is not self._memory:
            self._aim(attention.memory)
        if len(x) > self._rows:
            self._make_room(len(x))
        arrays = (attention.positions, attention.slots, attention.starts, attention.lengths, attention.table)
        addresses = (None if t is None else t.data_ptr() for t in (x, *self._room, *arrays))
        step = _Step(*addresses, attention.table.stride(0), len(x), len(attention.lengths))
        self._kernels.stack(ctypes.byref(self._model), ctypes.byref(step), torch.get_num_threads())
        return x

    def _aim(self, memory: KvMemory) -> None:
        """At this cache: the addresses that stay the same from step to step."""
        c = self._config
        layers = (_Layer * c.layers)()
        for number, layer in enumerate(self._layers):
            bias = layer.products[0].bias
            added = bias.data_ptr() if bias is not None else None
            norms = (norm.data_ptr() for norm in layer.norms)
            products = (product.native.struct for product in layer.products if product.native is not None)
            weights = (*norms, added, *products)
            cache = (memory.keys[number].data_ptr(), memory.values[number].data_ptr())
            rule = layer.rule
            scale = rule.scale or 1 / math.sqrt(c.head_dim)
            layers[number] = _Layer(*weights, *cache, rule.window or 0, scale)
        sizes = (c.layers, c.hidden_size, c.heads, c.kv_heads, c.head_dim, c.intermediate_size)
        tables = (self._rope.cos.data_ptr(), self._rope.sin.data_ptr())
        self._model = _Model(layers, *tables, *sizes, memory.shape.block_size, c.norm_eps)
        self._memory = memory

    def _make_room(self, rows: int) -> None:
        c = self._config
        wide = (c.heads + 2 * c.kv_heads) * c.head_dim
        widths = (c.hidden_size, wide, c.heads * c.head_dim, c.intermediate_size)
        room: list[Tensor | None] = [torch.empty((rows, width), dtype=torch.bfloat16) for width in widths]
        quantized = any(product.quantized for layer in self._layers for product in layer.products)
        room.append(torch.empty((rows, max(widths)), dtype=torch.uint8) if quantized else None)
        room.append(torch.empty(rows) if quantized else None)
        self._room = tuple(room)
        self._rows = rows
