"""What only a GPU can tell: `pytest -m gpu`. Each compares with the CPU, or with plain torch on the device."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.assembly import EngineSpec, assemble
from lab.config import Config, EngineConfig, KvConfig, ModelConfig
from lab.console import Console
from lab.control.core import EngineCore
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from policies.eviction.lru import Lru
from policies.preemption.last import Last
from policies.scheduling.fcfs import Fcfs
from real_engine.attention import flash, flash_reference, store
from real_engine.attention.agreement import agrees
from real_engine.attention.flash import FlashAttention
from real_engine.backend import open_backend
from real_engine.device import choose, synchronize, upload
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.graphs import CudaGraphs
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.config import Rope
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.rope import RopeTable
from real_engine.models.spec import ModelSpec
from tests.real_engine.reference import assert_greedy, saved, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HEAD_64 = KvShape(1, 3, 64, 256, torch.bfloat16)


@pytest.fixture
def device() -> torch.device:
    return choose("cuda")


def flash_attention() -> FlashAttention:
    pytest.importorskip("flash_attn")
    functions, why = flash.installed()
    assert functions is not None, why
    return FlashAttention(functions, flash.triton_store()[0])


def on_gpu(family: str, root: Path, dtype: str = "float32") -> tuple[LoadedModel, Any]:
    from transformers import AutoModelForCausalLM

    path = saved(family, root)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return load_model(ModelSpec(str(path), dtype, device="cuda"), cache_dir=root), theirs


def workload(count: int, seed: int) -> tuple[list[list[int]], list[Request]]:
    rng = random.Random(seed)
    texts = [[rng.randrange(300) for _ in range(rng.randint(1, 90))] for _ in range(count)]
    return texts, [
        Request(id=str(i), prompt=Prompt.of(text), output_len=6 + 3 * i) for i, text in enumerate(texts)
    ]


def test_numbers_arrive_through_pinned_memory(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):  # buffers are reused while copies are under way
        arrays = [rng.integers(0, 9, rng.integers(0, 4000)), rng.integers(0, 9, 7).astype(np.int32)]
        for array, tensor in zip(arrays, upload(device, *arrays), strict=True):
            assert torch.equal(tensor.cpu(), torch.from_numpy(array))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_tokens_in_float32_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    ours, theirs = on_gpu(family, tmp_path)
    executor = TorchExecutor(ours, blocks=200, block_size=8)
    core = EngineCore(Fcfs(), Lru(), capacity=executor.capacity, limits=Limits(64, 6))
    texts, requests = workload(9, 1)
    got = serve(core, executor, requests)
    for request, text in zip(requests, texts, strict=True):
        assert_greedy(theirs, text, got[request.id])


@pytest.mark.parametrize("window", [(-1, -1), (100, 0)])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 128), (16, 2, 96)])
def test_flash_attn_means_what_its_reference_means(
    window: tuple[int, int], softcap: float, heads: int, kv_heads: int, dim: int, device: torch.device
) -> None:
    theirs = pytest.importorskip("flash_attn")
    generator = torch.Generator(device).manual_seed(0)
    lengths, new = [700, 5, 256, 1], [1, 5, 40, 1]
    each = [-(-length // 256) for length in lengths]
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    keys, values = (
        torch.randn((sum(each), 256, kv_heads, dim), generator=generator, **options) for _ in range(2)
    )
    table = torch.zeros((4, max(each)), dtype=torch.int32, device=device)
    for row, part in enumerate(torch.randperm(sum(each)).to(device, torch.int32).split(each)):
        table[row, : len(part)] = part
    how: dict[str, Any] = {
        "causal": True,
        "window_size": window,
        "softcap": softcap,
        "softmax_scale": dim**-0.5,
    }
    q = torch.randn((sum(new), heads, dim), generator=generator, **options)
    ends = [torch.tensor(np.cumsum([0, *x]), dtype=torch.int32, device=device) for x in (new, lengths)]
    call = (q, keys, values, *ends, max(new), max(lengths))
    torch.testing.assert_close(
        theirs.flash_attn_varlen_func(*call, block_table=table, **how),
        flash_reference.flash_attn_varlen_func(*call, block_table=table, **how),
        atol=2e-2,
        rtol=2e-2,
    )
    q = torch.randn((4, 1, heads, dim), generator=generator, **options)
    how |= {
        "cache_seqlens": torch.tensor([700, 5, 0, 1], dtype=torch.int32, device=device),
        "block_table": table,
    }
    torch.testing.assert_close(
        theirs.flash_attn_with_kvcache(q, keys, values, **how),
        flash_reference.flash_attn_with_kvcache(q, keys, values, **how),
        atol=2e-2,
        rtol=2e-2,
    )


def test_the_backend_on_flash_attn_agrees_with_plain_torch(device: torch.device) -> None:
    assert agrees(flash_attention(), HEAD_64, 9, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 1, 80), (32, 8, 128)])
def test_the_triton_store_writes_what_plain_torch_writes(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, device: torch.device
) -> None:
    pytest.importorskip("triton")
    kernel, missing = flash.triton_store()
    assert not missing
    shape = KvShape(1, kv_heads, dim, 256, dtype)
    rope = RopeTable(Rope(), dim, 4000, dtype, device)
    qkv = torch.randn((500, heads + 2 * kv_heads, dim), device=device).to(dtype)
    positions = torch.randint(0, 4000, (500,), device=device)
    slots = torch.randperm(8 * 256, device=device)[:500]
    slots[3::7] = -1
    results = []
    for function in (kernel, store.rotate_and_store):
        memory = KvMemory(shape, 8, device)
        queries = function(qkv, rope, positions, slots, memory.keys[0], memory.values[0])
        results.append((queries, memory.keys[0], memory.values[0]))
    atol = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=atol)


def test_graphs_give_the_tokens_of_eager_steps(tmp_path: Path, device: torch.device) -> None:
    model = load_model(ModelSpec("tiny", "bfloat16", device="cuda"), cache_dir=tmp_path)
    logits: list[dict[str, torch.Tensor]] = []
    for graphs in (False, True):
        executor = TorchExecutor(
            model, blocks=40, block_size=256, attention=flash_attention(), keep_logits=True
        )
        if graphs:
            executor.record(CudaGraphs(device), most=5)
            assert executor.about["graphs"] == 4
        core = EngineCore(Fcfs(), Lru(), capacity=executor.capacity, limits=Limits(200, 7))
        for request in workload(7, 3)[1]:
            core.add(request, 0)
        first: dict[str, torch.Tensor] = {}
        while core.has_work:
            plan = core.plan(0)
            result = executor.execute(plan)
            for name, row in executor.logits.items():
                first.setdefault(f"{name}@{plan.index}", row.cpu())
            core.commit(plan, result, 0)
        logits.append(first)
        executor.close()
    assert logits[0].keys() == logits[1].keys()
    steps = sorted(logits[0], key=lambda name: int(name.split("@")[1]))
    # Up to the first tie that bfloat16 decides otherwise, both have seen the same tokens.
    same = [name for name in steps if logits[0][name].argmax() == logits[1][name].argmax()]
    assert len(same) >= 0.9 * len(steps)
    for name in steps[:20]:
        torch.testing.assert_close(logits[0][name], logits[1][name], atol=0.1, rtol=0.05)


def test_swapped_requests_keep_their_tokens(tmp_path: Path) -> None:
    ours, theirs = on_gpu("llama", tmp_path)
    executor = TorchExecutor(ours, blocks=30, block_size=4, host_blocks=60)
    core = EngineCore(
        Fcfs(), Lru(), capacity=executor.capacity, limits=Limits(64, 6), preemption=Last(mode="swap")
    )
    rng = random.Random(2)
    texts = [[rng.randrange(300) for _ in range(20)] for _ in range(6)]
    requests = [Request(id=str(i), prompt=Prompt.of(text), output_len=24) for i, text in enumerate(texts)]
    moved = 0
    out: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        core.add(request, 0)
    while core.has_work:
        plan = core.plan(0)
        moved += plan.moved_blocks
        for emission in core.commit(plan, executor.execute(plan), 0):
            out[emission.request].append(emission.token)
    assert moved > 0
    for request, text in zip(requests, texts, strict=True):
        assert_greedy(theirs, text, out[request.id])


def test_blocks_go_to_pinned_memory_and_back(device: torch.device) -> None:
    shape = KvShape(2, 3, 64, 256, torch.bfloat16)
    there, here = KvMemory(shape, 8, device), KvMemory(shape, 8, pinned=True)
    assert here.keys[0].is_pinned()
    for tensor in (*there.keys, *there.values):
        tensor.normal_()
    before = [tensor.cpu() for tensor in (*there.keys, *there.values)]
    here.copy(there, [(0, 5), (1, 6), (7, 0)])
    synchronize(device)
    for tensor in (*there.keys, *there.values):
        tensor.zero_()
    there.copy(here, [(5, 0), (6, 1), (0, 7)])
    synchronize(device)
    for tensor, given in zip((*there.keys, *there.values), before, strict=True):
        for block in (0, 1, 7):
            assert torch.equal(tensor[block].cpu(), given[block])


@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_it_opens_and_serves_with_a_cache_sized_from_memory(attention: str, tmp_path: Path) -> None:
    if attention == "auto":
        pytest.importorskip("flash_attn")
    cfg = Config(
        cache_dir=str(tmp_path),
        model=ModelConfig("tiny", "bfloat16"),
        engine=EngineConfig(device="cuda", attention=attention, memory_utilization=0.5, token_budget=256),
        kv=KvConfig(block_size=256),
    )
    backend = open_backend(cfg, Console(), None)
    free, total = torch.cuda.mem_get_info()
    assert 0.3 * total < total - free < 0.7 * total
    assert backend.about["attention"] == ("flash-attn-2" if attention == "auto" else "torch-gather-sdpa")
    recorder = Recorder()
    requests = workload(20, 4)[1]
    spec = EngineSpec({"policy": {"name": "fcfs"}}, Limits(256, 8), True, 0)
    control = assemble(spec, backend.capacity, recorder, requests)
    SteppedRun(control, backend.executor, requests).run()
    backend.close()
    assert all(record.outcome == "finished" for record in recorder.requests)
