"""Padded decode batches as recorded graphs, on a device that records on the CPU as strictly as CUDA does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.control.core import EngineCore
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from real_engine.attention import flash_reference
from real_engine.attention.backend import GraphableAttention, PackedBatch
from real_engine.attention.flash import FlashAttention, FlashFunctions
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.executor import TorchExecutor
from real_engine.graphs import DecodeGraphs, sizes_up_to
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.decoder import Decoder
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.shard import Place, Shard
from real_engine.models.spec import ModelSpec
from real_engine.models.tiny import tiny_weights
from real_engine.models.weights import TensorWeights
from tests.real_engine.recording import RecordingDevice
from tests.real_engine.reference import assert_greedy, both, serve

MOST, SIZE, BLOCKS = 19, 256, 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelSpec("tiny", "float32"), cache_dir=tmp_path_factory.mktemp("graphs"))


def recorded_flash(device: RecordingDevice) -> FlashAttention:
    functions = (flash_reference.flash_attn_varlen_func, flash_reference.flash_attn_with_kvcache)
    return FlashAttention(FlashFunctions(*map(device.kernel, functions)))


def decodes(count: int, seed: int) -> PackedBatch:
    """One new token for each of `count` sequences with contexts of one block or two, in shuffled blocks."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2 * SIZE, count) if count <= BLOCKS // 2 else rng.integers(1, SIZE, count)
    order = iter(rng.permutation(BLOCKS))
    table = np.zeros((count, int(-(-lengths.max() // SIZE))), np.int32)
    for row, length in enumerate(lengths):
        blocks = -(-int(length) // SIZE)
        table[row, :blocks] = [next(order) for _ in range(blocks)]
    positions = lengths - 1
    return PackedBatch(
        token_ids=rng.integers(0, 512, count),
        positions=positions,
        cu_seqlens_q=np.arange(count + 1, dtype=np.int32),
        seqlens_k=lengths.astype(np.int32),
        block_table=table,
        slot_mapping=table[np.arange(count), positions // SIZE].astype(np.int64) * SIZE + positions % SIZE,
        sample_rows=np.arange(count),
    )


def filled(model: LoadedModel) -> KvMemory:
    memory = KvMemory(KvShape.of(model.config, model.dtype, SIZE), BLOCKS)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*memory.keys, *memory.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return memory


def test_sizes_are_few_and_end_at_the_largest() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(6) == [1, 2, 4, 6]
    assert sizes_up_to(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert sizes_up_to(70)[-2:] == [64, 70]


def test_a_padded_replay_is_the_eager_step_for_every_batch_size(model: LoadedModel) -> None:
    device = RecordingDevice()
    attention = recorded_flash(device)
    empty = KvMemory(KvShape.of(model.config, model.dtype, SIZE), BLOCKS)
    graphs = DecodeGraphs(model.decoder, attention, empty, device, most=MOST, max_context=2048)
    assert device.captured == len(graphs.sizes) == 6
    buffers = (graphs._token_ids, *(getattr(graphs._rows, name) for name in graphs._rows.__slots__))
    addresses = [buffer.data_ptr() for buffer in buffers]
    start = filled(model)
    order = random.Random(0).sample(range(1, MOST + 1), MOST)
    for count in order:  # each replay finds what others of every size left in the buffers
        batch = decodes(count, count)
        for ours, given in zip((*empty.keys, *empty.values), (*start.keys, *start.values), strict=True):
            ours.copy_(given)
        eager = filled(model)
        with torch.inference_mode():
            run = graphs.load(batch)
            assert run is not None
            x, added = run()
            wanted_x, wanted_added = model.decoder.hidden(
                torch.from_numpy(batch.token_ids), attention.prepare(batch, eager)
            )
        assert added is not None
        assert wanted_added is not None
        torch.testing.assert_close(x[:count], wanted_x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(added[:count], wanted_added, atol=1e-5, rtol=1e-5)
        # The whole cache is as eager execution leaves it: rows that pad have stored nothing anywhere.
        for ours, theirs in zip((*empty.keys, *empty.values), (*eager.keys, *eager.values), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert device.replayed == MOST
    assert [buffer.data_ptr() for buffer in buffers] == addresses


def test_prompts_and_batches_beyond_the_largest_run_eagerly(model: LoadedModel) -> None:
    device = RecordingDevice()
    memory = KvMemory(KvShape.of(model.config, model.dtype, SIZE), BLOCKS)
    graphs = DecodeGraphs(model.decoder, recorded_flash(device), memory, device, most=4, max_context=2048)
    assert graphs.load(decodes(5, 0)) is None
    chunk = decodes(2, 0)
    longer = PackedBatch(
        np.repeat(chunk.token_ids, 2), *(getattr(chunk, name) for name in chunk.__slots__[1:])
    )
    assert graphs.load(longer) is None
    assert graphs.load(decodes(4, 0)) is not None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_through_graphs_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    ours, theirs = both(family, tmp_path)
    device = RecordingDevice()
    executor = TorchExecutor(ours, blocks=BLOCKS, block_size=SIZE, attention=recorded_flash(device))
    executor.record(device, most=4)
    assert executor.about["graphs"] == 3
    core = EngineCore(Fcfs(), Lru(), capacity=executor.capacity, limits=Limits(80, 6))
    rng = random.Random(5)
    texts = [[rng.randrange(300) for _ in range(rng.randint(1, 60))] for _ in range(6)]
    requests = [
        Request(id=str(i), prompt=Prompt.of(text), output_len=4 + 5 * i) for i, text in enumerate(texts)
    ]
    got = serve(core, executor, requests)
    for request, text in zip(requests, texts, strict=True):
        assert_greedy(theirs, text, got[request.id])
    assert device.replayed > 10


def test_reading_on_the_host_cannot_be_recorded() -> None:
    device = RecordingDevice()
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="reads on the host"):
        device.capture(lambda: x.sum().item())


def test_a_mixture_of_experts_reads_on_the_host_and_has_no_graphs(tmp_path: Path) -> None:
    ours, _ = both("mixtral", tmp_path)
    device = RecordingDevice()
    executor = TorchExecutor(ours, blocks=BLOCKS, block_size=SIZE, attention=recorded_flash(device))
    executor.record(device, most=4)
    assert executor.about["graphs"] == 0


def test_a_part_of_a_model_waits_for_others_and_has_no_graphs(model: LoadedModel) -> None:
    config, whole = model.config, TensorWeights(tiny_weights(0), "tiny")
    for place in (Place(tensor=2), Place(pipeline=2), Place(rank=1, pipeline=2)):
        part = Shard()
        part.place = place
        assert not Decoder(config, whole, torch.float32, shard=part).recordable
    assert Decoder(config, whole, torch.float32).recordable


def test_plain_torch_attention_reads_the_batch_on_the_host_and_has_no_graphs(model: LoadedModel) -> None:
    attention: Any = TorchAttention()
    assert not isinstance(attention, GraphableAttention)
    assert isinstance(recorded_flash(RecordingDevice()), GraphableAttention)
    executor = TorchExecutor(model, blocks=4)
    executor.record(RecordingDevice(), most=4)  # nothing to record: it goes on eagerly
    assert executor.about["graphs"] == 0
