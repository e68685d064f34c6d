"""Our own CPU kernels: against arithmetic in float64, inside the engine, and where they can't be built."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lab.assembly import assemble
from lab.observe.recorder import Recorder
from real_engine.attention.native_cpu import NativeAttention, agrees
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.kv_memory import KvShape
from real_engine.models.loading import load_model
from real_engine.models.ops import TorchOps
from real_engine.models.spec import ModelSpec
from real_engine.native import library
from real_engine.native.library import Kernels
from tests.conformance.sides import Setting, conversation, finish, run_real


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    said: list[str] = []
    found = library.load(tmp_path_factory.mktemp("cache"), said.append)
    if found is None:
        pytest.skip(" ".join(said))
    return found


def reference(
    q: Tensor, keys: Tensor, values: Tensor, starts: list[int], lengths: list[int], table: Tensor
) -> Tensor:
    """Softmax attention written out, in float64."""
    heads, dim = q.shape[1:]
    size, kv_heads = keys.shape[1:3]
    out = []
    for row, length in enumerate(lengths):
        first, last = starts[row], starts[row + 1]
        blocks = table[row, : -(-length // size)].long()
        k, v = (
            cache[blocks].reshape(-1, kv_heads, dim)[:length].double().repeat_interleave(heads // kv_heads, 1)
            for cache in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", q[first:last].double(), k) / math.sqrt(dim)
        seen = torch.arange(length)[None, :] <= torch.arange(length - (last - first), length)[:, None]
        scores = scores.masked_fill(~seen, -math.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(last - first, -1))
    return torch.cat(out)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    vectors=st.sampled_from([1, 2, 4, 5, 8]),
    size=st.sampled_from([1, 3, 16, 17]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_it_is_softmax_attention_over_whatever_blocks(
    kernels: Kernels,
    lengths: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    vectors: int,
    size: int,
    dtype: torch.dtype,
    spread: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    contexts = [max(a, b) for a, b in lengths]
    chunks = [min(a, b) for a, b in lengths]
    each = [-(-length // size) for length in contexts]
    dim, heads = 16 * vectors, kv_heads * group
    keys, values = (
        torch.randn((sum(each), size, kv_heads, dim), generator=generator).to(dtype) for _ in "kv"
    )
    order = torch.randperm(sum(each), generator=generator).int()
    table = torch.zeros((len(each), max(each)), dtype=torch.int32)
    for row, (count, end) in enumerate(zip(each, np.cumsum(each), strict=True)):
        table[row, :count] = order[end - count : end]
    starts = [0, *np.cumsum(chunks).tolist()]
    # Rows of a wider tensor, as queries are of the fused projection.
    q = (torch.randn((starts[-1], heads + 2, dim), generator=generator) * spread).to(dtype)[:, :heads]
    got = kernels.attend(
        q,
        keys,
        values,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        table,
        1 / math.sqrt(dim),
    )
    expected = reference(q, keys, values, starts, contexts, table)
    error = (got.double() - expected).abs().max().item()
    assert error < (2e-5 * max(spread, 1) if dtype == torch.float32 else 2e-2), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 3, 64, 16), (4, 2, 16, 4), (8, 1, 128, 7)])
def test_the_check_at_start_passes_and_notices_a_wrong_kernel(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, kv_heads, dim, size = shape
    kv = KvShape(1, kv_heads, dim, size, dtype)
    assert agrees(kernels, kv, heads)
    right = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: right(*args[:-1], args[-1] * 1.5))
    assert not agrees(kernels, kv, heads)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    vectors=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    adding=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_norm_and_activation_are_those_of_torch(
    kernels: Kernels, rows: int, vectors: int, dtype: torch.dtype, adding: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 8).to(dtype)

    x, weight = drawn(rows, 16 * vectors), drawn(16 * vectors)
    added = drawn(rows, 16 * vectors) if adding else None
    same = x.clone()
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    ours, theirs = (ops.add_norm(y, added, weight, 1e-5) for ops, y in ((kernels, x), (TorchOps(), same)))
    torch.testing.assert_close(ours, theirs, **bound)
    torch.testing.assert_close(x, same, **bound)
    gate_up = drawn(rows, 32 * vectors)
    torch.testing.assert_close(kernels.silu_mul(gate_up), TorchOps().silu_mul(gate_up), **bound)


def test_activation_at_the_extremes(kernels: Kernels) -> None:
    gate_up = torch.tensor([[-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e30, 1.0] * 2 + [1.0] * 16])
    torch.testing.assert_close(kernels.silu_mul(gate_up), TorchOps().silu_mul(gate_up))


@pytest.mark.parametrize("host_blocks", [0, 60], ids=["recompute", "swap"])
def test_the_engine_gives_the_same_tokens_with_it(kernels: Kernels, host_blocks: int, tmp_path: Path) -> None:
    model = load_model(ModelSpec("tiny", "float32", seed=0), cache_dir=tmp_path)
    requests = conversation(12)
    setting = Setting(blocks=34, host_blocks=host_blocks)
    plain = run_real(setting, model, requests)
    model.decoder.ops = kernels
    executor = TorchExecutor(
        model, blocks=34, block_size=4, host_blocks=host_blocks, attention=NativeAttention(kernels)
    )
    assert executor.about["attention"] == "native-paged"
    recorder = Recorder()
    control = assemble(setting.spec, executor.capacity, recorder, requests)
    SteppedRun(control, executor, requests).run()
    finish(control)
    tokens = [{r.request.id: r.output for r in run.requests} for run in (plain, recorder)]
    assert tokens[0] == tokens[1]
    assert any(record.preemptions for record in recorder.requests)


def test_head_sizes_that_fill_no_vector_are_left_to_torch() -> None:
    assert not NativeAttention.suits(KvShape(1, 1, 20, 16, torch.float32))
    assert not NativeAttention.suits(KvShape(1, 1, 64, 16, torch.float16))
    assert NativeAttention.suits(KvShape(1, 1, 64, 16, torch.bfloat16))
    assert TorchAttention().block_size_multiple == 1


def test_the_library_is_built_once(kernels: Kernels, tmp_path: Path) -> None:
    said: list[str] = []
    assert library.load(tmp_path, said.append) is not None
    assert library.load(tmp_path, said.append) is not None
    assert len(said) == 1
    assert "Building" in said[0]


def test_without_a_compiler_there_is_a_sentence_and_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library.load(tmp_path / "cache", said.append) is None
    assert said == [
        "No C++ compiler here: attention runs on plain torch, several times slower at large batches."
    ]


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "g++"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "fatal error: no omp.h" >&2\nexit 1\n'
    )
    tool.chmod(0o755)
    said: list[str] = []
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert library.load(tmp_path / "cache", said.append) is None
    assert "fatal error: no omp.h" in said[-1]
    assert not list((tmp_path / "cache" / "native").glob("*.so"))
