"""Composition as a property: valid values arrive typed, and survive `config.yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lab import compose, config
from lab.errors import ConfigError
from lab.validation import validate

VALUES = {
    "seed": st.integers(0, 2**31),
    "engine.token_budget": st.integers(1, 10**6),
    "engine.chunk": st.none() | st.integers(1, 10**6),
    "kv.blocks": st.none() | st.integers(1, 10**6),
    "kv.prefix_cache": st.booleans(),
    "slo.ttft_ms": st.none() | st.floats(0.1, 1e6),
    "trace.limit": st.none() | st.integers(1, 10**6),
    "trace.rate_scale": st.floats(0.01, 100),
    "sampling.temperature": st.floats(0, 2),
    "policy": st.sampled_from(["fcfs", "sjf", "priority", "policies.scheduling.edf:EarliestDeadlineFirst"]),
    "model": st.sampled_from(["smollm2", "tiny", "org/name", "./some/dir"]),
    "model.dtype": st.sampled_from(["bfloat16", "float32"]),
}
CHOSEN = st.fixed_dictionaries({}, optional=VALUES)


def words(values: dict[str, object]) -> list[str]:
    plain = {None: "null", True: "true", False: "false"}
    return [f"{k}={plain[v] if v is None or isinstance(v, bool) else v}" for k, v in values.items()]  # type: ignore[index]


@settings(max_examples=25, deadline=None)
@given(CHOSEN)
def test_typed_values_arrive_and_survive_the_file(values: dict[str, object]) -> None:
    with compose.composer() as composer:
        cfg = composer.config(words(values))
    validate(cfg)
    for key, value in values.items():
        found = cfg
        for part in (f"{key}.name" if key in compose.GROUPS else key).split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)
    again = OmegaConf.to_container(OmegaConf.create(compose.to_yaml(cfg)))
    assert again == OmegaConf.to_container(OmegaConf.structured(cfg))


@settings(max_examples=15, deadline=None)
@given(CHOSEN, st.randoms())
def test_order_of_options_does_not_matter(values: dict[str, object], random: object) -> None:
    line = words(values)
    shuffled = list(line)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    with compose.composer() as composer:
        assert composer.config(line) == composer.config(shuffled)


def test_sweeps_are_products_of_lists_ranges_and_globs() -> None:
    with compose.composer() as composer:
        jobs = composer.jobs(
            ["policy=fcfs,sjf", "seed=range(3)", "eviction=glob(lf*)", "kv.blocks=4"], sweep=True
        )
    assert len(jobs) == 2 * 3 * 2  # lfu and lfu_perfect
    assert ["policy=sjf", "seed=2", "eviction=lfu", "kv.blocks=4"] in jobs


def test_one_composer_makes_each_job_anew(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from lab.policy import SchedulingPolicy\n"
        "class Mine(SchedulingPolicy):\n    def __init__(self, window: int = 1) -> None: ...\n"
    )
    with compose.composer() as composer:
        mine = composer.config([f"policy={path}:Mine", "policy.window=5"])
        assert composer.config([]).policy.name == "fcfs"
        assert composer.config([f"policy={path}:Mine"]).policy.window == 1
        assert mine.policy.window == 5


def test_a_required_parameter_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from lab.policy import SchedulingPolicy\n"
        "class Mine(SchedulingPolicy):\n    def __init__(self, window: int) -> None: ...\n"
    )
    with compose.composer() as composer, pytest.raises(ConfigError, match=r"policy\.window must be given"):
        composer.config([f"policy={path}:Mine"])


def test_cache_directory_follows_option_then_environment(tmp_path: Path) -> None:
    cfg = config.Config()
    assert config.cache_dir(cfg, {"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "diptych"
    assert config.cache_dir(cfg, {}) == Path.home() / ".cache" / "diptych"
    cfg.cache_dir = str(tmp_path / "mine")
    assert config.cache_dir(cfg, {"XDG_CACHE_HOME": "elsewhere"}) == tmp_path / "mine"
