"""The page in a real browser: it stands, asks for nothing, tells what lies under the pointer, zooms and loads soon."""

from __future__ import annotations

import hashlib
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
from lab.analysis.page import columns
from lab.analysis.page.columns import fitted
from lab.analysis.page.embed import WITHOUT, available
from lab.analysis.report import write_report
from tests.analysis.browser import CHROMIUM, TOOLTIPS, Browser, Page
from tests.analysis.toy import ToyRun, pair, toy_run

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


UNPACK = """(() => {
  const table = data => ({ data }), none = { length: [], stage: [], first_step: [], last_step: [] };
  const steps = {
    replica: [0, 0, 1], step: [0, 2, -2], count: [2, 1, 1], gap: [0, 5, 3], length: [10, 10, 4],
    prefill_tokens: [100, 0, 7], decode_tokens: [20, 8, 1], waiting: [3, 0, 1], running: [4, 5, 2],
    blocks_held: [6, 7, 1], blocks_cached: [1, 1, 2], blocks_free: [3, 2, 7],
  };
  const stretches = { lane: [], step: [] };
  const models = { lanes0: table({ arrival: [0], pieces: [0] }), pieces0: table(none),
    stretches0: table(stretches), steps0: table(steps) };
  const { curve, steps: found } = diptych.unpack(models, 0, { ids: ["a"], tick: 1 });
  const lists = Object.fromEntries(Object.entries(curve).map(([name, values]) => [name, [...values]]));
  return { ...lists, start: [...found.start], end: [...found.end], step: [...found.step] };
})()"""


@browses
def test_curves_are_sums_over_replicas_of_what_each_does_and_holds(two_sides: Path, browser: Browser) -> None:
    """By hand: replica 0 from 0 to 10 (two steps in one bar) and 15 to 25, replica 1 from 3 to 7."""
    got = browser.open(two_sides).run(UNPACK)
    assert (got["start"], got["end"], got["step"]) == ([0, 15, 3], [10, 25, 7], [0, 2, 0])
    assert got["t"] == [0, 3, 7, 10, 15, 25]
    assert got["prefill_tokens"] == [50, 57, 50, 0, 0, 0]
    assert got["decode_tokens"] == [10, 11, 10, 0, 8, 0]
    assert got["running"] == [4, 6, 4, 0, 5, 0]
    assert got["waiting"] == [3, 4, 3, 0, 0, 0]
    assert got["held"] == [6, 7, 7, 7, 8, 8]
    assert got["free"] == [3, 10, 10, 10, 9, 9]


TOLD = """(() => {
  const side = replica => ({
    lanes: { replica: [1], prompt_tokens: [100], cached_tokens: [0], output_tokens: [12], preemptions: [0] },
    pieces: { lane: [0], stage: [0], start: [0], end: [2], first_step: [6], last_step: [9] },
    stretches: { lane: [0, 0], replica: [1, 1], step: [5, 15], steps: [10, 2], tokens: [3, 1], start: [100, 130] },
    steps: { replica, step: [8, 8], count: [1, 1], start: [1, 1], end: [2, 2], host: [0, 0], transfer: [0, 0],
      batch: [1, 1], prefill_tokens: [3, 4], decode_tokens: [0, 0], running: [1, 1], waiting: [0, 0],
      blocks_held: [1, 1], blocks_cached: [1, 1], blocks_free: [1, 1] },
  });
  const facts = { ids: ["r"], words: ["decode"], sides: ["real", "sim"], block: 16, tick: 1 };
  const tell = diptych.teller(facts, [side([0, 1]), side([0, 1])], [0, 1]);
  return [tell.piece(0, 0), tell.compared(0, 1)[1].textContent];
})()"""


@browses
def test_tokens_positions_and_the_other_sides_step_are_told_exactly(
    two_sides: Path, browser: Browser
) -> None:
    """By hand: 3 tokens a step from position 100 at step 5; each replica has a step 8 of its own."""
    piece, compared = browser.open(two_sides).run(TOLD)
    assert "replica 1, steps 6 to 9" in piece
    assert "12 tokens computed; KV then 115 tokens in 8 blocks" in piece
    assert "r3 (109)3 (109)" in compared  # both are at position 109
    assert "prompt + decode tokens4 + 04 + 0" in compared  # of replica 1 on either side


@browses
def test_bars_of_requests_steps_and_blocks_lie_where_the_runs_say(two_sides: Path, browser: Browser) -> None:
    page = browser.open(two_sides)
    named = "Bokeh.documents[0].get_model_by_name('{}')"
    for i, shift in ((0, -0.23), (1, 0.23)):  # the reference above, its candidate below
        y = page.run(f"[...{named.format(f'bars{i}')}.data.y]")
        assert {round(value - round(value), 3) for value in y} == {shift}
    for i, run in enumerate(pair(1, count=60, blocks=60)[:2]):
        bars = page.run(
            f"Object.entries({named.format(f'steps_drawn{i}')}.data).map(([k, v]) => [k, [...v]])"
        )
        drawn = dict(bars)
        steps = {round(row.start_ns / 1e3): row for row in run.steps.itertuples()}
        seen = 0
        for k, left in enumerate(drawn["left"]):
            step = steps.get(round(left * 1e6))
            if step is None or abs(drawn["right"][k] * 1e9 - step.end_ns) > 1000:
                continue  # several in one bar
            seen += 1
            share = (drawn["middle"][k] - drawn["top"][k]) / (drawn["bottom"][k] - drawn["top"][k])
            tokens = step.prefill_tokens + step.decode_tokens
            assert share == pytest.approx(step.prefill_tokens / tokens)
        assert seen > 20
        curve = dict(
            page.run(f"Object.entries({named.format(f'curve{i}')}.data).map(([k, v]) => [k, [...v]])")
        )
        assert max(curve["prefill_tokens"]) == run.steps["prefill_tokens"].max()
        used = (run.steps["blocks_held"] + run.steps["blocks_cached"]).max()
        end = page.run(f"{named.format(f'pool{i}')}.end")
        assert end == pytest.approx(1.3 * used if 3 * used < 60 else 60)


@browses
def test_page_fits_a_phone(two_sides: Path, browser: Browser) -> None:
    page = browser.open(two_sides, width=400)
    assert page.run("document.documentElement.scrollWidth") <= 400


def named_as_servers_do(run: ToyRun) -> ToyRun:
    def long(name: str) -> str:
        return f"chatcmpl-{hashlib.md5(name.encode()).hexdigest()}"

    plans = run.plans.assign(request=[[long(name) for name in batch] for batch in run.plans["request"]])
    return replace(run, requests=run.requests.assign(id=run.requests["id"].map(long)), plans=plans)


@browses
def test_five_thousand_requests_open_soon(
    tmp_path: Path, browser: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    real, sim = (
        named_as_servers_do(toy_run(0, 5000, name, rate_per_s=60.0, max_seqs=32)) for name in ("real", "sim")
    )
    path = tmp_path / "report.html"
    began = time.monotonic()
    write_report(path, [real, sim])
    made = time.monotonic() - began
    page = browser.open(path)
    ready = float(page.run("document.documentElement.dataset.ready"))
    assert facts_of(path.read_text(encoding="utf-8"))["total"] == 5000
    assert page.complaints() == []
    peak = page.run("Math.max(...Bokeh.documents[0].get_model_by_name('curve0').data.prefill_tokens)")
    _, tables = fitted([real, sim])
    bars = tables[0]["steps"]
    assert peak == pytest.approx((bars["prefill_tokens"] / bars["count"]).max())  # of those in a pixel
    with capsys.disabled():
        print(
            f"\npage of 2 x 5000 requests: {path.stat().st_size:,} bytes, made in {made:.1f} s, ready in {ready:.0f} ms"
        )
    assert path.stat().st_size < 2_600_000
    # Whatever the runs: no page has more of columns than that.
    assert path.stat().st_size - columns._bytes(tables) + columns.MOST_BYTES < 3_000_000
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
