"""The page in a real browser: it stands, asks for nothing, tells what lies under the pointer, zooms and loads soon."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.analysis import report
from lab.analysis.diff import diff
from lab.analysis.page.embed import WITHOUT, available
from lab.analysis.report import write_report
from tests.analysis.browser import CHROMIUM, TOOLTIPS, Browser, Page
from tests.analysis.toy import pair, toy_run

browses = pytest.mark.skipif(not CHROMIUM or not available(), reason="needs Chromium and Bokeh")


VIEWS = "[...Bokeh.index.roots].filter(view => view.model.type === 'Figure')"


def facts_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="facts">(.*?)</script>', page, re.S)
    assert found
    return dict(json.loads(found.group(1)))


@pytest.fixture(scope="module")
def two_sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two sides that part, with preemptions, and names that try to be HTML."""
    real, sim, again = pair(1, count=60, blocks=60)
    path = tmp_path_factory.mktemp("page") / "report.html"
    for run in (real, sim):
        run.requests["id"] = run.requests["id"].replace("r0001", "<img src=x onerror=alert(1)>")
        run.requests["tenant"] = ["a", "b"] * 30
        run.plans["request"] = [
            [name.replace("r0001", "<img src=x onerror=alert(1)>") for name in batch]
            for batch in run.plans["request"]
        ]
    write_report(path, [real, sim], diff(real, sim, again))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser"), height=1000) as running:
        yield running


def frame(page: Page, name: str) -> dict[str, float]:
    """Where a chart's frame lies in the window: the lanes' or the strip of steps."""
    place = {"lanes": 1, "steps": 2}[name]
    code = f"""(() => {{
      const view = {VIEWS}[{place}], box = view.el.getBoundingClientRect(), f = view.frame.bbox;
      return {{x: box.x + f.x0, y: box.y + f.y0, width: f.width, height: f.height}};
    }})()"""
    page.run("document.getElementById('timeline').scrollIntoView()")
    found = page.run(code)
    assert isinstance(found, dict)
    return found


def window(page: Page) -> tuple[float, float]:
    found = page.run("diptych.window()")
    return found["from"], found["to"]


def settle(page: Page) -> None:
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@browses
def test_every_chart_stands_and_nothing_complains_or_is_asked_for(two_sides: Path, browser: Browser) -> None:
    page = browser.open(two_sides)
    count = page.run(f"{VIEWS}.length")
    assert count == 3 + 2 + 2 + 2 + 1 + 2 + 4 + 2
    assert page.run(f"{VIEWS}.every(view => view.frame.bbox.width > 200)")
    titles = page.run(f"{VIEWS}.map(view => view.model.title.text).join('|')")
    for words in ("Requests, in order", "Steps", "Prompt tokens in the batch", "real: KV blocks", "waiting",
                  "prefix cache", "Jain", "TTFT", "mean error"):  # fmt: skip
        assert words in titles
    lefts = page.run(f"{VIEWS}.slice(0, 12).map(v => v.frame.bbox.x0 + ':' + v.frame.bbox.x1)")
    assert len(set(lefts)) == 1, "charts over time stand below each other"
    assert page.run("document.querySelectorAll('.architecture .box').length") > 10
    assert page.complaints() == []
    assert page.asked_for() == []


@browses
def test_hovering_tells_of_requests_and_steps_and_a_click_shows_the_batch(
    two_sides: Path, browser: Browser
) -> None:
    page = browser.open(two_sides)
    seen: set[str] = set()
    lanes = frame(page, "lanes")
    for part in range(1, 40):
        page.mouse(
            "mouseMoved", lanes["x"] + lanes["width"] * part / 40, lanes["y"] + lanes["height"] * part / 40
        )
        settle(page)
        seen.update(page.run(TOOLTIPS))
    told = "\n".join(seen)
    for words in ("request r0", "decode", "tokens computed; KV then", "blocks", " s to ", "prompt "):
        assert words in told
    steps = frame(page, "steps")
    page.click(steps["x"] + steps["width"] / 2, steps["y"] + steps["height"] / 4)
    settle(page)
    (tip,) = page.run(TOOLTIPS)
    assert "real · step" in tip
    assert page.run("document.getElementById('step-name').innerText") in tip
    page.run("diptych.act('parted')")
    settle(page)
    text = page.run("document.getElementById('step').innerText")
    number = facts_of(two_sides.read_text(encoding="utf-8"))["divergence"]["step"]
    assert text.startswith(f"Step {number}")
    assert "KV blocks held / cached / free" in text
    assert page.run("document.querySelectorAll('#step tr.differs').length") >= 1
    assert page.complaints() == []


@browses
def test_names_that_try_to_be_html_stay_text(two_sides: Path, browser: Browser) -> None:
    page = browser.open(two_sides)
    lane = facts_of(two_sides.read_text(encoding="utf-8"))["ids"].index("<img src=x onerror=alert(1)>")
    lanes = frame(page, "lanes")
    code = f"""(() => {{
      const d = Bokeh.documents[0].get_model_by_name('bars0').data;
      const mine = [...d.left.keys()].filter(k => Math.round(d.y[k]) === {lane});
      return mine.map(k => [d.left[k], d.right[k], d.y[k]]);
    }})()"""
    left, right, y = page.run(code)[-1]
    low, high = window(page)
    rows = page.run(
        "[Bokeh.documents[0].get_model_by_name('rows').start, Bokeh.documents[0].get_model_by_name('rows').end]"
    )
    page.mouse(
        "mouseMoved",
        lanes["x"] + lanes["width"] * ((left + right) / 2 - low) / (high - low),
        lanes["y"] + lanes["height"] * (y - rows[1]) / (rows[0] - rows[1]),
    )
    settle(page)
    assert any("<img src=x" in text for text in page.run(TOOLTIPS))
    assert page.asked_for() == []


@browses
def test_the_wheel_zooms_with_ctrl_only_and_all_charts_follow(two_sides: Path, browser: Browser) -> None:
    page = browser.open(two_sides)
    lanes = frame(page, "lanes")
    x, y = lanes["x"] + 100, lanes["y"] + 60
    before = window(page)
    page.mouse("mouseMoved", x, y)
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240)
    settle(page)
    assert window(page) == before
    lanes = frame(page, "lanes")
    y = lanes["y"] + 60
    page.mouse("mouseMoved", x, y)
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240, modifiers=2)
    page.wait(f"diptych.window().to < {before[1] - 1e-6}")
    settle(page)
    after = window(page)
    assert before[0] <= after[0] < after[1] < before[1]
    drawn = page.run("[...Bokeh.documents[0].get_model_by_name('curve0').data.t]")
    assert drawn[-2] <= after[1] or len(drawn) == 2, "what lies outside of the window isn't drawn"
    page.run("document.querySelector('[data-act=all]').click()")
    settle(page)
    assert window(page) == pytest.approx(before)


@browses
def test_stages_and_sides_can_be_switched_off(two_sides: Path, browser: Browser) -> None:
    page = browser.open(two_sides)
    bars = "Bokeh.documents[0].get_model_by_name('bars{}').data.stage.length"
    full = page.run(bars.format(0))
    page.run("document.querySelector('[data-stage=\"0\"]').click()")
    settle(page)
    assert 0 < page.run(bars.format(0)) < full
    page.run("document.querySelector('[name=shown][value=\"1\"]').click()")
    settle(page)
    assert page.run(bars.format(0)) == 0
    assert page.run(bars.format(1)) > 0


@browses
def test_page_fits_a_phone(two_sides: Path, browser: Browser) -> None:
    page = browser.open(two_sides, width=400)
    assert page.run("document.documentElement.scrollWidth") <= 400


@browses
def test_five_thousand_requests_open_soon(
    tmp_path: Path, browser: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    real, sim = (toy_run(0, 5000, name, rate_per_s=60.0, max_seqs=32) for name in ("real", "sim"))
    path = tmp_path / "report.html"
    began = time.monotonic()
    write_report(path, [real, sim])
    made = time.monotonic() - began
    page = browser.open(path)
    ready = float(page.run("document.documentElement.dataset.ready"))
    assert facts_of(path.read_text(encoding="utf-8"))["total"] == 5000
    assert page.complaints() == []
    with capsys.disabled():
        print(
            f"\npage of 2 x 5000 requests: {path.stat().st_size:,} bytes, made in {made:.1f} s, ready in {ready:.0f} ms"
        )
    assert path.stat().st_size < 3_000_000
    assert ready < 8000  # 2 s on a free machine


@browses
def test_without_scripts_static_figures_stand_in_for_the_charts(two_sides: Path) -> None:
    inside = "".join(re.findall(r"<noscript>(.*?)</noscript>", two_sides.read_text(encoding="utf-8"), re.S))
    assert inside.count("data:image/webp") == 6


def test_without_bokeh_the_page_says_so_and_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "available", lambda: False)
    page = report.render(toy_run(1, count=12))
    assert WITHOUT in page
    assert page.count("data:image/webp") == 6
    assert "<noscript>" not in page


def test_a_partial_run_without_steps_has_a_page(tmp_path: Path) -> None:
    run = toy_run(0, count=0)
    write_report(tmp_path / "r.html", replace(run, partial=True))
    assert "Partial run" in (tmp_path / "r.html").read_text(encoding="utf-8")
