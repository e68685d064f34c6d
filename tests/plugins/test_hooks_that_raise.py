"""A policy may raise in any hook of any kind: the run ends in one sentence, and keeps what it had recorded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import experiment
from lab.analysis import load
from lab.observe.claim import partial_reason
from lab.testing import check_policy
from lab.testing.contracts import KINDS

PARENTS = {
    "policy": "policies.scheduling.fcfs:Fcfs",
    "eviction": "policies.eviction.lru:Lru",
    "compression": "policies.compression.streaming_llm:StreamingLlm",
    "preemption": "lab.policy:PreemptionPolicy",
    "predictor": "policies.prediction.oracle:Oracle",
    "admission": "policies.admission.always:Always",
    "routing": "policies.routing.least_requests:LeastRequests",
    "scaling": "policies.scaling.fixed:Fixed",
}
ENGINE = ["backend=sim", "trace=poisson", "trace.n=30", "trace.rate=20", "fleet.most=2"]
TIGHT = ["trace.prompt.mean=24", "trace.output.mean=60", "kv.blocks=24", "kv.host_blocks=8"]
SOURCE = """from {module} import {parent}


class Raises({parent}):
    calls = 0

    def {hook}(self, *args):
        self.calls += 1
        if self.calls > {after}:
            raise LookupError("lost my notes")
        return super().{hook}(*args)
"""
LINE = SOURCE.splitlines().index('            raise LookupError("lost my notes")') + 1


def hooks() -> Iterator[tuple[str, str]]:
    for kind, each in KINDS.items():
        for name, _ in inspect.getmembers(each.base, inspect.isfunction):
            if not name.startswith("_") and name != "score":  # which the data plane calls
                yield kind, name


def written(folder: Path, kind: str, hook: str, after: int) -> Path:
    module, _, parent = PARENTS[kind].partition(":")
    path = folder / "mine.py"
    path.write_text(SOURCE.format(module=module, parent=parent, hook=hook, after=after))
    return path


@pytest.mark.parametrize(("kind", "hook"), list(hooks()))
def test_a_run_ends_with_name_place_and_line_and_keeps_its_records(
    kind: str, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    after = 0 if hook in ("on_open", "target") else 1
    written(tmp_path, kind, hook, after)
    spread = [] if kind == "routing" else ["routing=round_robin"]
    spread += ["kv.prefix_cache=false"] if kind == "compression" else []
    code = experiment.main([*ENGINE, *TIGHT, *spread, f"{kind}=./mine.py", "run.dir=out"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert len(errors) == 1, errors
    said = errors[0]
    assert "LookupError: lost my notes" in said
    assert re.search(rf"mine\.py:{LINE}\b", said), said
    assert "Raises" in said or "mine.py'" in said, said
    if hook == "on_open":  # before anything began: there is no run yet
        return
    assert f"mine.py:{LINE}" in (partial_reason(tmp_path / "out") or "")
    if kind not in ("admission", "routing", "scaling"):
        assert re.search(r"step \d+|request '", said), said
    run = load(tmp_path / "out")
    at_step = re.search(r"step (\d+)", said)
    if at_step:
        # Every step committed before it. (At commit, the step's own index is already the next one's.)
        assert int(at_step[1]) - 1 <= len(run.steps) <= int(at_step[1])
    ended = run.requests[run.requests["outcome"] == "finished"]
    assert len(run.requests) >= len(ended)
    if hook == "on_finish":
        assert len(ended) >= 2


@pytest.mark.parametrize(("kind", "hook"), list(hooks()))
def test_the_kit_says_which_hook_raised_and_where(kind: str, hook: str, tmp_path: Path) -> None:
    report = check_policy(str(written(tmp_path, kind, hook, 0)), examples=8)
    assert [problem.contract for problem in report.problems] == ["raises"], str(report)
    problem = report.problems[0]
    assert f"{hook} raised LookupError: lost my notes" in problem.says
    assert problem.where.endswith(f"mine.py:{LINE}, in {hook}")
    assert problem.case is not None
    assert len(problem.case.requests) <= 3
