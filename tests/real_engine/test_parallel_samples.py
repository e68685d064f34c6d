"""Several outputs of one request are, on the real engine, what as many requests with those seeds give alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lab.control.core import EngineCore
from lab.control.plan import StepPlan
from lab.control.request import Prompt, Request, SamplingParams
from lab.control.step import Limits
from policies.eviction.lru import Lru
from policies.preemption.last import Last
from policies.scheduling.fcfs import Fcfs
from real_engine.executor import TorchExecutor
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec
from tests.real_engine.reference import MARGIN

HOT = SamplingParams(temperature=0.9, seed=5, logprobs=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelSpec("tiny", "float32"), cache_dir=tmp_path_factory.mktemp("cache"))


def serve(
    model: LoadedModel, requests: list[Request], blocks: int, block_size: int = 4, **options: Any
) -> tuple[dict[str, list[int]], dict[tuple[str, int], torch.Tensor], list[StepPlan]]:
    """(tokens, the logits of each of them, plans)."""
    host = options.pop("host_blocks", 0)
    limits = options.pop("limits", Limits(40, 8))
    executor = TorchExecutor(model, blocks=blocks, block_size=block_size, host_blocks=host, keep_logits=True)
    core = EngineCore(Fcfs(), Lru(), capacity=executor.capacity, limits=limits, **options)
    out: dict[str, list[int]] = {s.id: [] for r in requests for s in r.sequences()}
    logits: dict[tuple[str, int], torch.Tensor] = {}
    plans = []
    for request in requests:
        core.add(request, 0)
    while core.has_work:
        plan = core.plan(0)
        result = executor.execute(plan)
        for name, row in executor.logits.items():
            logits[name, len(out[name])] = row.clone()
        for emission in core.commit(plan, result, 0):
            out[emission.request].append(emission.token)
        core.check()
        plans.append(plan)
    assert core.pool.held == 0
    return out, logits, plans


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("blocks", "host", "limits"),
    [
        (200, 0, Limits(64, 8)),
        (200, 0, Limits(9, 3, 5)),  # chunks, few slots
        (14, 0, Limits(40, 8)),  # tight: sequences are preempted and computed again ...
        (14, 60, Limits(40, 8)),  # ... or swapped
    ],
)
def test_sequences_are_as_if_asked_for_alone(
    tiny: LoadedModel, cache: bool, blocks: int, host: int, limits: Limits
) -> None:
    rng = random.Random(3)
    groups = [
        Request(
            id=f"r{i}",
            prompt=Prompt.of(rng.randrange(200) for _ in range(length)),
            output_len=9,
            n=3,
            sampling=HOT,
        )
        for i, length in enumerate((8, 9, 15))
    ]
    got, logits, plans = serve(
        tiny, groups, blocks, host_blocks=host, limits=limits, prefix_cache=cache, preemption=Last()
    )
    assert any(plan.copies for plan in plans)
    if blocks == 14:
        assert any(plan.preempted for plan in plans)
    for group in groups:
        outputs = [tuple(got[sequence.id]) for sequence in group.sequences()]
        assert len(set(outputs)) == 3
        for sequence in group.sequences():
            alone, reference, _ = serve(tiny, [sequence], 60)
            for i, (mine, theirs) in enumerate(zip(got[sequence.id], alone[sequence.id], strict=True)):
                difference = (logits[sequence.id, i] - reference[sequence.id, i]).abs().max()
                assert difference < MARGIN, f"{sequence.id}, token {i}: logits differ by {difference}"
                if mine != theirs:  # a draw on the very edge: what follows isn't comparable
                    break
            else:
                continue
            assert i > 0


def test_without_the_copy_they_would_differ(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Request(id="a", prompt=Prompt.of(range(11)), output_len=6, n=2, sampling=HOT)
    right, reference, _ = serve(tiny, [group], 60, prefix_cache=False)
    monkeypatch.setattr("real_engine.kv_memory.KvMemory.copy", lambda *args: None)
    _, logits, _ = serve(tiny, [group], 60, prefix_cache=False)
    assert (logits["a#2", 0] - reference["a#2", 0]).abs().max() > MARGIN
    assert right["a#1"] != right["a#2"]
