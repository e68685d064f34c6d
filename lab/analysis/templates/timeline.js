// The timeline: draws what lies in the window whenever it moves, and moves it. Bokeh has the axes, tools and tooltips.
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const facts = JSON.parse($("facts").textContent);
  const both = facts.sides.length > 1;
  const PIXELS = both ? 3 : 2; // that a lane gets at least; with more lanes in sight some are left out
  const BUCKETS = 1000;        // of a curve, about a pixel each
  const { number, LARGEST, LAST } = diptych;
  const ALWAYS = new Set(["preempted", "swapped"].map(name => facts.stages.indexOf(name)));
  const hidden = new Set();
  let m, sides, replicas, tell, shown = "both", follows = true, idle = false, mine = null, pending = false;
  let order = []; // lanes that have a row, from the top

  function draw() {
    pending = false;
    const from = m.x.start, to = m.x.end, pixel = (to - from) / Math.max(200, m.lanes.inner_width || 900);
    if (follows) {
      order = lanesIn(from, to);
      look(m.rows, Math.max(order.length, 6) - 0.4, -0.6);
    }
    sides.forEach((side, i) => {
      m[`bars${i}`].data = bars(side, i, from, to, pixel);
      m[`steps_drawn${i}`].data = stepBars(side, i, from, to, pixel);
      const lines = curve(side.curve, from, to);
      pool(i, lines);
      m[`curve${i}`].data = lines;
    });
    note();
  }

  function look(range, start, end) {
    mine = { start, end };
    range.setv({ start, end });
  }

  // Requests with anything in the window on a shown side; unless asked for, not those that only wait there.
  function lanesIn(from, to) {
    const found = [], waiting = new Set(["queue", "preempted", "swapped"].map(name => facts.stages.indexOf(name)));
    const looked = sides.filter((_, i) => shown === "both" || shown === String(i));
    for (let l = 0; l < facts.ids.length; l++) {
      if (looked.some(({ lanes, pieces }) => {
        for (let p = lanes.first[l]; p < lanes.first[l + 1]; p++) {
          if (pieces.start[p] <= to && pieces.end[p] >= from && (idle || !waiting.has(pieces.stage[p]))) return true;
        }
        return false;
      })) found.push(l);
    }
    return found;
  }

  const every = () => {
    const rows = Math.abs(m.rows.start - m.rows.end), room = (m.lanes.inner_height || 340) / PIXELS;
    return Math.max(1, Math.ceil(rows / room));
  };

  // A pool that is nearly empty is shown in its lower part, where something is to be seen.
  function pool(i, lines) {
    const most = values => values.reduce((a, b) => Math.max(a, b), 1);
    const used = most(lines.cached_top), all = most(lines.free_top), part = 3 * used < all;
    m[`pool${i}`].end = part ? 1.3 * used : all;
    m[`pool_title${i}`].text = `${facts.sides[i]}: KV blocks after planning` + (part ? `, lower part of ${number(all)}` : `, of ${number(all)}`);
  }

  function bars({ lanes, pieces }, i, from, to, pixel) {
    const out = { left: [], right: [], y: [], high: [], stage: [], i: [] };
    if (shown !== "both" && shown !== String(i)) return out;
    const k = every(), low = Math.min(m.rows.start, m.rows.end) - k, high = Math.max(m.rows.start, m.rows.end);
    const half = both && shown === "both", thick = k * (half ? 0.44 : 0.86);
    const shift = (k - 1) / 2 + (half ? (i === 0 ? -0.23 : 0.23) * k : 0);
    for (let row = Math.max(0, Math.floor(low)); row < order.length && row <= high; row++) {
      const l = order[row], drawn = row % k === 0;
      for (let p = lanes.first[l]; p < lanes.first[l + 1]; p++) {
        const stage = pieces.stage[p], a = pieces.start[p], b = pieces.end[p];
        if (b <= a || b < from || a > to || hidden.has(stage) || !(drawn || ALWAYS.has(stage))) continue;
        out.left.push(Math.max(a, from - (to - from)));
        out.right.push(Math.max(Math.min(b, to + (to - from)), a + pixel));
        out.y.push(row - (row % k) + shift);
        out.high.push(thick);
        out.stage.push(stage);
        out.i.push(p);
      }
    }
    return out;
  }

  // Neighbouring steps that would share a pixel share a bar.
  function stepBars(side, i, from, to, pixel) {
    const { steps } = side, out = { left: [], right: [], top: [], middle: [], bottom: [], i: [] };
    side.drawn = [];
    const close = bar => {
      const row = replicas.indexOf(bar.replica) * sides.length + i, tokens = bar.prefill + bar.decode;
      out.left.push(bar.left);
      out.right.push(Math.max(bar.right, bar.left + pixel));
      out.top.push(row - 0.4);
      out.middle.push(row - 0.4 + (tokens ? 0.8 * bar.prefill / tokens : 0));
      out.bottom.push(row + 0.4);
      out.i.push(side.drawn.length);
      side.drawn.push([bar.first, bar.last]);
    };
    let bar = null;
    for (let s = 0; s < steps.start.length; s++) {
      if (steps.end[s] < from || steps.start[s] > to) continue;
      const joins = bar && bar.replica === steps.replica[s] && bar.last === s - 1
        && steps.end[s] - bar.left < pixel && steps.start[s] - bar.right < pixel;
      if (!joins) {
        if (bar) close(bar);
        bar = { replica: steps.replica[s], left: steps.start[s], first: s, prefill: 0, decode: 0 };
      }
      bar.right = steps.end[s];
      bar.last = s;
      bar.prefill += steps.prefill_tokens[s];
      bar.decode += steps.decode_tokens[s];
    }
    if (bar) close(bar);
    return out;
  }

  function curve(all, from, to) {
    const place = t => { // events before t
      let low = 0, high = all.t.length;
      while (low < high) { const mid = (low + high) >> 1; if (all.t[mid] <= t) low = mid + 1; else high = mid; }
      return low;
    };
    const first = Math.max(0, place(from) - 1), last = Math.min(all.t.length, place(to) + 1);
    const wide = (to - from) / BUCKETS, out = { t: [] };
    for (const name of [...LARGEST, ...LAST]) out[name] = [];
    const put = (t, a, b) => { // the largest of these events, or the last where the last is what counts
      out.t.push(t);
      for (const name of LARGEST) {
        let most = all[name][a];
        for (let e = a + 1; e < b; e++) most = Math.max(most, all[name][e]);
        out[name].push(most);
      }
      for (const name of LAST) out[name].push(all[name][b - 1]);
    };
    for (let a = first; a < last;) {
      let b = a + 1;
      while (b < last && all.t[b] - all.t[a] < wide) b++;
      if (b - a > 2) {
        put(all.t[a], a, b); // the most within a pixel; before a pause also what it was after that
        if (b < last && all.t[b] - all.t[b - 1] > wide) put(all.t[b - 1], b - 1, b);
      } else for (let e = a; e < b; e++) put(all.t[e], e, e + 1);
      a = b;
    }
    if (last === all.t.length && last > first) { // the last state lasts to the end
      out.t.push(Math.max(facts.high, all.t[last - 1]));
      for (const name of [...LARGEST, ...LAST]) out[name].push(all[name][last - 1]);
    }
    while (out.t.length < 2) for (const values of Object.values(out)) values.push(0); // Bokeh hangs on empty areas
    out.cached_top = out.held.map((held, e) => held + out.cached[e]);
    out.free_top = out.cached_top.map((top, e) => top + out.free[e]);
    return out;
  }

  function note() {
    const k = every(), count = facts.ids.length, said = [];
    if (!order.length) said.push(idle ? "No request is there in this window." : "No request runs in this window.");
    if (k > 1) said.push(`One of ${k} requests is drawn at this zoom; preempted ones all are.`);
    if (count < facts.total) said.push(`The page holds ${count.toLocaleString("en")} of ${facts.total.toLocaleString("en")} requests, evenly thinned.`);
    const most = Math.max(1, ...sides.map(({ steps }) => steps.count.reduce((a, b) => Math.max(a, b), 1)));
    if (most > 1) said.push(`A bar of steps holds up to ${most}.`);
    if (said.length && (count < facts.total || most > 1)) said.push(facts.command);
    $("timeline-note").textContent = said.join(" ");
  }

  function show(i, s) {
    $("step").replaceChildren(...tell.compared(i, s));
    $("step-name").textContent = tell.titled(i, s);
    m.chosen.setv({ left: sides[i].steps.start[s], right: sides[i].steps.end[s], visible: true });
  }

  function tap(i, bar) {
    if (bar === undefined) return;
    const drawn = sides[i].drawn[m[`steps_drawn${i}`].data.i[bar]];
    if (drawn) show(i, drawn[0]);
  }

  // --- moving ----------------------------------------------------------------------------------------------

  function go(from, to) {
    const low = facts.low - facts.pad, high = facts.high + facts.pad;
    const wide = Math.min(high - low, Math.max(to - from, 4e-6));
    const start = Math.max(low, Math.min(from, high - wide));
    m.x.setv({ start, end: start + wide });
  }

  function act(what) {
    const { start, end } = m.x, wide = end - start, middle = (start + end) / 2;
    if (what === "in") go(middle - wide / 4, middle + wide / 4);
    if (what === "out") go(middle - wide, middle + wide);
    if (what === "left") go(start - wide / 3, end - wide / 3);
    if (what === "right") go(start + wide / 3, end + wide / 3);
    if (what === "all") { follow(true); go(facts.low - facts.pad, facts.high + facts.pad); }
    if (what === "parted") parted();
  }

  function parted() {
    const { step: number, replica } = facts.divergence;
    for (let i = 0; i < sides.length; i++) {
      const { steps } = sides[i];
      const s = steps.step.findIndex((first, k) => steps.replica[k] === replica && first <= number && number < first + steps.count[k]);
      if (s < 0) continue;
      const times = facts.divergence.moments.map(([, t]) => t), a = Math.min(...times), b = Math.max(...times);
      const wide = Math.max(12 * (steps.end[s] - steps.start[s]), 3 * (b - a));
      follow(true);
      go(a - wide, b + wide);
      show(i, s);
      return;
    }
  }

  function follow(on) {
    follows = on;
    $("follow").checked = on;
    later();
  }

  const later = () => {
    if (pending) return;
    pending = true;
    requestAnimationFrame(draw);
  };

  function rowsMoved() {
    if (mine && m.rows.start === mine.start && m.rows.end === mine.end) return;
    const same = mine && Math.abs(Math.abs(m.rows.start - m.rows.end) - Math.abs(mine.start - mine.end)) < 1e-6;
    if (follows && same) return look(m.rows, mine.start, mine.end); // dragged along time: rows stay
    if (follows) { follows = false; $("follow").checked = false; }
    later();
  }

  function laneName(tick, ticks) {
    if (!(tick in order)) return "";
    const near = ticks && ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : 1;
    return near <= 2 ? facts.ids[order[tick]].slice(-10) : number(order[tick]);
  }

  function start(models) {
    m = models;
    sides = facts.sides.map((_, i) => diptych.unpack(m, i, facts));
    replicas = [...new Set(sides.flatMap(({ steps }) => [...steps.replica]))].sort((a, b) => a - b);
    tell = diptych.teller(facts, sides, replicas);
    document.querySelectorAll("[data-act]").forEach(button => button.addEventListener("click", () => act(button.dataset.act)));
    document.querySelectorAll("[name=shown]").forEach(choice => choice.addEventListener("change", () => { shown = choice.value; follow(true); }));
    document.querySelectorAll("[data-stage]").forEach(box => box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](Number(box.dataset.stage));
      later();
    }));
    $("follow").addEventListener("change", () => follow($("follow").checked));
    $("idle").addEventListener("change", () => { idle = $("idle").checked; follow(true); });
    $("timeline").addEventListener("keydown", event => {
      const what = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all" }[event.key];
      if (what && event.target.tagName !== "INPUT") { event.preventDefault(); act(what); }
    });
    m.x.change.connect(later);
    m.rows.change.connect(rowsMoved);
    window.addEventListener("resize", later);
    draw();
  }

  Object.assign(diptych, {
    start, tap, laneName, act,
    piece: (i, p) => tell.piece(i, p),
    step: (i, bar) => tell.step(i, ...(sides[i].drawn[bar] || [0, 0])),
    window: () => ({ from: m.x.start, to: m.x.end }),
  });
})();
