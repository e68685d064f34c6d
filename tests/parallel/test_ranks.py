"""Several processes answer as one does: same tokens, same digest, and a clear end when one of them fails."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from lab.config import Config, EngineConfig, KvConfig, ModelConfig
from lab.console import Console
from lab.control.core import EngineCore
from lab.control.plan import GENESIS, StepPlan, StepResult, Work
from lab.control.request import Prompt, Request, SamplingParams, Segment
from lab.control.step import Limits
from lab.errors import ConfigError, ExecutorError
from lab.policy import Step
from lab.validation import validate
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from real_engine.backend import build
from real_engine.executor import TorchExecutor
from real_engine.parallel.executor import ParallelExecutor, open_ranks
from tests.real_engine.reference import saved


class Swapping(Fcfs):
    """Every third step the newest request goes, to the host or for good."""

    def schedule(self, step: Step) -> None:
        running = list(step.running.values())
        if step.index % 3 == 2 and len(running) > 1:
            how = "swap" if step.index % 2 and step.host_blocks_left >= 12 else "recompute"
            step.preempt(running[-1], how)  # type: ignore[arg-type]
            for request in running[:-1]:
                step.run(request)
        else:
            super().schedule(step)


def config(tensor: int = 1, pipeline: int = 1, *, model: str = "tiny", blocks: int = 40) -> Config:
    return Config(
        model=ModelConfig(model, "float32"),
        engine=EngineConfig(
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            threads=1,
            attention="torch",
            rank_timeout_s=60.0,
        ),
        kv=KvConfig(blocks=blocks, block_size=4, host_blocks=30),
    )


def requests() -> list[Request]:
    """Pairs with a common beginning, some of which draw, and ask for log-probabilities."""
    hot = SamplingParams(temperature=0.7, top_p=0.9, seed=5, logprobs=2)
    return [
        Request(
            id=f"r{i}",
            prompt=Prompt((Segment(i // 2, 0, 16), Segment(100 + i, 0, 3 + 2 * i))),
            output_len=4 + i,
            sampling=hot if i % 3 == 0 else SamplingParams(logprobs=1),
        )
        for i in range(6)
    ]


def serve(
    executor: TorchExecutor | ParallelExecutor,
) -> tuple[dict[str, list[int]], list[float], list[StepPlan]]:
    """Tokens of each request, the drawn tokens' log-probabilities in order, and all plans."""
    core = EngineCore(Swapping(), Lru(), capacity=executor.capacity, limits=Limits(14, 4, 9))
    for request in requests():
        core.add(request, 0)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests()}
    logprobs: list[float] = []
    plans: list[StepPlan] = []
    while core.has_work:
        plan = core.plan(0)
        plans.append(plan)
        result = executor.execute(plan)
        logprobs += [item.chosen for _, item in sorted(result.logprobs.items())]
        for emission in core.commit(plan, result, 0):
            tokens[emission.request].append(emission.token)
    return tokens, logprobs, plans


def check_like_one_process(tensor: int, pipeline: int, model: str) -> None:
    one, one_logprobs, one_plans = serve(build(config(model=model), Console()))
    with closing(open_ranks(config(tensor, pipeline, model=model), Console())) as ranks:
        many, logprobs, plans = serve(ranks)
        assert many == one
        assert plans == one_plans
        assert ranks.digest == plans[-1].digest
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(one_logprobs), atol=1e-3, rtol=0)
        processes = [worker.process for worker in ranks.workers]
    assert any(plan.swap_in for plan in plans)
    assert any(how == "recompute" for plan in plans for _, how in plan.preempted)
    assert any(
        work.start % 16 == 0 < work.start for plan in plans for work in plan.work
    )  # after a prefix hit
    assert len(processes) == tensor * pipeline - 1
    assert [process.poll() for process in processes if process] == [0] * len(processes)


def test_two_ranks_give_the_tokens_of_one_process() -> None:
    check_like_one_process(2, 1, "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", "qwen3", "gemma3", "mixtral"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 2), (2, 1)])
def test_any_cut_gives_the_tokens_of_one_process(tensor: int, pipeline: int, family: str, root: Path) -> None:
    check_like_one_process(tensor, pipeline, "tiny" if family == "tiny" else str(saved(family, root)))


def first_step(executor: ParallelExecutor) -> StepResult:
    request = Request(id="a", prompt=Prompt.of(range(6)), output_len=9)
    return executor.execute(StepPlan(0, 0, (Work("a", 0, 6, True, (0, 1)),), GENESIS, (request,), ("a",)))


def test_a_killed_rank_ends_the_run_in_a_sentence_and_leaves_nobody() -> None:
    ranks = open_ranks(config(2), Console())
    with closing(ranks):
        result = first_step(ranks)
        assert [timing.rank for timing in result.ranks] == [0, 1]
        assert all(timing.communication_ns > 0 for timing in result.ranks)
        process = ranks.workers[0].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        words = rf"step 1: rank 1 \(process {process.pid}\) was killed by SIGKILL"
        with pytest.raises(ExecutorError, match=words):
            ranks.execute(StepPlan(1, 0, (Work("a", 6, 1, True),), GENESIS))
        assert time.monotonic() - began < 10
        with pytest.raises(ExecutorError, match="closed"):
            ranks.execute(StepPlan(4, 0, (), GENESIS))
    assert process.returncode == -signal.SIGKILL
    ranks.close()
    with closing(open_ranks(config(2), Console())) as again:  # nothing of it is left in this process
        assert first_step(again).tokens == result.tokens


def test_what_fails_on_another_rank_is_said_with_its_number(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = root / "without numbers"
    shutil.copytree(saved("llama", root), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))  # the last stage's
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with (
        closing(open_ranks(config(1, 2, model=str(path)), Console())) as ranks,
        pytest.raises(ExecutorError, match=r"rank 1 .*request 'a': the logits at position 6 aren't finite"),
    ):
        first_step(ranks)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "words"),
    [
        (3, 1, "engine.tensor_parallel is 3 and doesn't divide the model's query heads, 4"),
        (1, 3, "engine.pipeline_parallel is 3, and the model has 2 layers"),
    ],
)
def test_a_cut_that_the_model_does_not_allow_is_refused_before_any_rank_starts(
    tensor: int, pipeline: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        open_ranks(config(tensor, pipeline), Console())


def test_fewer_than_one_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.tensor_parallel is 0; expected at least 1"):
        validate(config(0))


def test_a_cache_too_large_for_a_rank_says_how_many_blocks_fit() -> None:
    with pytest.raises(ExecutorError, match=r"at most \d+ blocks fit"):
        open_ranks(config(2, blocks=10**12), Console())
