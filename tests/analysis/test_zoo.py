"""Fairness by its definitions, bounds, and labels that keep their distance."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.analysis.fairness import jain, max_min, service
from lab.analysis.studies.figures import BASE, GREY, highlighted
from lab.analysis.studies.labels import beside, rail, spread
from lab.analysis.studies.table import busy, tables
from lab.control.observer import FleetEvent
from tests.oracles.test_fairness import differences

SECOND = 1_000_000_000


def requests(rows: list[tuple[str, float, float, float, int, int]]) -> pd.DataFrame:
    """tenant, arrival, first token and end in seconds, prompt and output tokens."""
    frame = pd.DataFrame(
        rows, columns=["tenant", "arrival", "first", "end", "prompt_tokens", "output_tokens"]
    )
    for column, name in (("arrival", "arrival_ns"), ("first", "first_token_ns"), ("end", "end_ns")):
        frame[name] = (frame[column] * SECOND).round().astype("int64")
    return frame


def test_one_tenant_served_and_one_that_waits() -> None:
    # Windows are 10 s wide, 4.75 s apart; a is served 30 tokens/s from 0 to 100, b asks for as much in vain.
    found = service(
        requests([("a", 0, 0, 100, 1000, 1000), ("b", 0, 200, 300, 1000, 1000), ("a", 100, 100, 100, 1, 0)])
    )
    assert found.tenants == ["a", "b"]
    assert found.received[:, 0] == pytest.approx(30.0)
    assert found.received[:, 1] == pytest.approx(0.0)
    assert found.difference[0] == pytest.approx(
        30.0
    )  # b lacks 30 of the 300 that it asks for within the window
    assert found.difference[5] == pytest.approx(0.0)  # D counts what arrives within the window alone
    assert found.jain == pytest.approx(0.5)  # one of two has everything


def test_busy_is_of_the_time_that_replicas_were_up() -> None:
    steps = pd.DataFrame({"start_ns": [0, 40, 20, 90], "end_ns": [40, 100, 60, 130]})
    ready = [FleetEvent(0, 0, "ready", 2, "initial"), FleetEvent(20, 1, "start", 2, "")]
    # Between 10 and 110: 30 + 60 + 40 + 20 in steps; up for 100 and 90, or until one goes.
    assert busy(steps, ready, 10, 110) == pytest.approx(150 / 190)
    assert busy(steps, [*ready, FleetEvent(60, 1, "gone", 1, "")], 10, 110) == pytest.approx(150 / 140)
    assert busy(steps, [], 10, 110) == pytest.approx(1.5)


def test_equal_service_is_fair_and_so_is_an_idle_tenant() -> None:
    equal = requests([("a", 0, 0, 100, 0, 500), ("b", 0, 0, 100, 0, 500), ("c", 100, 101, 102, 1, 1)])
    assert service(equal).jain == pytest.approx(1.0)
    assert service(equal).difference[5] == pytest.approx(0.0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.floats(0, 600),
            st.floats(0, 80),
            st.floats(0.1, 120),
            st.integers(1, 900),
            st.integers(1, 400),
        ),
        min_size=2,
        max_size=30,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_difference_is_that_of_the_reference_on_its_ten_minutes(rows: list[Any]) -> None:
    whole = [("a", 0.0, 0.0, 1.0, 1, 1), *rows, ("a", 600.0, 0.0, 1.0, 1, 1)]
    frame = requests([(t, a, a + w, a + w + d, p, o) for t, a, w, d, p, o in whole])
    records: list[Any] = [
        SimpleNamespace(
            request=SimpleNamespace(
                tenant=row.tenant,
                prompt=range(row.prompt_tokens),
                output_limit=row.output_tokens,
                arrival=row.arrival_ns,
            ),
            token_times=[row.first_token_ns],
            end=row.end_ns,
        )
        for row in frame.itertuples()
    ]
    assert service(frame).difference == pytest.approx(differences(records), abs=1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(0, 1e7))
def test_max_min_shares_are_filled_like_water(wanted: list[float], total: float) -> None:
    shares = max_min(total, np.array(wanted))
    assert shares.sum() == pytest.approx(min(total, sum(wanted)), rel=1e-9, abs=1e-6)
    assert (shares <= np.array(wanted) + 1e-9).all()
    level = shares.max()
    for share, want in zip(shares, wanted, strict=True):  # who has less than the most has all that it wants
        assert share == pytest.approx(want, rel=1e-9, abs=1e-6) or share == pytest.approx(
            level, rel=1e-9, abs=1e-6
        )


def test_jain_is_between_one_nth_and_one() -> None:
    assert jain(np.array([5.0, 5.0, 5.0])) == pytest.approx(1)
    assert jain(np.array([5.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert jain(np.array([1.0, 2.0, 3.0])) == pytest.approx(36 / 42)
    assert jain(np.array([])) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.001, 0.2))
def test_spread_places_keep_their_order_and_distance_and_stay_inside(at: list[float], gap: float) -> None:
    places = spread(at, gap, 0.0, 1.0)
    if gap * (len(at) - 1) > 1:
        gap = 1 / (len(at) - 1)
    ordered = [place for _, _, place in sorted(zip(at, range(len(at)), places, strict=True))]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(ordered))
    assert min(places) >= -1e-9
    assert max(places) <= 1 + 1e-9
    if all(b - a >= gap for a, b in zip(sorted(at), sorted(at)[1:], strict=False)):
        assert places == pytest.approx(at)  # nobody moves without need


def texts(axis: Any) -> list[Any]:
    axis.figure.draw_without_rendering()
    return [text.get_window_extent() for text in axis.texts]


def clash(boxes: list[Any]) -> list[tuple[int, int]]:
    return [
        (i, j)
        for i, a in enumerate(boxes)
        for j, b in enumerate(boxes)
        if i < j and min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
    ]


@pytest.mark.parametrize("edge", ["top", "right"])
def test_labels_along_an_edge_do_not_overlap(edge: Any) -> None:
    from matplotlib.figure import Figure

    axis = Figure(figsize=(4.8, 4.8), layout="constrained").subplots()
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.normal(0.5, 0.03, size=(24, 2))]
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    rail(axis, edge, points, [f"policy_{i}" for i in range(24)], [GREY] * 24, [False] * 24, size=6)
    assert len(axis.texts) == 24
    assert clash(texts(axis)) == []


def test_labels_beside_points_do_not_overlap_and_equals_share_one() -> None:
    from matplotlib.figure import Figure

    axis = Figure(figsize=(4.8, 4.8)).subplots()
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    rng = np.random.default_rng(1)
    points = [(float(x), float(y)) for x, y in rng.uniform(0.2, 0.8, size=(20, 2))] + [(0.5, 0.5)] * 3
    names = [f"policy_{i}" for i in range(20)] + ["one", "two", "three"]
    beside(axis, points, names, [GREY] * 22 + [BASE])
    shown = [text.get_text().replace("\n", " ") for text in axis.texts]
    assert "one, two, three" in shown
    assert sorted(", ".join(shown).split(", ")) == sorted(names)
    assert clash(texts(axis)) == []


def test_the_best_five_and_the_baseline_have_colours_of_their_own() -> None:
    found = highlighted(["a", "b", "fcfs", "c", "d", "e", "f", "g"])
    assert found["fcfs"] == BASE
    assert [name for name, colour in found.items() if colour == GREY] == ["f", "g"]
    assert len({colour for colour in found.values() if colour != GREY}) == 6


def test_tables_are_sorted_and_average_over_seeds() -> None:
    rows = [
        {
            "workload": "w",
            "name": name,
            "seed": seed,
            "e2e_ms.mean": mean,
            "preemptions": n,
            "percent_of_srpt": 50.0,
        }
        for name, seed, mean, n in (
            ("slow", 0, 300.0, 1),
            ("slow", 1, 500.0, 3),
            ("fast", 0, 100.0, 0),
            ("fast", 1, 120.0, 0),
        )
    ]
    ((title, head, cells),) = tables(pd.DataFrame(rows))
    assert "means of 2 runs" in title
    assert head == ["", "E2E mean", "preempted", "% of SRPT"]
    assert cells == [["fast", "110.0", "0", "50.0"], ["slow", "400.0", "2", "50.0"]]
