"""flash-attn's two functions in plain torch: same signatures, same meaning, any device. Data plane; request path.

So that every caller of flash-attn runs on a machine without a GPU, and a real one has something to be compared with. It
refuses what the released kernels refuse (`csrc/flash_attn/flash_api.cpp`), except float32, which makes it exact enough
to compare tokens with. Sequences go one by one: for checking, not for speed.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

RELEASE = "2.8.3.post2"
"""The flash-attn whose source these signatures were read from."""

PAGE_MULTIPLE = 256
"""Its paged cache takes blocks of a multiple of this many tokens only."""

SIGNATURES = {
    "flash_attn_varlen_func": (
        "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None)"
    ),
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False)"
    ),
}
"""As that release declares them."""


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Packed sequences `q` `[tokens, heads, head_dim]` attend to `k` and `v`: packed as well, `[keys, kv_heads,
    head_dim]`, or with a block table the cache, `[blocks, block_size, kv_heads, head_dim]`. Gives `q`'s shape."""
    _only(dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None), probs=(return_attn_probs, False))
    sequences = len(cu_seqlens_q) - 1
    _int32(cu_seqlens_q, "cu_seqlens_q", (sequences + 1,))
    _int32(cu_seqlens_k, "cu_seqlens_k", (sequences + 1,))
    if block_table is not None:
        _paged(k, v, block_table, sequences)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    longest = (_longest(queries), _longest(keys))
    if longest[0] > max_seqlen_q or longest[1] > max_seqlen_k or queries[-1] != len(q):
        raise ValueError(
            f"{len(q)} queries in sequences up to {longest[0]} over keys up to {longest[1]}; said were "
            f"{queries[-1]}, {max_seqlen_q} and {max_seqlen_k}"
        )
    out = torch.empty_like(q)
    for i in range(sequences):
        mine = slice(queries[i], queries[i + 1])
        if block_table is None:
            context_k, context_v = (x[keys[i] : keys[i + 1]] for x in (k, v))
        else:
            context_k, context_v = (_gathered(x, block_table[i], keys[i + 1] - keys[i]) for x in (k, v))
        out[mine] = _attend(q[mine], context_k, context_v, softmax_scale, causal, window_size, softcap)
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """`q` `[sequences, new tokens, heads, head_dim]` attend to the cache's first `cache_seqlens` tokens of each
    sequence, found through `block_table`. Gives `q`'s shape; zeros where the length is 0."""
    _only(k=(k, None), v=(v, None), rotary_cos=(rotary_cos, None), rotary_sin=(rotary_sin, None))
    _only(cache_batch_idx=(cache_batch_idx, None), cache_leftpad=(cache_leftpad, None))
    _only(alibi_slopes=(alibi_slopes, None), return_softmax_lse=(return_softmax_lse, False))
    if cache_seqlens is None or block_table is None:
        raise ValueError("this reference of flash_attn_with_kvcache needs cache_seqlens and block_table")
    _int32(cache_seqlens, "cache_seqlens", (len(q),))
    _paged(k_cache, v_cache, block_table, len(q))
    out = torch.empty_like(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        context_k, context_v = (_gathered(x, block_table[i], length) for x in (k_cache, v_cache))
        out[i] = _attend(q[i], context_k, context_v, softmax_scale, causal, window_size, softcap)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    """One sequence, `q` `[new, heads, dim]` over `k`, `v` `[length, kv_heads, dim]`. The last query stands at the last
    key; it sees keys from `window[0]` before its own to `window[1]` after it, -1 for no limit."""
    new, heads, dim = q.shape
    length, kv_heads = k.shape[:2]
    k, v = (x.float().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    own = torch.arange(length - new, length, device=q.device)[:, None]
    there = torch.arange(length, device=q.device)[None, :]
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones((new, length), dtype=torch.bool, device=q.device)
    if left >= 0:
        seen &= there >= own - left
    if right >= 0:
        seen &= there <= own + right
    scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a query that sees nothing gives zeros
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def _gathered(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """A sequence's first `length` tokens, `[length, kv_heads, head_dim]`."""
    size = cache.shape[1]
    return cache[blocks[: -(-length // size)].long()].reshape(-1, *cache.shape[2:])[:length]


def _longest(ends: list[int]) -> int:
    return max((b - a for a, b in pairwise(ends)), default=0)


def _only(**found: tuple[Any, Any]) -> None:
    for name, (value, expected) in found.items():
        if value is not expected and value != expected:
            raise ValueError(f"{name} is {value!r}; this reference of flash-attn knows {expected!r} only")


def _int32(x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if x.dtype != torch.int32 or tuple(x.shape) != shape or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)}; expected contiguous int32 {shape}, as flash-attn does"
        )


def _paged(k: Tensor, v: Tensor, table: Tensor, sequences: int) -> None:
    if table.dtype != torch.int32 or table.dim() != 2 or len(table) != sequences or table.stride(-1) != 1:
        raise ValueError(
            f"block_table is {table.dtype} {tuple(table.shape)}; expected int32, a row a sequence"
        )
    if k.shape != v.shape or k.dim() != 4 or k.shape[1] % PAGE_MULTIPLE:
        raise ValueError(
            f"the cache is {tuple(k.shape)} and {tuple(v.shape)}; expected blocks of a multiple of "
            f"{PAGE_MULTIPLE} tokens"
        )
