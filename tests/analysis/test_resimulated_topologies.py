"""Runs of every topology simulated again: on their own durations nothing differs, on another's the parts add up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import compose, topology
from lab.analysis import load
from lab.analysis.runs import Run
from lab.config import Config
from lab.control.plan import StepPlan, StepTiming, Work
from lab.diff import compare
from lab.errors import ReplayError
from lab.experiment import experiment
from lab.observe.recorder import Recorder, by_entry
from lab.topology import Slot
from lab.validation import validate
from sim.cost.replay import RecordedCost
from sim.recorded import recorded_costs
from sim.resimulate import resimulate
from tests.analysis.test_resimulated import exact

SMALL = (
    "backend=sim", "cost=physical", "cost.model=llama-3.1-8b", "run.report=false", "trace=poisson", "trace.n=40",
    "trace.rate=40", "trace.prefix_tokens=64", "trace.prompt.mean=900", "trace.output.mean=24",
)  # fmt: skip
TURNS = ("routing=least_tokens",)
EXPERTS = ("cost.model=qwen3-30b-a3b",)
SLOW = ("topology.link.gb_s=2",)
TIGHT = ("kv.blocks=400",)
GROWS = ("scaling=concurrency", "scaling.per_replica=3", "scaling.interval_s=0.1", "scaling.down_s=0.2")
COLD = ("fleet.cold_start_s=0.15",)
LAYERWISE = ("topology.link.layerwise=true",)
BY_NODE = ("topology.groups.prefill.nodes=[0,1]", "topology.groups.decode.nodes=[0,1]")


def lost(*planned: tuple[int, float, float | None]) -> str:
    words = [
        f"{{replica: {replica}, at_s: {at}, back_s: {'null' if back is None else back}}}"
        for replica, at, back in planned
    ]
    return f"fleet.failures=[{', '.join(words)}]"


LOST = lost((1, 0.4, 0.1))


def usual(name: str) -> tuple[str, ...]:
    experts = EXPERTS if "ep" in name else ()
    return (f"topology={name}", *experts, *(() if name == "single" else TURNS))


CASES = {
    **{name: usual(name) for name in topology.TOPOLOGIES},
    "slow link": (*usual("pd_2p2d"), *SLOW, *TIGHT),
    "layerwise": (*usual("pd_2p2d"), *LAYERWISE),
    "layerwise over a slow link": (*usual("pd_hetero"), *LAYERWISE, *SLOW, *TIGHT),
    "by node": (*usual("pd_2p2d"), *BY_NODE),
    "over a switch": (*usual("pd_2p2d"), *BY_NODE, *LAYERWISE, "topology.link.switch_gb_s=2"),
    "scaled apart": (
        *usual("pd_1p1d"), "topology.groups.decode.most=3", "topology.groups.prefill.most=2", *GROWS, *COLD,
    ),
    "scaled together": (*usual("dp2"), "topology.groups.replica.most=4", *GROWS, *COLD),
    "replicas without groups": ("fleet.replicas=3", "routing=power_of_two", "fleet.noise=0.3", "fleet.refresh_ms=20"),
    "lost": ("fleet.replicas=3", *TURNS, lost((1, 0.4, None), (0, 0.7, 0.1)), *COLD),
    "lost while KV moves": (*usual("pd_2p2d"), *SLOW, lost((2, 0.5, 0.1), (0, 0.8, None)), *COLD),
    "lost layer by layer": (*usual("pd_2p2d"), *LAYERWISE, *SLOW, lost((0, 0.5, 0.1), (3, 0.8, 0.1)), *COLD),
    "lost in steps of any length": (
        *usual("pd_2p2d"), *LAYERWISE, *SLOW, lost((0, 0.5, 0.1), (1, 0.8, 0.1)), *COLD, "engine.token_budget=8192",
        "trace.prompt.high=8000", "trace.prompt.mean=2500",
    ),
    "blocks of their own": (
        *usual("pd_1p1d"), "topology.groups.decode.hardware=rtx_4090", "engine.memory_utilization=0.8",
    ),
    "lost and scaled": (
        *usual("pd_hetero"), "topology.groups.decode.most=4", lost((0, 0.5, 0.1), (1, 0.6, None)), *GROWS, *COLD,
    ),
    "groups of their own devices": (
        *usual("pd_1p1d"), "topology.groups.decode.tp=2", "topology.groups.prefill.pp=2",
    ),
    "preempted": (*usual("hetero"), "kv.blocks=130", "trace.rate=100"),
    "late": (*usual("pd_2p2d"), "mechanisms.async_scheduling=true", "mechanisms.api_ms=3", "mechanisms.warmup=0.5"),
}  # fmt: skip

Made = Callable[..., Run]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    root = tmp_path_factory.mktemp("topologies")
    done: dict[tuple[str, ...], Path] = {}
    with compose.composer() as composer:

        def one(*words: str) -> Run:
            if words not in done:
                done[words] = root / str(len(done))
                cfg: Config = composer.config([*SMALL, *words, f"run.dir={done[words]}"])
                validate(cfg)
                experiment(cfg)
            return load(done[words])

        yield one


def told(recorder: Recorder) -> dict[str, list[object]]:
    return {
        "steps": [
            (step.replica, step.plan.index, step.plan.digest, step.start, step.end) for step in recorder.steps
        ],
        "requests": [
            (r.request.id, r.outcome, r.reason, r.end, r.token_times, r.intervals, r.transfers, r.preemptions)
            for r in by_entry(recorder.requests)
        ],
        "fleet": list(recorder.fleet),
    }


def again(run: Run, durations: Run) -> dict[str, list[object]]:
    return told(resimulate(run, durations, None).recorder)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_on_its_own_durations_a_run_is_the_same_run(name: str, made: Made) -> None:
    run = made(*CASES[name])
    first, second = told(run.recorded()), again(run, run)
    for what in first:
        assert first[what] == second[what], what
    happened = {event.event for event in run.fleet_events()} | {e.reason for e in run.fleet_events()}
    assert ("failed" in happened) == ("fleet.failures" in str(CASES[name]))
    assert "start" in happened or "most" not in str(CASES[name])
    assert any(r.transfers for r in run.request_records()) == ("pd_" in str(CASES[name]))


SET = ("topology.link.gb_s=5", "topology.link.latency_us=9", "kv.blocks=400")
"""What would else follow from the devices."""


@pytest.mark.parametrize(
    "words",
    [
        ("topology=pd_hetero",),
        ("topology=pd_hetero", *LAYERWISE),
        ("topology=pd_2p2d", "topology.groups.decode.most=4", *GROWS, *COLD),
        ("topology=pd_2p2d", lost((0, 0.5, 0.1), (3, 0.8, 0.1)), *COLD),
    ],
)
def test_of_runs_that_differ_in_durations_alone_one_on_the_others_is_the_other(
    words: tuple[str, ...], made: Made
) -> None:
    a = made(*words, *TURNS, *SET)
    b = made(*words, *TURNS, *SET, "topology.groups.decode.hardware=l40s", "cost.layer_us=90")
    assert again(b, a) == told(a.recorded()) != told(b.recorded())


def test_a_step_that_was_not_recorded_takes_what_one_of_its_own_group_took(made: Made) -> None:
    """Of a group that grew, too."""
    words = "topology=hetero", *TURNS, "topology.groups.slow.most=4", *GROWS, *COLD
    a, b = made(*words), made(*words, "policy=sjf", "trace.rate=80")
    slow = [by_device(recorder) for recorder in (a.recorded(), resimulate(b, a, None).recorder)]  # type: ignore[attr-defined]
    for fast, other in slow:
        assert fast
        assert fast.isdisjoint(other)
    assert slow[1][0] <= slow[0][0]
    assert slow[1][1] <= slow[0][1]


def by_device(recorder: Recorder) -> tuple[set[int], set[int]]:
    """How long steps took on the first replica, and on the others."""
    return (
        {step.timing.total_ns for step in recorder.steps if step.replica == 0},
        {step.timing.total_ns for step in recorder.steps if step.replica},
    )


def test_where_no_group_has_the_name_one_of_the_same_role_lends(made: Made) -> None:
    run = made(*CASES["pd_hetero"])
    prompts, decodes = by_device(run.recorded())
    places = [Slot("prefill", "prefill"), Slot("x", "decode"), Slot("x", "prefill"), Slot("x", "mixed")]
    plans = [
        StepPlan(0, 0, (Work("r", start, tokens, True),), "d") for start, tokens in ((0, 2000), (2000, 1))
    ]
    took = [{cost.step_time(plan).total_ns for plan in plans} for cost in recorded_costs(run, places)]
    for which, those in zip(took, (prompts, decodes, prompts, prompts | decodes), strict=True):
        assert which <= those
    assert took[3] & prompts
    assert took[3] & decodes


def test_a_first_step_that_was_cut_off_and_done_elsewhere_took_its_own_time_on_each(made: Made) -> None:
    first = made(*CASES["hetero"]).recorded().steps[0]
    run = made(*CASES["hetero"], lost((first.replica, first.start / 1e9 + 1e-3, None)))
    recorded = run.recorded()
    ((replica, digest, ns),) = json.loads((run.path / "cost.json").read_text())["lost_steps"]
    assert (replica, digest, ns) == (first.replica, first.plan.digest, first.timing.total_ns)
    again_there = recorded.steps[0]
    assert again_there.plan.digest == digest
    assert again_there.timing.total_ns > ns * 1.2
    assert again(run, run) == told(recorded)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("topology=dp4",), ("topology=pd_2p2d",)),
        (("topology=pd_2p2d",), ("topology=pd_2p2d", *SLOW)),
        (("topology=pd_hetero", *TIGHT), ("topology=pd_hetero", *TIGHT, "policy=sjf", "cost.layer_us=90")),
        (("topology=dp4",), ("topology=dp4", LOST)),
    ],
)
def test_the_split_of_an_error_adds_up(
    left: tuple[str, ...], right: tuple[str, ...], made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(made(*left, *TURNS), made(*right, *TURNS))
    assert "not re-simulated" not in capsys.readouterr().err
    assert found.counterfactual
    exact(found)
    told = any(option.startswith(("topology.", "fleet.")) for option in found.configuration)
    assert told == (left[0] != right[0] or "policy=sjf" not in right)
    assert ("decisions and the topology" in repr(found)) == told


def test_two_that_began_alike_keep_their_own_durations() -> None:
    timings = [StepTiming(0, 0, took, 0, 0) for took in (5, 7)]
    cost = RecordedCost(["d", "d"], timings, [(1, 0, 1)] * 2, [0, 1], {2: {"d": StepTiming(0, 0, 9, 0, 0)}})
    plan = StepPlan(0, 0, (), "d")
    assert [cost.another(n).step_time(plan).forward_ns for n in range(4)] == [5, 7, 9, 5]


def test_what_an_old_run_lacks_is_said_in_one_sentence(made: Made, tmp_path: Path) -> None:
    run = made(*CASES["lost while KV moves"])
    for name, key, said in (
        ("cost.json", "lost_steps", "cut off"),
        ("environment.json", "replicas", "blocks"),
    ):
        old = tmp_path / name
        shutil.copytree(run.path, old)
        content = json.loads((old / name).read_text())
        del (content["backend"] if name == "environment.json" else content)[key]
        (old / name).write_text(json.dumps(content))
        with pytest.raises(ReplayError, match=said) as caught:
            resimulate(load(old), load(old), None)
        assert "\n" not in str(caught.value)
    (tmp_path / "cost.json" / "cost.json").write_text('{"lost_steps": [[0, "digest"]]}')
    with pytest.raises(ReplayError, match="cut off"):
        resimulate(run, load(tmp_path / "cost.json"), None)


def test_a_run_that_was_simulated_again_can_be_once_more(made: Made, tmp_path: Path) -> None:
    run = made(*CASES["lost in steps of any length"])
    resimulate(run, run, tmp_path / "again")
    once = load(tmp_path / "again")
    cut = [json.loads((each.path / "cost.json").read_text())["lost_steps"] for each in (run, once)]
    assert cut[0] == cut[1] != []
    assert again(once, once) == told(run.recorded())
