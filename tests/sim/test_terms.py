"""What a modelled step is made of: the terms add up to it, and stand in its table and its span."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.analysis.runs import load
from lab.compose import composer
from lab.control.plan import TERMS
from lab.experiment import experiment
from lab.validation import validate
from sim.cost.terms import StepCost

WORDS = [
    "backend=sim", "cost=physical", "cost.model=llama-3.1-8b", "trace=poisson", "trace.n=20", "trace.rate=40",
    "kv.blocks=80", "kv.host_blocks=400", "preemption.mode=swap", "mechanisms.warmup=0.5",
]  # fmt: skip


def test_terms_are_those_of_the_cost_model() -> None:
    assert StepCost._fields == TERMS


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_terms_add_up_to_the_step(layout: str, tmp_path: Path) -> None:
    with composer() as composing:
        cfg = composing.config([*WORDS, f"topology={layout}", f"run.dir={tmp_path / 'run'}"])
    validate(cfg)
    experiment(cfg)
    run = load(tmp_path / "run")
    steps = run.step_records()
    assert len(steps) > 20
    for step in steps:
        assert sum(step.timing.terms) == pytest.approx(step.timing.execute_ns, abs=len(TERMS))
    totals = {name: sum(step.timing.terms[place] for step in steps) for place, name in enumerate(TERMS)}
    assert min(totals[name] for name in ("weights", "attention", "kv_read", "host", "transfer")) > 0
    assert (totals["collectives"] > 0) == (layout != "single")
    assert run.steps["weights_term_ns"].sum() == totals["weights"]
    spans = run.spans[run.spans["name"] == "step.execute"]["attributes"]
    assert sum(json.loads(attributes)["lab.cost.weights_ns"] for attributes in spans) == totals["weights"]
