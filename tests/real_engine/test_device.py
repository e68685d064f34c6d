"""The device path without a device: every tensor of a step is where the weights are, and bytes arrive as they left.

torch's fake tensors carry a device and no numbers: an operation whose operands lie on different devices raises, as it
would on CUDA. The device called `lazy` is one that a CPU build of torch lets them have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.errors import ExecutorError
from real_engine import device
from real_engine.attention.backend import AttentionBackend, PackedBatch
from real_engine.attention.flash import FlashAttention, FlashFunctions
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.graphs import DecodeGraphs
from real_engine.kv_memory import KvMemory, KvShape, copy_runs, runs
from real_engine.models.decoder import Decoder
from real_engine.models.families import parse_config
from real_engine.models.tiny import CONFIG, tiny_weights
from real_engine.models.weights import TensorWeights
from tests.real_engine.reference import families

FAR = torch.device("lazy")


@pytest.fixture
def fakes() -> Iterator[None]:
    with FakeTensorMode():
        yield


def mixed_batch(size: int) -> PackedBatch:
    """A chunk that starts its sequence, one in the middle, and two decodes of different length."""
    counts, lengths = np.array([5, 3, 1, 1]), np.array([5, size + 7, 2 * size + 1, 2])
    each = -(-lengths // size)
    table = np.zeros((4, int(each.max())), np.int32)
    for row, (first, blocks) in enumerate(zip(np.cumsum([0, *each]), each, strict=False)):
        table[row, :blocks] = np.arange(first, first + blocks)
    owner = np.repeat(np.arange(4), counts)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    return PackedBatch(
        token_ids=np.arange(10),
        positions=positions,
        cu_seqlens_q=np.cumsum([0, *counts]).astype(np.int32),
        seqlens_k=lengths.astype(np.int32),
        block_table=table,
        slot_mapping=table[owner, positions // size].astype(np.int64) * size + positions % size,
        sample_rows=np.array([4, 8, 9]),
    )


def decode_batch(size: int) -> PackedBatch:
    """Three sequences with one new token each."""
    lengths = np.array([size + 7, 2, size])
    return PackedBatch(
        token_ids=np.arange(3),
        positions=lengths - 1,
        cu_seqlens_q=np.arange(4, dtype=np.int32),
        seqlens_k=lengths.astype(np.int32),
        block_table=np.array([[0, 1], [2, 0], [3, 0]], np.int32),
        slot_mapping=np.array([size + 6, 2 * size + 1, 4 * size - 1]),
        sample_rows=np.arange(3),
    )


def far_kernel(q: Tensor, *cache: Tensor, **others: Any) -> Tensor:
    """Stands in for flash-attn: everything it gets must be where `q` is, and of its types."""
    assert {x.device for x in (q, *cache)} == {FAR}
    for name, value in others.items():
        if isinstance(value, Tensor):
            assert (value.device, value.dtype) == (FAR, torch.int32), name
    return torch.empty_like(q)


@pytest.mark.parametrize(
    "attention",
    [TorchAttention(), FlashAttention(FlashFunctions(far_kernel, far_kernel))],
    ids=lambda a: a.name,
)
def test_every_tensor_of_a_step_is_on_the_models_device(fakes: None, attention: AttentionBackend) -> None:
    config = parse_config(CONFIG, "tiny")
    decoder = Decoder(config, TensorWeights(tiny_weights(0), "tiny"), torch.bfloat16, FAR)
    size = max(16, attention.block_size_multiple)
    memory = KvMemory(KvShape.of(config, torch.bfloat16, size), 8, FAR)
    for batch in (mixed_batch(size), decode_batch(size)):
        logits = decoder.forward(batch, attention.prepare(batch, memory))
        assert logits.shape == (3, config.vocab_size)
        assert logits.device == FAR
    assert {t.device for t in (*memory.keys, *memory.values)} == {FAR}


class AnyWeights:
    """Every tensor that is asked for, without numbers."""

    def take(self, name: str, *shape: int) -> Tensor:
        return torch.zeros(shape)


# A mixture of experts looks at its router's choice on the host, which fake tensors can't be asked.
@pytest.mark.parametrize("family", [name for name in families() if "moe" not in name and name != "mixtral"])
def test_every_family_computes_on_the_models_device(fakes: None, family: str) -> None:
    config = parse_config(families()[family].to_dict() | {"torch_dtype": None}, family)
    decoder = Decoder(config, AnyWeights(), torch.bfloat16, FAR)
    for attention in (TorchAttention(), FlashAttention(FlashFunctions(far_kernel, far_kernel))):
        memory = KvMemory(KvShape.of(config, torch.bfloat16, 256), 8, FAR)
        for batch in (mixed_batch(256), decode_batch(256)):
            assert decoder.forward(batch, attention.prepare(batch, memory)).device == FAR


def test_graphs_read_tensors_of_the_models_device(fakes: None) -> None:
    config = parse_config(CONFIG, "tiny")
    decoder = Decoder(config, TensorWeights(tiny_weights(0), "tiny"), torch.bfloat16, FAR)
    memory = KvMemory(KvShape.of(config, torch.bfloat16, 256), 8, FAR)
    attention = FlashAttention(FlashFunctions(far_kernel, far_kernel))

    class Once:
        def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            return run(), lambda: None

    graphs = DecodeGraphs(decoder, attention, memory, Once(), most=4, max_context=2048)
    run = graphs.load(decode_batch(256))
    assert run is not None
    x, added = run()
    assert added is not None
    assert (x.device, added.device, len(x)) == (FAR, FAR, 4)


def test_a_tensor_left_on_the_host_would_be_noticed(fakes: None) -> None:
    config = parse_config(CONFIG, "tiny")
    decoder = Decoder(config, TensorWeights(tiny_weights(0), "tiny"), torch.bfloat16, FAR)
    memory = KvMemory(KvShape.of(config, torch.bfloat16, 16), 8)
    batch = mixed_batch(16)
    with pytest.raises(Exception, match="same device"):
        decoder.forward(batch, TorchAttention().prepare(batch, memory))


def test_swapped_blocks_go_to_the_other_device(fakes: None) -> None:
    shape = KvShape(2, 2, 8, 4, torch.bfloat16)
    there, here = KvMemory(shape, 6, FAR), KvMemory(shape, 4)
    here.copy(there, [(5, 0), (1, 1), (2, 2)])
    there.copy(here, [(2, 3)])


ARRAYS = st.lists(
    st.tuples(
        st.sampled_from([np.int64, np.int32, np.bool_, np.float32]),
        st.lists(st.integers(0, 5), min_size=1, max_size=3),
    ),
    max_size=5,
)


@given(shapes=ARRAYS, seed=st.integers(0, 99))
def test_arrays_packed_into_one_copy_come_out_as_they_went_in(
    shapes: list[tuple[type, list[int]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = [
        (rng.integers(-9, 9, shape) > 0 if kind is np.bool_ else rng.integers(-9, 9, shape)).astype(kind)
        for kind, shape in shapes
    ]
    packed, places = device.pack(arrays)
    assert all(first % 16 == 0 for first, _, _ in places)
    for array, found in zip(arrays, device.unpack(torch.from_numpy(packed), places), strict=True):
        assert torch.equal(found, torch.from_numpy(array))
    for array, shared in zip(arrays, device.upload(torch.device("cpu"), *arrays), strict=True):
        assert torch.equal(shared, torch.from_numpy(array))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_runs_of_neighbours_copy_what_pairs_say(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 9))
    places = data.draw(st.permutations(range(10)))[:count]
    sources = data.draw(st.one_of(st.permutations(range(10)), st.just(list(range(10)))))[:count]
    pairs = list(zip(sources, sorted(places) if data.draw(st.booleans()) else places, strict=True))
    theirs, ours = [torch.randn(10, 2)], [torch.zeros(10, 2)]
    wanted = torch.zeros(10, 2)
    for source, place in pairs:
        wanted[place] = theirs[0][source]
    copy_runs(ours, theirs, pairs)
    assert torch.equal(ours[0], wanted)


def test_neighbours_are_copied_at_once() -> None:
    assert runs([(3, 7), (4, 8), (5, 9), (6, 11), (0, 12)]) == [(3, 6, 7), (6, 7, 11), (0, 1, 12)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_named_with_the_way_out() -> None:
    assert device.choose("auto") == device.choose("cpu") == torch.device("cpu")
    with pytest.raises(ExecutorError, match=r"engine\.device=cuda, but torch .* lab\.doctor"):
        device.choose("cuda")
