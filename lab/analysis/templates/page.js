// What fills the page's linked charts: unpacks the columns, and draws what lies in the window whenever it moves.
"use strict";
window.diptych = (() => {
  const $ = id => document.getElementById(id);
  const facts = JSON.parse($("facts").textContent);
  const both = facts.sides.length > 1;
  const PIXELS = both ? 3 : 2; // that a lane gets at least; with more lanes in sight some are left out
  const BUCKETS = 1000;        // of a curve, about a pixel each
  const LARGEST = ["prefill_tokens", "decode_tokens", "waiting", "running"], LAST = ["held", "cached", "free"];
  const ALWAYS = new Set(["preempted", "swapped"].map(name => facts.stages.indexOf(name)));
  const hidden = new Set();
  let m, sides, replicas, shown = "both", follows = true, idle = false, mine = null, pending = false;
  let order = []; // lanes that have a row, from the top

  // --- unpacking -------------------------------------------------------------------------------------------

  const sums = values => { let sum = 0; return Int32Array.from(values, v => (sum += v)); };

  function unpack(side) {
    const raw = name => m[name + side].data;
    const lanes = raw("lanes"), pieces = raw("pieces"), stretches = raw("stretches"), steps = raw("steps");
    const count = facts.ids.length, arrivals = sums(lanes.arrival);
    const first = new Int32Array(count + 1), all = pieces.length.length;
    const start = new Float64Array(all), end = new Float64Array(all), lane = new Int32Array(all);
    for (let l = 0, p = 0; l < count; l++) {
      let t = arrivals[l];
      for (let k = 0; k < lanes.pieces[l]; k++, p++) {
        start[p] = t * facts.tick;
        t += pieces.length[p];
        end[p] = t * facts.tick;
        lane[p] = l;
      }
      first[l + 1] = p;
    }
    return {
      lanes: { ...lanes, first },
      pieces: { ...pieces, start, end, lane },
      stretches: { ...stretches, lane: sums(stretches.lane), step: sums(stretches.step) },
      steps: timed(steps),
    };
  }

  function timed(steps) {
    const count = steps.gap.length, start = new Float64Array(count), end = new Float64Array(count);
    for (let i = 0, t = 0; i < count; i++) {
      if (i && steps.replica[i] !== steps.replica[i - 1]) t = 0;
      t += steps.gap[i];
      start[i] = t * facts.tick;
      t += steps.length[i];
      end[i] = t * facts.tick;
    }
    return { ...steps, start, end, step: sums(steps.step) };
  }

  // Values after each event, added up over the replicas; an idle replica computes nothing and nobody waits at it.
  function curves({ steps }) {
    const events = [];
    for (let i = 0; i < steps.start.length; i++) {
      const n = steps.count[i];
      const kv = [steps.blocks_held[i], steps.blocks_cached[i], steps.blocks_free[i]];
      const busy = [steps.prefill_tokens[i] / n, steps.decode_tokens[i] / n, steps.waiting[i], steps.running[i]];
      events.push([steps.start[i], steps.replica[i], ...busy, ...kv]);
      const more = steps.replica[i + 1] === steps.replica[i];
      if (!more || steps.start[i + 1] - steps.end[i] > 1.5 * facts.tick) {
        events.push([steps.end[i], steps.replica[i], 0, 0, 0, 0, ...kv]);
      }
    }
    events.sort((a, b) => a[0] - b[0]); // stable: a step's end stays before the next one's start
    const out = { t: new Float64Array(events.length) }, names = [...LARGEST, ...LAST];
    for (const name of names) out[name] = new Float64Array(events.length);
    const now = new Map(), sum = new Float64Array(names.length);
    events.forEach(([t, replica, ...values], i) => {
      const before = now.get(replica);
      names.forEach((name, c) => {
        sum[c] += values[c] - (before ? before[c] : 0);
        out[name][i] = Math.max(0, sum[c]);
      });
      now.set(replica, values);
      out.t[i] = t;
    });
    return out;
  }

  // --- drawing what is in the window -----------------------------------------------------------------------

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

  // --- telling ---------------------------------------------------------------------------------------------

  const number = n => Math.round(n).toLocaleString("en");
  const moment = s => `${s.toFixed(6)} s`;
  function length(s) {
    return s < 1e-3 ? `${(s * 1e6).toFixed(0)} µs` : s < 1 ? `${(s * 1e3).toFixed(3)} ms` : `${s.toFixed(3)} s`;
  }
  const name = i => (both ? `${facts.sides[i]} · ` : "");
  const whose = replica => (replicas.length > 1 ? `replica ${replica}, ` : "");

  function piece(i, p) {
    const { lanes, pieces, stretches } = sides[i], l = pieces.lane[p], stage = pieces.stage[p];
    const lines = [
      `${name(i)}request ${facts.ids[l]}`,
      facts.words[stage],
      `${moment(pieces.start[p])} to ${moment(pieces.end[p])}: ${length(pieces.end[p] - pieces.start[p])}`,
    ];
    if (pieces.first_step[p] >= 0) {
      const a = pieces.first_step[p], b = pieces.last_step[p];
      lines.push(`${whose(lanes.replica[l])}step${a === b ? ` ${a}` : `s ${a} to ${b}`}`);
      let tokens = 0, reach = 0;
      for (let r = 0; r < stretches.lane.length; r++) {
        if (stretches.lane[r] !== l) continue;
        const low = Math.max(a, stretches.step[r]), high = Math.min(b, stretches.step[r] + stretches.steps[r] - 1);
        if (high < low) continue;
        tokens += (high - low + 1) * stretches.tokens[r];
        reach = Math.max(reach, stretches.start[r] + (high - stretches.step[r] + 1) * stretches.tokens[r]);
      }
      if (tokens) lines.push(`${number(tokens)} tokens computed` + (facts.block
        ? `; KV then ${number(reach)} tokens in ${number(Math.ceil(reach / facts.block))} blocks` : ""));
    }
    lines.push(`prompt ${number(lanes.prompt_tokens[l])} (${number(lanes.cached_tokens[l])} from the cache), output ${number(lanes.output_tokens[l])} tokens`);
    if (lanes.preemptions[l] > 0) lines.push(`preempted ${lanes.preemptions[l]} times in all`);
    return lines.join("\n");
  }

  function batch(i, replica, step) {
    const { stretches } = sides[i], out = [];
    for (let r = 0; r < stretches.lane.length; r++) {
      const past = step - stretches.step[r];
      if (past >= 0 && past < stretches.steps[r] && stretches.replica[r] === replica) {
        out.push({ lane: stretches.lane[r], tokens: stretches.tokens[r], start: stretches.start[r] + past * stretches.tokens[r] });
      }
    }
    return out;
  }

  function state(i, s) {
    const { steps } = sides[i];
    const host = steps.host[s] * facts.tick, moved = steps.transfer[s] * facts.tick;
    return [
      ["start", moment(steps.start[s])],
      ["duration", length(steps.end[s] - steps.start[s])],
      ["of it host", length(host)],
      ...(moved ? [["of it KV transfers", length(moved)]] : []),
      ["prompt + decode tokens", `${number(steps.prefill_tokens[s])} + ${number(steps.decode_tokens[s])}`],
      ["requests running / waiting", `${number(steps.running[s])} / ${number(steps.waiting[s])}`],
      ["KV blocks held / cached / free", ["held", "cached", "free"].map(part => number(steps[`blocks_${part}`][s])).join(" / ")],
    ];
  }

  const titled = (i, s, last = s) => {
    const { steps } = sides[i], a = steps.step[s], b = steps.step[last] + steps.count[last] - 1;
    return `${whose(steps.replica[s])}step${a === b ? ` ${a}` : `s ${a} to ${b}`}`;
  };

  function step(i, bar) {
    const { steps, drawn } = sides[i], [s, last] = drawn[bar] || [0, 0];
    const lines = [name(i) + titled(i, s, last)];
    if (s !== last) {
      let prompt = 0, decode = 0;
      for (let k = s; k <= last; k++) { prompt += steps.prefill_tokens[k]; decode += steps.decode_tokens[k]; }
      lines.push(`${moment(steps.start[s])} to ${moment(steps.end[last])}`, `${number(prompt)} prompt + ${number(decode)} decode tokens`, "zoom in for single steps");
      return lines.join("\n");
    }
    lines.push(...state(i, s).map(([what, value]) => `${what}: ${value}`));
    const items = batch(i, steps.replica[s], steps.step[s]);
    const told = items.slice(0, 6).map(({ lane, tokens }) => facts.ids[lane] + (tokens > 1 ? ` ×${tokens}` : ""));
    if (items.length) lines.push(`batch of ${number(steps.batch[s])}: ${told.join(", ")}${items.length > 6 ? ", ..." : ""}`);
    return lines.join("\n");
  }

  // --- the batch of a step, beside the other side's step of the same number --------------------------------

  const element = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  function row(table, head, cells, kind) {
    const line = element("tr", undefined, kind);
    const first = element("th", head);
    first.scope = "row";
    line.append(first, ...cells.map(cell => element("td", cell, "value")));
    table.append(line);
  }

  function show(i, s) {
    const wanted = sides[i].steps.step[s], replica = sides[i].steps.replica[s];
    const places = sides.map(({ steps }, j) => j === i ? s
      : steps.step.findIndex((first, k) => steps.replica[k] === replica && first <= wanted && wanted < first + steps.count[k]));
    const box = $("step");
    box.replaceChildren(element("h3", titled(i, s).replace(/^s/, "S").replace(/^r/, "R")));
    const table = element("table", undefined, "numbers"), head = element("thead"), body = element("tbody");
    const top = element("tr");
    top.append(element("th", ""), ...facts.sides.map(label => element("th", label, "value")));
    head.append(top);
    const states = places.map((k, j) => k < 0 ? null : new Map(state(j, k)));
    const names = [...new Set(states.flatMap(found => found ? [...found.keys()] : []))];
    for (const what of names) row(body, what, states.map(found => found ? found.get(what) || "-" : "not there"));
    const found = places.map((k, j) => new Map(k < 0 ? [] : batch(j, replica, wanted).map(item => [item.lane, item])));
    const lanes = [...new Set(found.flatMap(items => [...items.keys()]))].sort((a, b) => a - b);
    const list = element("tbody");
    row(list, `batch: tokens (from position)`, facts.sides.map(() => ""), "section");
    for (const lane of lanes.slice(0, 300)) {
      const cells = found.map(items => items.has(lane) ? `${number(items.get(lane).tokens)} (${number(items.get(lane).start)})` : "-");
      row(list, facts.ids[lane], cells, new Set(cells).size > 1 ? "differs" : "");
    }
    if (!lanes.length) row(list, "the page has no batches of this run", []);
    if (lanes.length > 300) row(list, `and ${number(lanes.length - 300)} more`, []);
    table.append(head, body, list);
    const wide = element("div", undefined, "wide");
    wide.append(table);
    box.append(wide);
    m.chosen.setv({ left: sides[i].steps.start[s], right: sides[i].steps.end[s], visible: true });
    $("step-name").textContent = titled(i, s);
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

  function colours() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const paper = dark ? "#16181B" : "#FFFFFF", ink = dark ? "#E8E8E8" : "#333333", line = dark ? "#363B42" : "#E6E6E6";
    for (const model of Bokeh.documents[0]._all_models.values()) {
      if (model.type === "Figure") model.setv({ background_fill_color: paper, border_fill_color: paper, outline_line_color: line });
      if (model.type === "Title") model.setv({ text_color: ink });
      if (model.type.endsWith("Axis")) model.setv({ axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: line, major_tick_line_color: line });
      if (model.type === "ColorBar") model.setv({ background_fill_color: paper, major_label_text_color: ink, title_text_color: ink });
      if (model.type === "Grid") model.setv({ grid_line_color: line });
      if (model.type === "Legend") model.setv({ label_text_color: ink });
      if (model.type === "Label") model.setv({ text_color: ink, background_fill_color: paper });
    }
  }

  function start(models) {
    m = models;
    sides = facts.sides.map((_, i) => unpack(i));
    for (const side of sides) side.curve = curves(side);
    replicas = [...new Set(sides.flatMap(({ steps }) => [...steps.replica]))].sort((a, b) => a - b);
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
    colours();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colours);
    window.addEventListener("resize", later);
    draw();
    requestAnimationFrame(() => requestAnimationFrame(() => {
      document.documentElement.dataset.ready = performance.now().toFixed(0);
    }));
  }

  return { start, piece, step, tap, laneName, act, window: () => ({ from: m.x.start, to: m.x.end }) };
})();
