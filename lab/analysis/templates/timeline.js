// The interactive timeline: one canvas a side, a shared window of time, lanes that follow the window.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("timeline-data").textContent);
  const panels = document.getElementById("timeline-panels");
  const tip = document.getElementById("timeline-tip");
  const STRIP = 26, AXIS = 20, LEFT = 8;
  const LEAST = 4, PIECE = 1; // pixels that a request and each of its stages get, however short they are
  const colour = name => data.stages.find(stage => stage.name === name).colour;

  const ends = data.panels.flatMap(p => [...p.lanes.flat().map(([, s, n]) => s + n), ...p.steps.map(b => b[2] + b[3])]);
  const last = ends.reduce((a, b) => Math.max(a, b), 1);
  const view = { from: 0, to: last };
  let marked = -1;

  for (const stage of data.stages) {
    const entry = document.createElement("span"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = stage.colour;
    entry.append(swatch, stage.label);
    document.getElementById("timeline-legend").append(entry);
  }
  if (data.ids.length < data.total) {
    document.getElementById("timeline-note").textContent =
      ` Shown are ${data.ids.length} of ${data.total} requests, evenly thinned.`;
  }

  const sides = data.panels.map(panel => {
    const heading = document.createElement("h3"), canvas = document.createElement("canvas");
    heading.textContent = panel.label;
    heading.style.color = panel.colour;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Timeline of ${panel.label}`);
    panels.append(heading, canvas);
    listen(canvas, panel);
    return { panel, canvas };
  });

  // Lanes with anything in the window, on any side: the same rows in all panels.
  function rows() {
    let first = Infinity, end = -1;
    for (const { panel } of sides) {
      panel.lanes.forEach((lane, i) => {
        if (lane.some(([, s, n]) => s < view.to && s + n > view.from)) {
          first = Math.min(first, i);
          end = Math.max(end, i);
        }
      });
    }
    return end < 0 ? { first: 0, count: 1 } : { first, count: end - first + 1 };
  }

  function geometry(canvas) {
    const width = canvas.clientWidth, height = canvas.clientHeight, shown = rows();
    const scale = (width - 2 * LEFT) / (view.to - view.from);
    return {
      width, height, ...shown,
      lane: Math.min(22, (height - STRIP - AXIS) / shown.count),
      x: t => LEFT + (t - view.from) * scale,
      time: x => view.from + (x - LEFT) / scale,
    };
  }

  function draw() {
    const ink = getComputedStyle(document.body).color;
    for (const { panel, canvas } of sides) {
      const g = geometry(canvas), ratio = window.devicePixelRatio || 1;
      canvas.width = g.width * ratio;
      canvas.height = g.height * ratio;
      const c = canvas.getContext("2d");
      c.scale(ratio, ratio);
      drawSteps(c, g, panel);
      for (let row = 0; row < g.count; row++) {
        const y = STRIP + row * g.lane, high = Math.max(1, g.lane * 0.82);
        for (const { stage, x, wide } of bars(g, panel.lanes[g.first + row] || [])) {
          if (x > g.width || x + wide < 0) continue;
          c.fillStyle = data.stages[stage].colour;
          c.fillRect(x, y, wide, high);
        }
        if (g.first + row === marked) {
          c.strokeStyle = ink;
          c.strokeRect(1, y - 0.5, g.width - 2, high + 1);
        }
      }
      drawAxis(c, g, ink);
    }
  }

  // The stages of one request as bars. A request that would be too short to see is drawn wider, its stages in
  // proportion; a stage that would be, reaches into what follows it.
  function bars(g, lane) {
    if (!lane.length) return [];
    const [, first] = lane[0], [, start, length] = lane[lane.length - 1];
    const from = g.x(first), stretch = Math.max(1, LEAST / Math.max(1e-9, g.x(start + length) - from));
    return lane.filter(([, , n]) => n > 0).map(([stage, s, n]) => ({
      stage, x: from + (g.x(s) - from) * stretch, wide: Math.max(PIECE, (g.x(s + n) - g.x(s)) * stretch),
    }));
  }

  // Bars of equal height, a row for each replica: orange where a step carried prompt tokens, green where it only decoded.
  function drawSteps(c, g, panel) {
    const high = (STRIP - 12) / Math.max(1, panel.replicas.length);
    for (const [, , start, length, prompt, , place] of panel.steps) {
      if (start > view.to || start + length < view.from) continue;
      c.fillStyle = colour(prompt ? "prefill" : "decode");
      const x = g.x(start), wide = g.x(start + length) - x;
      c.fillRect(x, 5 + place * high, Math.max(0.5, wide > 3 ? wide - 1 : wide), Math.max(1, high - (high > 4 && high < STRIP - 12 ? 1 : 0)));
    }
  }

  function drawAxis(c, g, ink) {
    const rough = (view.to - view.from) / 8, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
    c.fillStyle = ink;
    c.font = "11px system-ui, sans-serif";
    for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
      const x = g.x(t);
      c.globalAlpha = 0.15;
      c.fillRect(x, 0, 1, g.height - AXIS);
      c.globalAlpha = 1;
      const label = clock(t, step), wide = c.measureText(label).width;
      c.fillText(label, Math.min(Math.max(2, x - wide / 2), g.width - wide - 2), g.height - 6);
    }
  }

  const clock = (t, step) =>
    last < 1e6 ? `${(t / 1e3).toFixed(step < 1e3 ? 3 : 0)} ms` : `${(t / 1e6).toFixed(Math.max(0, 6 - Math.floor(Math.log10(step))))} s`;
  const exact = t => `${(t / 1e3).toFixed(3)} ms`;

  function under(canvas, panel, event) {
    const g = geometry(canvas), box = canvas.getBoundingClientRect();
    const t = g.time(event.clientX - box.left), y = event.clientY - box.top;
    const slack = 2 * (view.to - view.from) / g.width;
    const near = (start, length) => t >= start - slack && t <= start + length + slack;
    if (y < STRIP) {
      const many = panel.replicas.length;
      const at = Math.max(0, Math.min(many - 1, Math.floor((y - 5) * many / (STRIP - 12))));
      const bar = panel.steps.find(b => b[6] === at && near(b[2], b[3]));
      if (!bar) return { row: -1, text: "" };
      const [a, b, start, length, prompt, decode, place] = bar;
      const whose = many > 1 ? `replica ${panel.replicas[place]}, ` : "";
      const name = whose + (a === b ? `step ${a}` : `steps ${a} to ${b}`);
      return { row: -1, text: `${name}\nstart ${exact(start)}, ${exact(length)}\n${prompt} prompt + ${decode} decode tokens` };
    }
    const row = g.first + Math.floor((y - STRIP) / g.lane);
    if (row >= g.first + g.count || !(row in data.ids)) return { row: -1, text: "" };
    const piece = (panel.lanes[row] || []).find(([, s, n]) => near(s, n));
    if (!piece) return { row, text: `request ${data.ids[row]}` };
    return {
      row,
      text: `request ${data.ids[row]}\n${data.stages[piece[0]].label}\nstart ${exact(piece[1])}, ${exact(piece[2])}`,
    };
  }

  function listen(canvas, panel) {
    let drag = null;
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      const t = geometry(canvas).time(event.clientX - canvas.getBoundingClientRect().left);
      const factor = Math.exp(Math.max(-60, Math.min(60, event.deltaY)) / 200);
      look(t - (t - view.from) * factor, t + (view.to - t) * factor);
    }, { passive: false });
    canvas.addEventListener("pointerdown", event => {
      drag = { x: event.clientX, from: view.from, to: view.to };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointerup", () => { drag = null; });
    canvas.addEventListener("dblclick", () => look(0, last));
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; marked = -1; draw(); });
    canvas.addEventListener("pointermove", event => {
      if (drag) {
        const moved = (event.clientX - drag.x) * (drag.to - drag.from) / (canvas.clientWidth - 2 * LEFT);
        look(drag.from - moved, drag.to - moved);
        return;
      }
      const found = under(canvas, panel, event);
      tip.hidden = !found.text;
      tip.textContent = found.text;
      tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 240)}px`;
      tip.style.top = `${event.clientY + 14}px`;
      if (found.row !== marked) { marked = found.row; draw(); }
    });
  }

  function look(from, to) {
    const wide = Math.min(last, Math.max(50, to - from));
    view.from = Math.max(0, Math.min(from, last - wide));
    view.to = view.from + wide;
    draw();
  }

  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
