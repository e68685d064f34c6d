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
from real_engine.attention.backend import AttentionBackend, PackedBatch
from real_engine.attention.native_cpu import NativeAttention, agrees
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models import tiny
from real_engine.models.decoder import Decoder
from real_engine.models.families import parse_config
from real_engine.models.loading import load_model
from real_engine.models.ops import TorchOps
from real_engine.models.spec import ModelSpec
from real_engine.native import library
from real_engine.native.library import Kernels
from tests.conformance.sides import Setting, conversation, finish, run_real


def reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: list[int],
    lengths: list[int],
    table: Tensor,
    window: int = 0,
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
        ago = torch.arange(length - (last - first), length)[:, None] - torch.arange(length)[None, :]
        seen = (ago >= 0) & (ago < (window or length))
        scores = scores.masked_fill(~seen, -math.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(last - first, -1))
    return torch.cat(out)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    vectors=st.sampled_from([1, 2, 4, 5, 8]),
    size=st.sampled_from([1, 3, 16, 17]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    window=st.sampled_from([0, 0, 1, 13, 64, 90]),
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
    window: int,
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
        window,
    )
    expected = reference(q, keys, values, starts, contexts, table, window)
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
    monkeypatch.setattr(kernels, "attend", lambda *args: right(*args[:-2], args[-2] * 1.5, args[-1]))
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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    inputs=st.integers(1, 50),
    panels=st.integers(1, 5),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_packed_product_is_the_product(
    kernels: Kernels, rows: int, inputs: int, panels: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    if not kernels.has_products:
        pytest.skip("this processor doesn't multiply bfloat16 itself")
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randn((n, 2 * inputs), generator=generator).to(torch.bfloat16) for n in (rows, 32 * panels)
    )
    bias = torch.randn(32 * panels, generator=generator).to(torch.bfloat16) if biased else None
    packed = library.pack(weight)
    assert packed is not None
    got = kernels.product(x, packed, bias, dtype)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), groups=st.integers(1, 12), panels=st.integers(1, 4), seed=st.integers(0, 2**31)
)
def test_a_product_of_8_bits_is_that_of_the_rounded_numbers(
    kernels: Kernels, rows: int, groups: int, panels: int, seed: int
) -> None:
    if not kernels.has_products:
        pytest.skip("this processor doesn't multiply 8 bits itself")
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randn((n, 16 * groups), generator=generator).to(torch.bfloat16) for n in (rows, 32 * panels)
    )
    packed = library.pack(weight, int8=True)
    assert packed is not None
    got = kernels.product(x, packed, None, torch.float32)

    exact, top = x.float(), x.float().abs().amax(1, keepdim=True)
    rows8 = (exact * (torch.full_like(top, 127) / top)).round().double() * (top / 127)
    exact, top = weight.float(), weight.float().abs().amax(1, keepdim=True)
    weight8 = (exact / (top / 127)).round().double() * (top / 127)
    torch.testing.assert_close(got.double(), rows8 @ weight8.T, rtol=1e-4, atol=1e-4)
    error = (got.double() - x.double() @ weight.double().T).abs().max().item()
    assert error < 0.02 * (16 * groups) ** 0.5 * 3


def test_weights_whose_shape_does_not_suit_are_not_packed() -> None:
    assert library.pack(torch.zeros(33, 8, dtype=torch.bfloat16)) is None
    assert library.pack(torch.zeros(32, 7, dtype=torch.bfloat16)) is None
    assert library.pack(torch.zeros(32, 8)) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotary", [32, 64])
def test_all_layers_in_one_call_compute_what_they_compute_one_by_one(
    kernels: Kernels, bias: bool, rotary: int
) -> None:
    """In bfloat16, against the same model in float32: no further from it than torch's bfloat16 is."""
    if not kernels.has_products:
        pytest.skip("this processor doesn't multiply bfloat16 itself")
    raw = {**tiny.CONFIG, "model_type": "qwen2" if bias else "llama", "head_dim": rotary, "hidden_size": 128}
    raw |= {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
    }
    raw["architectures"] = ["Qwen2ForCausalLM" if bias else "LlamaForCausalLM"]
    config = parse_config(raw, "the model of this test")
    generator = torch.Generator().manual_seed(1)

    class Drawn:
        def take(self, name: str, *shape: int) -> Tensor:
            if "norm" in name:
                return torch.rand(shape, generator=generator) + 0.5
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    exact = Decoder(config, Drawn(), torch.float32)
    errors = {}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 300)
    steps = [(0, 100), (100, 101), (101, 230), (230, 231)]
    for name in ("exact", "torch", "kernels"):
        generator.manual_seed(1)
        dtype = torch.float32 if name == "exact" else torch.bfloat16
        decoder = exact if name == "exact" else Decoder(config, Drawn(), dtype)
        attention: AttentionBackend = TorchAttention()
        if name == "kernels":
            attention = NativeAttention(kernels)
            decoder.use(kernels)
            assert decoder.fused
        memory = KvMemory(KvShape.of(config, dtype, 16), 40)
        errors[name] = torch.cat([_logits(decoder, attention, memory, ids, *step) for step in steps])
    wrong = {name: (errors[name] - errors["exact"]).abs().max().item() for name in ("torch", "kernels")}
    assert wrong["kernels"] < 1.5 * wrong["torch"] + 0.02, wrong
    assert wrong["torch"] < 0.2  # or the bound above says nothing


def _logits(
    decoder: Decoder, attention: AttentionBackend, memory: KvMemory, ids: np.ndarray, start: int, end: int
) -> Tensor:
    """Of two sequences that hold the same tokens, over different blocks, at their last token."""
    table = np.array([np.arange(15), np.arange(39, 24, -1)], np.int32)
    positions = np.tile(np.arange(start, end), 2)
    owner, count = np.repeat([0, 1], end - start), end - start
    batch = PackedBatch(
        token_ids=np.tile(ids[start:end], 2),
        positions=positions,
        cu_seqlens_q=np.array([0, count, 2 * count], np.int32),
        seqlens_k=np.array([end, end], np.int32),
        block_table=table,
        slot_mapping=table[owner, positions // 16].astype(np.int64) * 16 + positions % 16,
        sample_rows=np.array([count - 1, 2 * count - 1]),
    )
    with torch.inference_mode():
        return decoder.forward(batch, attention.prepare(batch, memory))


def test_activation_at_the_extremes(kernels: Kernels) -> None:
    gate_up = torch.tensor([[-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e30, 1.0] * 2 + [1.0] * 16])
    torch.testing.assert_close(kernels.silu_mul(gate_up), TorchOps().silu_mul(gate_up))


@pytest.mark.parametrize("host_blocks", [0, 60], ids=["recompute", "swap"])
def test_the_engine_gives_the_same_tokens_with_it(kernels: Kernels, host_blocks: int, tmp_path: Path) -> None:
    model = load_model(ModelSpec("tiny", "float32", seed=0), cache_dir=tmp_path)
    requests = conversation(12)
    setting = Setting(blocks=34, host_blocks=host_blocks)
    plain = run_real(setting, model, requests)
    with torch.inference_mode():
        model.decoder.use(kernels)
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
