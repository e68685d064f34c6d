"""A planted error is found by the tool, not by the reader: its cause stands in the first sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lab.analysis import Diff, Run, load
from lab.analysis.causes import cause
from lab.analysis.verdict import verdict
from lab.assembly import EngineSpec
from lab.diff import compare
from lab.diff import main as command
from lab.experiment import main
from lab.session import Side, run_side
from sim.backend import SimBackend
from sim.cost.linear import LinearCost
from sim.cost.model import CostModel
from sim.fitted import REFERENCE
from sim.recorded import recorded_capacity

WORDS = (
    *("backend=sim", "cost=reference", "run.report=false", "trace=poisson", "trace.n=50", "trace.rate=6"),
    *("trace.prefix_tokens=64", "trace.prefix_groups=6", "kv.blocks=200"),
    *("trace.prompt.high=700", "trace.output.high=120"),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("planted") / "before"
    assert main([*WORDS, f"run.dir={out}"]) == 0
    return load(out)


def again(
    run: Run,
    out: Path,
    change: Callable[[EngineSpec], EngineSpec] = lambda spec: spec,
    cost: CostModel | None = None,
) -> Run:
    """The run once more with something changed that its configuration doesn't tell."""
    side = Side(
        backend=SimBackend(cost or LinearCost.load(REFERENCE), recorded_capacity(run), "modelled", {}),
        spec=change(EngineSpec.of(run.config)),
        requests=run.workload(),
        config_text=yaml.safe_dump(dict(run.config), sort_keys=False),
        model="",
    )
    run_side(side, out, None)
    return load(out)


def first_words(d: Diff) -> str:
    assert verdict(d)[0] == cause(d)
    return cause(d)


def test_a_run_made_again_differs_by_nothing(plain: Run, tmp_path: Path) -> None:
    d = compare(plain, again(plain, tmp_path / "after"))
    assert cause(d) == ""
    assert d.aligned.edit_distance == 0
    assert d.terms.empty
    assert not d.requests[[c for c in d.requests if str(c).endswith("_delta_ns")]].to_numpy().any()


def test_a_scaled_term_of_the_cost_model_is_named_with_its_factor(plain: Run, tmp_path: Path) -> None:
    true = LinearCost.load(REFERENCE)
    forward = dict(true.coefficients["forward_ns"])
    scaled = {**true.coefficients, "forward_ns": {**forward, "rows": forward["rows"] * 0.15}}
    d = compare(plain, again(plain, tmp_path / "after", cost=LinearCost(scaled)))
    words = first_words(d)
    assert "forward time for each token" in words
    term = d.terms.iloc[0]
    assert term["explained"] > 0.999
    assert term["delta_ns"] == pytest.approx(-0.85 * forward["rows"], rel=1e-3)
    assert d.parity is True
    assert d.counterfactual is not None
    assert d.counterfactual["e2e_ms.mean"]["decision"] == 0


def test_a_budget_off_by_one_is_named(plain: Run, tmp_path: Path) -> None:
    def smaller(spec: EngineSpec) -> EngineSpec:
        return replace(spec, limits=replace(spec.limits, token_budget=spec.limits.token_budget - 1))

    d = compare(plain, again(plain, tmp_path / "after", smaller))
    assert "the step's token budget: before took 512 tokens, after 511" in first_words(d)
    assert any("made by other code" in sentence for sentence in verdict(d))
    assert d.counterfactual is None  # the rule that differs was never run again
    assert any("can't be separated" in sentence for sentence in verdict(d))


def test_a_changed_rule_of_the_prefix_cache_is_named(plain: Run, tmp_path: Path) -> None:
    d = compare(plain, again(plain, tmp_path / "after", lambda spec: replace(spec, prefix_cache=False)))
    assert "the prefix cache: it supplied" in first_words(d)
    assert d.attribution["ttft"]["stages"]["cache"]["mean_ms"] > 0
    assert d.attribution["ttft"]["residual_ns"] == 0


def test_a_reversed_tie_break_of_eviction_is_named(plain: Run, tmp_path: Path) -> None:
    def turned(spec: EngineSpec) -> EngineSpec:
        return replace(spec, policies={**spec.policies, "eviction": {"name": "lru_head"}})

    d = compare(plain, again(plain, tmp_path / "after", turned))
    assert "evicted" in first_words(d)


def test_the_first_lines_of_the_command_name_it(
    plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = again(plain, tmp_path / "after", lambda spec: replace(spec, prefix_cache=False))
    capsys.readouterr()
    assert command([str(plain.path), str(after.path)]) == 0
    assert capsys.readouterr().out.startswith("- Cause: a rule differs: the prefix cache: it supplied ")


OTHER = (
    *("backend=sim", "cost=reference", "run.report=false", "trace=poisson", "trace.n=60", "trace.rate=14"),
    *("trace.prefix_tokens=160", "trace.prefix_groups=4", "kv.blocks=150", "engine.max_seqs=6", "seed=5"),
    *("trace.prompt.high=500", "trace.output.high=90"),
)
"""Shorter prompts, longer common beginnings, more load, fewer slots."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("planted") / "busy"
    assert main([*OTHER, f"run.dir={out}"]) == 0
    return load(out)


@pytest.mark.parametrize("factor", [0.15, 0.7, 1.5])
@pytest.mark.parametrize(
    ("term", "unit"), [("rows", "token"), ("step", "step"), ("prefill_pairs", "query-key pair of prefill")]
)
def test_whichever_term_is_scaled_is_named(
    term: str, unit: str, factor: float, loaded: Run, tmp_path: Path
) -> None:
    true = LinearCost.load(REFERENCE)
    forward = dict(true.coefficients["forward_ns"])
    scaled = {**true.coefficients, "forward_ns": {**forward, term: forward[term] * factor}}
    d = compare(loaded, again(loaded, tmp_path / "after", cost=LinearCost(scaled)))
    assert f"forward time for each {unit}" in first_words(d)
    assert d.terms.iloc[0]["delta_ns"] == pytest.approx((factor - 1) * forward[term], rel=1e-2)


LIMITS: list[tuple[dict[str, int], str]] = [
    ({"token_budget": 511}, "the step's token budget: busy took 512 tokens, after 511"),
    ({"token_budget": 513}, "the step's token budget: busy took 512 tokens, after 513"),
    ({"token_budget": 256}, "the step's token budget: busy took 323 tokens, after 256"),
    ({"max_seqs": 5}, "how many requests may run: 6 in busy, 5 in after"),
    ({"max_seqs": 7}, "how many requests may run: 6 in busy, 7 in after"),
]


@pytest.mark.parametrize(("change", "said"), LIMITS)
def test_whichever_limit_is_off_is_named(
    change: dict[str, int], said: str, loaded: Run, tmp_path: Path
) -> None:
    def turned(spec: EngineSpec) -> EngineSpec:
        return replace(spec, limits=replace(spec.limits, **change))

    assert said in first_words(compare(loaded, again(loaded, tmp_path / "after", turned)))


@pytest.mark.parametrize("eviction", ["lru_head", "fifo", "lfu"])
def test_another_order_of_eviction_is_named(eviction: str, loaded: Run, tmp_path: Path) -> None:
    def turned(spec: EngineSpec) -> EngineSpec:
        return replace(spec, policies={**spec.policies, "eviction": {"name": eviction}})

    words = first_words(compare(loaded, again(loaded, tmp_path / "after", turned)))
    assert "which cached KV blocks are evicted" in words or "the prefix cache: it supplied" in words


def test_the_prefix_cache_is_named_under_load(loaded: Run, tmp_path: Path) -> None:
    d = compare(loaded, again(loaded, tmp_path / "after", lambda spec: replace(spec, prefix_cache=False)))
    assert "the prefix cache: it supplied" in first_words(d)


def test_what_was_configured_otherwise_is_no_planted_rule(plain: Run, tmp_path: Path) -> None:
    assert main([*WORDS, "policy=sjf", f"run.dir={tmp_path / 'sjf'}"]) == 0
    d = compare(plain, load(tmp_path / "sjf"))
    assert "the policies differ as configured (policy.name fcfs / sjf" in first_words(d)
    assert d.counterfactual is not None
    assert d.counterfactual["e2e_ms.mean"]["duration"] == 0  # one cost model: borrowed durations are no error
    assert "all of it from decisions" in repr(d)
    assert not any("something other than time" in sentence for sentence in verdict(d))
