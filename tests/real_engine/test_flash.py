"""The flash-attn path without a GPU: its signatures, a reference of the same meaning, and every caller on top of it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lab.control.core import EngineCore
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.errors import ExecutorError
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from real_engine.attention import flash_reference
from real_engine.attention.agreement import agrees
from real_engine.attention.flash import (
    USED,
    FlashAttention,
    FlashFunctions,
    installed,
    unsuited,
    unsuited_shape,
)
from real_engine.attention.flash_reference import PAGE_MULTIPLE, SIGNATURES
from real_engine.executor import TorchExecutor
from real_engine.kv_memory import KvShape
from real_engine.models.config import PLAIN, AttentionRule
from tests.real_engine.reference import assert_greedy, both, serve

REFERENCE = FlashFunctions(flash_reference.flash_attn_varlen_func, flash_reference.flash_attn_with_kvcache)
CPU = torch.device("cpu")


def plain(function: Any) -> str:
    """A signature without its types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def released(name: str) -> str | None:
    """The signature in flash-attn's own source: an sdist that FLASH_ATTN_SDIST names, or what is installed."""
    path = os.environ.get("FLASH_ATTN_SDIST", "")
    source = None
    if path:
        with tarfile.open(path) as archive:
            member = next(m for m in archive.getnames() if m.endswith("/flash_attn/flash_attn_interface.py"))
            file = archive.extractfile(member)
            assert file is not None
            source = file.read().decode()
    elif (spec := importlib.util.find_spec("flash_attn")) is not None and spec.origin is not None:
        source = (Path(spec.origin).parent / "flash_attn_interface.py").read_text()
    if source is None:
        return None
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for argument in node.args.args:
                argument.annotation = None
            return f"({ast.unparse(node.args)})"
    return "gone"


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_the_reference_has_the_signatures_that_are_written_down(name: str) -> None:
    assert plain(getattr(flash_reference, name)) == SIGNATURES[name]
    assert set(USED[name]) <= set(inspect.signature(getattr(flash_reference, name)).parameters)


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_they_are_those_of_the_released_source(name: str) -> None:
    found = released(name)
    if found is None:
        pytest.skip("neither flash-attn nor its sdist (FLASH_ATTN_SDIST) is here")
    assert found.replace(" ", "") == SIGNATURES[name].replace(" ", "")


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, softcap: float) -> Tensor:
    """Causal attention of one sequence token by token, in float64; `left` -1 for no window."""
    new, heads, _ = q.shape
    length, kv_heads = k.shape[:2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(new):
        place = length - new + row
        first = max(0, place - left) if left >= 0 else 0
        for head in range(heads):
            kv = head * kv_heads // heads
            if place < 0:
                continue
            scores = k[first : place + 1, kv].double() @ q[row, head].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[row, head] = scores.softmax(0) @ v[first : place + 1, kv].double()
    return out


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 9]), st.sampled_from([0, 1, 5, 250, 260, 520])),
        min_size=1,
        max_size=4,
    ),
    left=st.sampled_from([-1, 0, 3, 255, 1000]),
    softcap=st.sampled_from([0.0, 0.5, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_the_reference_is_causal_attention_through_block_tables(
    sequences: list[tuple[int, int]], left: int, softcap: float, seed: int
) -> None:
    # (new tokens, earlier ones); contexts of one to three blocks of 256, shuffled.
    generator = torch.Generator().manual_seed(seed)
    kv_heads, heads, dim = 2, 6, 8
    lengths = [new + earlier for new, earlier in sequences]
    each = [-(-length // PAGE_MULTIPLE) for length in lengths]
    order = torch.randperm(sum(each), generator=generator).to(torch.int32)
    keys, values = (
        torch.randn((sum(each), PAGE_MULTIPLE, kv_heads, dim), generator=generator) for _ in range(2)
    )
    table = torch.zeros((len(each), max(each)), dtype=torch.int32)
    for row, part in enumerate(order.split(each)):
        table[row, : len(part)] = part
    q = torch.randn((sum(new for new, _ in sequences), heads, dim), generator=generator)
    contexts = [
        tuple(x[table[i, : each[i]].long()].flatten(0, 1)[: lengths[i]] for x in (keys, values))
        for i in range(len(each))
    ]
    starts = torch.tensor([0, *[new for new, _ in sequences]]).cumsum(0).to(torch.int32)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    scale = 0.7 / math.sqrt(dim)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (left, 0),
        "softcap": softcap,
    }
    got = flash_reference.flash_attn_varlen_func(
        q, keys, values, starts, ends, int(starts.diff().max()), max(lengths), block_table=table, **options
    )
    for i, (k, v) in enumerate(contexts):
        mine = q[starts[i] : starts[i + 1]]
        wanted = written_out(mine, k, v, scale, left, softcap)
        torch.testing.assert_close(got[starts[i] : starts[i + 1]].double(), wanted, atol=1e-5, rtol=1e-5)
        alone = flash_reference.flash_attn_with_kvcache(
            mine[None],
            keys,
            values,
            cache_seqlens=torch.tensor([lengths[i]], dtype=torch.int32),
            block_table=table[i : i + 1],
            **options,
        )
        torch.testing.assert_close(alone[0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_more_queries_than_keys_are_aligned_at_the_end_and_blind_ones_give_zeros() -> None:
    # The example of flash-attn's own documentation: 5 queries, 2 keys.
    q, k, v = torch.randn(5, 1, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (5, 2)]
    out = flash_reference.flash_attn_varlen_func(q, k, v, *ends, 5, 2, causal=True)
    assert (out[:3] == 0).all()
    torch.testing.assert_close(out[3], v[0])
    empty = flash_reference.flash_attn_with_kvcache(
        q[:1, None],
        torch.randn(1, 256, 1, 8),
        torch.randn(1, 256, 1, 8),
        cache_seqlens=torch.zeros(1, dtype=torch.int32),
        block_table=torch.zeros((1, 1), dtype=torch.int32),
        causal=True,
    )
    assert (empty == 0).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_seqlens": torch.tensor([3])}, "cache_seqlens is torch.int64"),
        ({"block_table": torch.tensor([[0]])}, "block_table is torch.int64"),
        ({"k_cache": torch.zeros(1, 16, 1, 8), "v_cache": torch.zeros(1, 16, 1, 8)}, "multiple of 256"),
        ({"rotary_cos": torch.zeros(3)}, "rotary_cos"),
    ],
)
def test_the_reference_refuses_what_the_kernels_refuse(changes: dict[str, Any], words: str) -> None:
    call = {
        "q": torch.zeros(1, 1, 1, 8),
        "k_cache": torch.zeros(1, 256, 1, 8),
        "v_cache": torch.zeros(1, 256, 1, 8),
        "cache_seqlens": torch.tensor([3], dtype=torch.int32),
        "block_table": torch.tensor([[0]], dtype=torch.int32),
    }
    flash_reference.flash_attn_with_kvcache(**call)
    with pytest.raises((ValueError, RuntimeError), match=words):
        flash_reference.flash_attn_with_kvcache(**call | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backend_attends_and_stores_as_plain_torch_does(dtype: torch.dtype) -> None:
    shape = KvShape(1, 2, 16, 256, dtype)
    rules = [PLAIN, AttentionRule(window=300), AttentionRule(0.3, 1, 4.0), AttentionRule(softcap=1.0)]
    assert agrees(FlashAttention(REFERENCE), shape, 6, CPU, rules)


def test_the_check_at_start_notices_a_kernel_that_is_wrong() -> None:
    shape = KvShape(1, 2, 16, 256, torch.float32)

    def off(*args: Any, **kwargs: Any) -> Tensor:
        return REFERENCE.kvcache(*args, **kwargs | {"causal": False, "window_size": (3, 0)})

    assert not agrees(FlashAttention(FlashFunctions(REFERENCE.varlen, off)), shape, 6, CPU)

    def misplaced(qkv: Tensor, rope: Any, positions: Tensor, slots: Tensor, *cache: Tensor) -> Tensor:
        from real_engine.attention.store import rotate_and_store

        return rotate_and_store(qkv, rope, positions, slots.flip(0), *cache)

    assert not agrees(FlashAttention(REFERENCE, misplaced), shape, 6, CPU)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window", "gemma2", "gemma3", "qwen2_moe"])
def test_tokens_are_those_of_transformers(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    ours, theirs = both(family, tmp_path_factory.mktemp("flash"))
    called = {"varlen": 0, "kvcache": 0}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            called[name] += 1
            return getattr(REFERENCE, name)(*args, **kwargs)

        return call

    attention = FlashAttention(FlashFunctions(counted("varlen"), counted("kvcache")))
    executor = TorchExecutor(ours, blocks=12, block_size=256, attention=attention)
    core = EngineCore(Fcfs(), Lru(), capacity=executor.capacity, limits=Limits(64, 4, 40))
    rng = random.Random(3)
    head = [rng.randrange(300) for _ in range(256)]  # a whole block that two of them share
    texts = [
        [rng.randrange(300) for _ in range(5)],
        [*head, *range(40, 60)],
        [*head, *range(7, 100)],
        [rng.randrange(300) for _ in range(70)],
        [9],
    ]
    requests = [
        Request(id=str(i), prompt=Prompt.of(text), output_len=8 + 3 * i) for i, text in enumerate(texts)
    ]
    got = serve(core, executor, requests)
    for request, text in zip(requests, texts, strict=True):
        assert_greedy(theirs, text, got[request.id])
    assert min(called.values()) > 0


def test_blocks_that_flash_attn_cannot_take_are_refused_with_what_it_takes(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ours, _ = both("llama", tmp_path_factory.mktemp("flash"))
    with pytest.raises(ExecutorError, match=r"multiple of 256; kv\.block_size is 16"):
        TorchExecutor(ours, blocks=3, attention=FlashAttention(REFERENCE))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (KvShape(1, 3, 64, 16, torch.bfloat16), "block_size is 16"),
        (KvShape(1, 3, 64, 256, torch.float32), "is float32"),
        (KvShape(1, 3, 20, 256, torch.bfloat16), "head size is 20"),
        (KvShape(1, 3, 512, 256, torch.bfloat16), "head size is 512"),
    ],
)
def test_what_does_not_suit_flash_attn_is_said(shape: KvShape, words: str) -> None:
    assert words in unsuited_shape(shape)
    assert unsuited_shape(KvShape(30, 3, 64, 512, torch.bfloat16)) == ""
    assert "device is cpu" in unsuited(shape, CPU)


def test_an_installed_flash_attn_of_another_mind_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "flash_attn", raising=False)
    (package / "__init__.py").write_text(
        "__version__ = '9'\n"
        "def flash_attn_varlen_func(q, k, v, page_table=None): ...\n"
        "def flash_attn_with_kvcache(q, k_cache, v_cache): ...\n"
    )
    functions, why = installed()
    assert functions is None
    assert "flash_attn_varlen_func of flash-attn 9 has no cu_seqlens_q" in why
    monkeypatch.delitem(__import__("sys").modules, "flash_attn", raising=False)
