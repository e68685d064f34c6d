// What the page says of a stretch of a request's life, of a step, and of a step's batch on both sides.
"use strict";
diptych.number = n => Math.round(n).toLocaleString("en");
diptych.teller = (facts, sides, replicas) => {
  const number = diptych.number, both = facts.sides.length > 1;
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

  function step(i, s, last) {
    const { steps } = sides[i];
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

  function compared(i, s) {
    const wanted = sides[i].steps.step[s], replica = sides[i].steps.replica[s];
    const places = sides.map(({ steps }, j) => j === i ? s
      : steps.step.findIndex((first, k) => steps.replica[k] === replica && first <= wanted && wanted < first + steps.count[k]));
    const title = element("h3", titled(i, s).replace(/^s/, "S").replace(/^r/, "R"));
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
    return [title, wide];
  }

  return { piece, step, titled, compared };
};
