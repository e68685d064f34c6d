"""What the documents say is so."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from lab.observe.metrics import METRICS

ROOT = Path(__file__).parents[2]


def test_the_metrics_page_has_every_key_with_its_formula() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    for metric in METRICS:
        assert f"| `{metric.key}` | {metric.formula} | {metric.unit} |" in page


def test_where_the_readme_says_things_are_they_are() -> None:
    readme = (ROOT / "README.md").read_text()
    answers = {
        "Gateway.submit": "lab.control.gateway",
        "EngineCore.add": "lab.control.core",
        "EngineCore.plan": "lab.control.core",
        "BlockPool.take": "lab.state.blocks",
        "BlockPool.release": "lab.state.blocks",
        "BlockPool.evict": "lab.state.blocks",
        "Executor.execute": "lab.control.executor",
    }
    for name, module in answers.items():
        assert f"`{name}`" in readme
        owner, method = name.split(".")
        assert callable(getattr(getattr(importlib.import_module(module), owner), method))
    for path in re.findall(r"[\w/]+/\w+\.(?:py|md|json)", readme):
        assert (ROOT / path).exists(), f"the README names {path}"


@pytest.mark.parametrize(
    ("page", "least"),
    [("README.md", 6), ("docs/topology.md", 6), ("docs/gpu.md", 1), ("traces/README.md", 3)],
)
def test_every_option_that_a_page_sets_exists(page: str, least: int) -> None:
    from lab import compose

    text = (ROOT / page).read_text()
    blocks = re.findall(r"python -m lab\.experiment ((?:[^\n#`\\]|\\\n)*)", text)
    checked = 0
    with compose.composer() as composer:
        for block in blocks:
            words = shlex.split(block.replace("\\\n", " "))
            words = [w for w in words if "=" in w and "mine.py" not in w]
            words = [w for w in words if not w.startswith("policy.width")]
            if any(word.startswith("+experiment=") for word in words):
                continue  # needs experiments/conf: tests/experiment/test_studies.py
            for job in composer.jobs(words, sweep=True):
                composer.config(job)
                checked += 1
    assert checked >= least
