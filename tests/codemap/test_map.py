"""The map, the code and a run agree; where they don't, something here fails."""

from __future__ import annotations

import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lab import tour as command
from lab.analysis import load
from lab.codemap import picture, text, walk, watch
from lab.codemap.answers import DECISIONS, WHERE, answers, control_point, hot_path
from lab.codemap.components import LAYERS, STATE, components
from lab.codemap.stops import PATHS, place, spans_at, stops
from lab.codemap.watch import Watched, seam, watched
from lab.config import SEAMS
from lab.errors import UnknownNameError
from lab.observe.boundaries import BOUNDARIES
from lab.observe.source import ROOT, first_sentence, locate

PACKAGES = ("lab", "sim", "real_engine", "policies")
STOPS = stops()


@pytest.fixture(scope="module")
def seen() -> Watched:
    return watched()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to break."""
    root = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.symbol.rpartition(":")[2])
def test_a_stop_is_where_the_map_says_and_speaks_a_sentence(stop: object) -> None:
    for symbol in filter(None, (stop.symbol, stop.contract, stop.twin)):  # type: ignore[attr-defined]
        at = locate(symbol)
        name = at.name.rpartition(".")[2]
        line = (ROOT / at.file).read_text(encoding="utf-8").splitlines()[at.line - 1]
        assert re.search(rf"\b(def|class) {name}\b", line), f"{at.file}:{at.line} is {line!r}"
    assert len(place(stop).doc.split()) >= 2  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.symbol.rpartition(":")[2])
def test_renaming_a_stop_breaks_the_map(stop: object, checkout: Path) -> None:
    symbol: str = stop.symbol  # type: ignore[attr-defined]
    file = checkout / symbol.partition(":")[0]
    before, name = file.read_text(encoding="utf-8"), symbol.rpartition(":")[2].rpartition(".")[2]
    file.write_text(re.sub(rf"\bdef {name}\(", f"def {name}_now(", before), encoding="utf-8")
    try:
        with pytest.raises(LookupError, match=name):
            place(stop, checkout)  # type: ignore[arg-type]
    finally:
        file.write_text(before, encoding="utf-8")


def test_the_whole_map_of_a_checkout_without_the_pool_fails(seen: Watched, checkout: Path) -> None:
    file = checkout / "lab/state/blocks.py"
    before = file.read_text(encoding="utf-8")
    assert "BlockPool.take" in text.tour(seen, checkout)
    file.unlink()
    try:
        with pytest.raises(LookupError, match=r"lab/state/blocks\.py"):
            text.tour(seen, checkout)
    finally:
        file.write_text(before, encoding="utf-8")


def test_moving_state_breaks_the_map(seen: Watched, checkout: Path) -> None:
    for symbol, held in STATE.items():
        file = checkout / symbol.partition(":")[0]
        before, name = file.read_text(encoding="utf-8"), held[0][0]
        file.write_text(re.sub(rf"\b{name}\b", f"{name}_now", before), encoding="utf-8")
        try:
            with pytest.raises(LookupError, match=name):
                components(seen, checkout)
        finally:
            file.write_text(before, encoding="utf-8")


def test_every_stop_is_passed_and_every_boundary_has_its_stop(seen: Watched) -> None:
    assert {stop.symbol for stop in STOPS if stop.symbol not in seen.visits} == {
        stop.symbol for stop in STOPS if stop.after or stop.elsewhere
    }
    assert {name for stop in STOPS for name in spans_at(stop)} == set(BOUNDARIES)
    elsewhere = {name for stop in STOPS if stop.elsewhere for name in spans_at(stop)}
    unseen = {name for name in BOUNDARIES if not seen.spans[name]}
    assert unseen == {"kv.compact"} | elsewhere  # what compresses can't swap
    for boundary in BOUNDARIES.values():
        on = [stop for stop in STOPS if boundary.emitted_at in (stop.symbol, stop.contract)]
        assert len(on) == 1, boundary.name
        assert boundary.path in on[0].paths


def test_calls_agree_with_what_was_recorded(seen: Watched) -> None:
    steps, recorder = seen.steps, seen.ran.recorder
    for name in ("commit", "observe"):
        assert seen.calls(f"lab/control/core.py:EngineCore.{name}") == steps
    assert seen.calls("sim/executor.py:SimExecutor.execute") == steps
    assert seen.calls("lab/control/gateway.py:Gateway.submit") == seen.requests == seen.spans["request"]
    assert seen.calls("lab/control/step.py:StepBuilder.preempt") == sum(
        r.preemptions for r in recorder.requests
    )
    assert seen.calls("lab/state/blocks.py:BlockPool.evict") == sum(step.evicted for step in recorder.steps)


def test_a_path_lists_callers_before_those_they_call(seen: Watched) -> None:
    for path in PATHS:
        order = [stop.symbol for stop, visit in text.ordered(seen, path) if visit is not None]
        for symbol in order:
            for asker in seen.visits[symbol].under:
                if asker in order and seen.visits[symbol].under[asker] == seen.calls(symbol):
                    assert order.index(asker) < order.index(symbol)
    request = [stop.symbol.rpartition(":")[2] for stop, _ in text.ordered(seen, "request")]
    wanted = [
        "Gateway.submit",
        "EngineCore.add",
        "serve",
        "EngineCore.plan",
        "SimExecutor.execute",
        "EngineCore.commit",
    ]
    assert [name for name in request if name in wanted] == wanted


def test_the_answers_are_the_ones_of_the_course(seen: Watched) -> None:
    found = {answer.question: [at.name for at in answer.places] for answer in answers(seen)}
    assert found["Where does a request enter?"] == ["Gateway.submit", "EngineCore.add"]
    assert found["Which is the global control point?"] == ["EngineCore.plan"]
    assert [name for name in found["Which is the hot path?"] if "Torch" not in name] == [
        "EngineCore.plan",
        "SimExecutor.execute",
        "EngineCore.commit",
        "EngineCore.observe",
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for question, symbols in WHERE:
        assert len(found[question]) >= len(symbols)
    for name in (
        "Gateway.submit",
        "EngineCore.add",
        "EngineCore.plan",
        "BlockPool.take",
        "BlockPool.release",
    ):
        assert f"`{name}`" in readme
        assert any(name in names for names in found.values())


def test_control_point_and_hot_path_come_from_the_run(seen: Watched) -> None:
    """Were blocks taken outside of planning, the answer would be another."""
    assert control_point(seen) == "lab/control/core.py:EngineCore.plan"
    visit = seen.visits["lab/state/blocks.py:BlockPool.take"]
    before = visit.inside.copy()
    visit.inside["lab/control/core.py:EngineCore.plan"] -= 1
    try:
        assert control_point(seen) == "lab/control/loop.py:serve"
    finally:
        visit.inside = before
    assert all(symbol in seen.visits for symbol in (*DECISIONS, *hot_path(seen)))


def test_watching_changes_nothing(seen: Watched, tmp_path: Path) -> None:
    again = watch.prepared(watch.WORDS, tmp_path / "run")()
    assert sys.getprofile() is None
    assert [step.plan.digest for step in again.recorder.steps] == [
        step.plan.digest for step in seen.ran.recorder.steps
    ]


def test_the_diagram_shows_every_component_call_and_control_point(seen: Watched) -> None:
    drawn = components(seen)
    whole = ET.fromstring(picture.svg(seen))
    said = [element.text or "" for element in whole.iter() if element.tag.endswith("}text")]
    for component in drawn.components.values():
        assert f"{component.place.file}:{component.place.line}" in said
        for kind, policy in component.control_points.items():
            assert f"{kind}: {policy}" in said
    assert set(LAYERS) <= set(said)
    paths = [
        e
        for e in whole.iter()
        if e.tag.endswith("}path") and e.get("marker-end") and e.get("d", "")[0] == "M"
    ]
    assert len(paths) == len(drawn.edges) + len(picture.HANDED) + 3  # three in the legend
    cells = picture._placed(drawn)
    assert len(set(cells.values())) == len(cells) == len(drawn.components)
    seams = {kind for component in drawn.components.values() for kind in component.control_points}
    assert seams == {seam(visit.symbol) for visit in seen.policies}
    names = {"policy": "scheduling", "predictor": "prediction"}
    assert seams == {names.get(name, name) for name in SEAMS} - {"compression"}
    assert drawn.components["lab/state/blocks.py:BlockPool"].layer == 1
    assert drawn.components["lab/control/core.py:EngineCore"].layer == 0


def test_mermaid_declares_every_node_that_an_arrow_touches(seen: Watched) -> None:
    lines = picture.mermaid(seen).splitlines()
    nodes = {match[1] for line in lines if (match := re.match(r"    (\w+)[\[{]", line))}
    ends = [
        re.findall(r"\b(\w+)\b", re.sub(r'\|[^|]*\||"[^"]*"', "", line))
        for line in lines
        if any(arrow in line for arrow in ("--", "-.", "==>"))
    ]
    assert len(ends) > 20
    assert {name for pair in ends for name in pair} <= nodes
    assert sum("subgraph" in line for line in lines) == sum(line == "  end" for line in lines) == 3


def test_a_walk_shows_every_span_of_its_request_and_where_each_comes_from(seen: Watched) -> None:
    said = walk.walk(seen.ran.recorder, seen.ran.info)
    record = max(seen.ran.recorder.requests, key=lambda record: record.preemptions)
    assert record.preemptions
    assert said.startswith(f"Request '{record.request.id}'")
    stretches = re.findall(r"\+([\d.]+) ms +request\.(?:queue|prefill|decode) ", said)
    whole = re.search(r"\+([\d.]+) ms +request ", said)
    assert len(stretches) == len(record.intervals)
    assert whole
    assert sum(map(float, stretches)) == pytest.approx(float(whole[1]), abs=0.01)
    for name in ("step.plan", "kv.allocate", "kv.transfer", "step.forward", "step.commit"):
        assert f" {name} " in said
    places = set(re.findall(r"(\w[\w/]+\.py):(\d+) ([\w.]+):", said))
    assert len(places) > 6
    for file, line, name in places:
        assert f" {name.rpartition('.')[2]}(" in (ROOT / file).read_text().splitlines()[int(line) - 1]
    with pytest.raises(UnknownNameError, match="did you mean 'r000003'"):
        walk.walk(seen.ran.recorder, seen.ran.info, "r00003")


def test_a_run_on_disk_walks_like_the_run_it_was(tmp_path: Path) -> None:
    ran = watch.prepared(watch.WORDS, tmp_path / "run")()
    run = load(tmp_path / "run")
    here, there = (
        walk.walk(ran.recorder, ran.info, "r000005"),
        walk.walk(run.recorded(), walk.info_of(run), "r000005"),
    )
    assert here.splitlines()[1:] == there.splitlines()[1:]


def test_the_command_prints_draws_and_complains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--svg", str(tmp_path / "map.svg"), "--mermaid", "-"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "flowchart TB"
    assert ET.parse(tmp_path / "map.svg").getroot().tag.endswith("}svg")
    assert command.main([]) == 0
    assert "Which is the hot path?" in capsys.readouterr().out
    assert command.main(["--trace", "nobody"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown request 'nobody'")
    assert command.main(["somewhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One."),
        ("A file (e.g. `x.py`) of one thing. More.", "A file (e.g. `x.py`) of one thing."),
        ("Wrapped\nover lines.\n\nMore.", "Wrapped over lines."),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence
