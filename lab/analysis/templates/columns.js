// Undoes what lab/analysis/page/columns.py did: lanes, pieces, stretches and steps of one side, with times in seconds.
"use strict";
(() => {
  const sums = values => { let sum = 0; return Int32Array.from(values, v => (sum += v)); };
  // Of the steps in a pixel, the largest of these is drawn, and the last of those.
  const LARGEST = ["prefill_tokens", "decode_tokens", "waiting", "running"], LAST = ["held", "cached", "free"];

  function tables(models, side, facts) {
    const raw = name => models[name + side].data;
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
      steps: timed(steps, facts),
    };
  }

  function timed(steps, facts) {
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
  function curves({ steps }, facts) {
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

  diptych.unpack = (models, side, facts) => {
    const found = tables(models, side, facts);
    return { ...found, curve: curves(found, facts) };
  };
  Object.assign(diptych, { LARGEST, LAST });
})();
