"""A model cut into parts computes what the whole one does, for every family and every cut that it allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lab.errors import ConfigError
from real_engine.attention.backend import PackedBatch
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.loading import load_model
from real_engine.models.shard import ALONE, Place, Shard
from real_engine.models.spec import ModelSpec
from tests.parallel.threads import ThreadShard, on_ranks
from tests.real_engine.reference import families, saved

LENGTHS = (7, 1, 12)


def batch() -> PackedBatch:
    """Three prompts at once, logits for the last token of each."""
    lengths = np.array(LENGTHS)
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(ends[-1]) - (ends - lengths)[owner]
    table = np.arange(9, dtype=np.int32).reshape(3, 3)
    return PackedBatch(
        token_ids=np.random.default_rng(0).integers(0, 300, ends[-1]),
        positions=positions,
        cu_seqlens_q=np.array([0, *ends], np.int32),
        seqlens_k=lengths.astype(np.int32),
        block_table=table,
        slot_mapping=table[owner, positions // 4].astype(np.int64) * 4 + positions % 4,
        sample_rows=ends - 1,
    )


def logits(path: Path, root: Path, shard: Shard) -> Tensor:
    model = load_model(ModelSpec(str(path), "float32"), cache_dir=root, shard=shard)
    memory = KvMemory(KvShape.of(model.config, model.dtype, 4), 9)
    with torch.inference_mode():
        return model.decoder.forward(batch(), TorchAttention().prepare(batch(), memory))


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("family", list(families()))
def test_the_parts_of_a_model_give_the_logits_of_the_whole(
    family: str, tensor: int, pipeline: int, root: Path
) -> None:
    path = saved(family, root)
    whole = logits(path, root, ALONE)
    found = on_ranks(tensor, pipeline, lambda shard: logits(path, root, shard))
    drawing = (pipeline - 1) * tensor
    torch.testing.assert_close(found[drawing], whole, atol=2e-5, rtol=1e-4)
    if pipeline > 1:
        assert found[0].shape[0] == 0


def test_each_layer_sums_twice_and_holds_its_part_alone(root: Path) -> None:
    def look(shard: ThreadShard) -> tuple[int, int, int]:
        path = saved("llama", root)
        model = load_model(ModelSpec(str(path), "float32"), cache_dir=root, shard=shard)
        memory = KvMemory(KvShape.of(model.config, model.dtype, 4), 9)
        with torch.inference_mode():
            model.decoder.forward(batch(), TorchAttention().prepare(batch(), memory))
        return shard.sums, memory.nbytes, model.config.layers

    [(alone, bytes_, layers)] = on_ranks(1, 1, look)
    assert [found[0] for found in on_ranks(2, 1, look)] == [2 * layers] * 2 == [alone] * 2
    assert [found[1] for found in on_ranks(2, 1, look)] == [bytes_ // 2] * 2
    assert sum(found[1] for found in on_ranks(1, 2, look)) == bytes_


@pytest.mark.parametrize(("count", "stages"), [(30, 4), (2, 2), (7, 3), (5, 1)])
def test_stages_tile_the_layers(count: int, stages: int) -> None:
    runs = [list(Place(rank * 2, 2, stages).layers(count)) for rank in range(stages)]
    assert [layer for run in runs for layer in run] == list(range(count))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place(0, 3, 1), "engine.tensor_parallel is 3 and doesn't divide the model's query heads, 4"),
        (Place(0, 4, 1), "doesn't divide the model's KV heads, 2"),
        (Place(0, 1, 3), "engine.pipeline_parallel is 3, and the model has 2 layers"),
    ],
)
def test_a_cut_that_the_model_does_not_allow_is_refused(place: Place, words: str, root: Path) -> None:
    shard = Shard()
    shard.place = place
    with pytest.raises(ConfigError, match=words):
        load_model(ModelSpec("tiny", "float32"), cache_dir=root, shard=shard)
