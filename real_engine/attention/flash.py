"""Paged attention by flash-attn 2, on CUDA. Data plane; request path.

Prompt chunks, alone or mixed with decodes, go through the variable-length function; a batch of decodes alone through
the one made for a cache, which splits long contexts over the processors (Dao, arXiv:2307.08691). Both take the step's
metadata as it is. The functions are handed in, so that `flash_reference.py` can stand in for them on a CPU.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from real_engine.attention.backend import DecodeRows, PackedBatch
from real_engine.attention.flash_reference import PAGE_MULTIPLE, RELEASE
from real_engine.attention.store import Store, rotate_and_store
from real_engine.device import upload
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.config import PLAIN, AttentionRule
from real_engine.models.rope import RopeTable

NO_WINDOW = (-1, -1)


@dataclass(frozen=True, slots=True)
class FlashFunctions:
    """flash-attn's own, or others that mean the same."""

    varlen: Callable[..., Tensor]
    """`flash_attn_varlen_func`."""
    kvcache: Callable[..., Tensor]
    """`flash_attn_with_kvcache`."""


class FlashAttention:
    """Implements `AttentionBackend` and `GraphableAttention`."""

    name = "flash-attn-2"
    block_size_multiple = PAGE_MULTIPLE
    abilities = frozenset(("window", "softcap"))

    def __init__(self, functions: FlashFunctions, store: Store = rotate_and_store) -> None:
        self._functions, self._store = functions, store

    def prepare(self, batch: PackedBatch, memory: KvMemory) -> FlashPrepared:
        counts = np.diff(batch.cu_seqlens_q)
        most = int(counts.max())
        ends = np.zeros(len(batch.seqlens_k) + 1, np.int32)
        np.cumsum(batch.seqlens_k, out=ends[1:])
        positions, slots, starts, contexts, lengths, table = upload(
            memory.device,
            batch.positions,
            batch.slot_mapping,
            batch.cu_seqlens_q.astype(np.int32, copy=False),
            ends,
            batch.seqlens_k.astype(np.int32, copy=False),
            batch.block_table.astype(np.int32, copy=False),
        )
        rows = DecodeRows(positions, slots, lengths, table)
        if most == 1:
            return FlashPrepared(self._functions, self._store, memory, rows, None)
        chunks = _Chunks(starts, contexts, most, int(batch.seqlens_k.max()))
        return FlashPrepared(self._functions, self._store, memory, rows, chunks)

    def prepare_static(self, rows: DecodeRows, memory: KvMemory) -> FlashPrepared:
        return FlashPrepared(self._functions, self._store, memory, rows, None)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """What the variable-length function wants besides."""

    starts: Tensor
    """int32 `[S + 1]`: sums of new tokens."""
    contexts: Tensor
    """int32 `[S + 1]`: sums of context lengths."""
    longest: int
    longest_context: int


class FlashPrepared:
    """Implements `PreparedAttention`."""

    def __init__(
        self,
        functions: FlashFunctions,
        store: Store,
        memory: KvMemory,
        rows: DecodeRows,
        chunks: _Chunks | None,
    ) -> None:
        self._functions, self._store, self._memory = functions, store, memory
        self._rows, self._chunks = rows, chunks

    def forward(self, layer: int, qkv: Tensor, rope: RopeTable | None, rule: AttentionRule = PLAIN) -> Tensor:
        keys, values = self._memory.keys[layer], self._memory.values[layer]
        rows, chunks = self._rows, self._chunks
        q = self._store(qkv, rope, rows.positions, rows.slots, keys, values)
        how: dict[str, Any] = {
            "softmax_scale": rule.scale or 1 / math.sqrt(q.shape[-1]),
            "causal": True,
            # flash-attn counts the tokens before a query, the rule the query's own too.
            "window_size": NO_WINDOW if rule.window is None else (rule.window - 1, 0),
            "softcap": rule.softcap or 0.0,
            "block_table": rows.table,
        }
        if chunks is None:
            out = self._functions.kvcache(
                q.unsqueeze(1),  # [sequences, 1, heads, head_dim]
                keys,
                values,
                cache_seqlens=rows.lengths,
                **how,
            )
        else:
            out = self._functions.varlen(
                q,
                keys,
                values,
                cu_seqlens_q=chunks.starts,
                cu_seqlens_k=chunks.contexts,
                max_seqlen_q=chunks.longest,
                max_seqlen_k=chunks.longest_context,
                **how,
            )
        return out.reshape(len(qkv), -1)


USED = {
    "flash_attn_varlen_func": (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "block_table",
    ),
    "flash_attn_with_kvcache": (
        "cache_seqlens",
        "block_table",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
    ),
}
"""Keywords that `FlashPrepared` passes: what an installed flash-attn must know."""


def unsuited(shape: KvShape, device: torch.device) -> str:
    """Why flash-attn 2 can't serve this cache here; empty if it can, as far as is known without importing it."""
    if device.type != "cuda":
        return f"the device is {device.type}; flash-attn runs on CUDA"
    if find_spec("flash_attn") is None:
        return "flash-attn isn't installed: pip install flash-attn --no-build-isolation"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere, which flash-attn 2 begins with"
    return unsuited_shape(shape)


def unsuited_shape(shape: KvShape) -> str:
    """What of a cache's shape stands against flash-attn 2; empty if nothing."""
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"the KV cache is {str(shape.dtype).removeprefix('torch.')}; flash-attn takes bfloat16"
    if shape.head_dim > 256 or shape.head_dim % 8:
        return f"the head size is {shape.head_dim}; flash-attn takes multiples of 8 up to 256"
    if shape.block_size % PAGE_MULTIPLE:
        return f"kv.block_size is {shape.block_size}; flash-attn takes multiples of {PAGE_MULTIPLE}"
    return ""


def installed() -> tuple[FlashFunctions | None, str]:
    """flash-attn's functions, or why they can't be used: absent, broken, or no longer as they were."""
    try:
        package = importlib.import_module("flash_attn")
        functions = {name: getattr(package, name) for name in USED}
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return None, f"flash-attn doesn't import: {str(error).strip().partition(chr(10))[0]}"
    for name, function in functions.items():
        missing = [word for word in USED[name] if word not in inspect.signature(function).parameters]
        if missing:
            version = getattr(package, "__version__", "?")
            return None, f"{name} of flash-attn {version} has no {', '.join(missing)}; {RELEASE} has"
    return FlashFunctions(*functions.values()), ""


def triton_store() -> tuple[Store, str]:
    """The Triton kernel, or plain torch with the reason."""
    if find_spec("triton") is None:
        return rotate_and_store, "triton isn't installed"
    from real_engine.attention import triton_store as kernel

    return kernel.rotate_and_store, ""
