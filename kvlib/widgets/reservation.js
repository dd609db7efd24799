// Scrub over time through an arena of slots: what each request uses, has reserved and wastes, and who is refused.
// data: slots, row (slots to a row of the map), horizon and unit (steps), requests [[prompt, output]],
//       rooms {policy: [slots of each request]}, traces {"policy|fit": [[start, since] of each, in order of admission]},
//       expected {"policy|fit|step": [used, reserved, internal, external, batch, holes, largest, needed]}.

const KINDS = ["used", "reserved", "internal", "external"];

// The requests in the arena at a step, by address, and the holes between them.
function arenaAt(data, policy, fit, step) {
  const trace = data.traces[`${policy}|${fit}`];
  const admitted = trace.filter(([, since]) => since <= step).length;
  const running = [];
  for (let id = 0; id < admitted; id++) {
    const [start, since] = trace[id];
    const [prompt, output] = data.requests[id];
    if (step < since + output) running.push({ id, start, room: data.rooms[policy][id], used: prompt + step - since, total: prompt + output });
  }
  running.sort((a, b) => a.start - b.start);
  const holes = [];
  let end = 0;
  for (const { start, room } of [...running, { start: data.slots, room: 0 }]) {
    if (start > end) holes.push([end, start - end]);
    end = start + room;
  }
  const sum = (of) => running.reduce((total, stay) => total + of(stay), 0);
  const [used, total, held] = [sum((s) => s.used), sum((s) => s.total), sum((s) => s.room)];
  const largest = holes.reduce((best, hole) => (hole[1] > best[1] ? hole : best), [0, 0]);
  return { running, holes, largest, admitted, used, reserved: total - used, internal: held - total, external: data.slots - held,
    needed: data.rooms[policy][admitted] };
}

function explore(kit, data) {
  const { element, svg } = kit;
  kit.select("policy", "Reserve", [["oracle", "exactly (oracle)"], ["pow2", "a power of two (pow2)"], ["max", "the limit (max)"]]);
  kit.select("fit", "Pick a hole", [["first", "first fit"], ["best", "best fit"]]);
  const last = data.horizon / data.unit;
  const setTime = kit.range("time", "Step", { max: last, value: 60, show: (t) => number(t * data.unit) });
  const refused = (time) => {
    const now = arenaAt(data, kit.state.policy, kit.state.fit, time * data.unit);
    return now.external >= now.needed;
  };
  const search = (from, by) => {
    let time = from + by;
    while (time >= 0 && time <= last && !refused(time)) time += by;
    return time >= 0 && time <= last ? time : null;
  };
  const jump = (by) => () => setTime(search(kit.state.time, by));
  const before = kit.button("◂ refused", jump(-1), "The step before this one in which enough is free, but not in one piece");
  const after = kit.button("refused ▸", jump(1), "The next step in which enough is free, but not in one piece");

  const width = 660, left = 52, wide = width - left - 4, line = 22, thick = 17;
  const rows = Math.ceil(data.slots / data.row);
  const top = 46, wait = top + rows * line + 6, past = wait + 50, high = 150;
  const picture = kit.drawing(width, past + high + 24, "Map of the arena at one step, and the arena over time below it");
  picture.style.minWidth = "37rem";              // on a phone it scrolls
  const hatch = `${kit.root.id}-hatch`;
  picture.append(svg("defs", {}, svg("pattern", { id: hatch, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("line", { x1: 0, x2: 0, y1: 0, y2: 5, style: "stroke: var(--kv-muted)", "stroke-width": 1.6 }))));
  const history = svg("g"), map = svg("g");
  picture.append(history, map);
  const key = element("div", { class: "kv-key" }, ...[["solid", "used", "opacity: 1"], ["pale", "reserved", "opacity: 0.35"]].map(([, text, style]) =>
    element("span", {}, element("i", { style: `background: var(--kv-r0); ${style}` }), text)),
    element("span", {}, element("i", { style: "background: repeating-linear-gradient(135deg, var(--kv-muted) 0 1px, transparent 1px 4px)" }), "internal"),
    element("span", {}, element("i", { style: "border: 1px solid var(--kv-line)" }), "free (external)"));
  kit.stage.append(key);

  const colour = (id) => `var(--kv-r${id % 8})`;
  const write = (x, y, text, extra = {}) => svg("text", { x, y, ...extra }, text);
  const box = (x, y, w, h, style, extra = {}) => svg("rect", { x, y, width: Math.max(w, 0), height: h, style, ...extra });
  const scale = wide / data.row;

  // A run of slots, cut at the ends of the rows.
  function strip(start, size, style, extra) {
    const parts = [];
    for (let at = start; at < start + size;) {
      const row = Math.floor(at / data.row), column = at % data.row;
      const n = Math.min(start + size - at, data.row - column);
      parts.push(box(left + column * scale, top + row * line, n * scale, thick, style, extra));
      at += n;
    }
    return parts;
  }

  function drawShares(now) {
    const parts = [];
    let x = left;
    const looks = { used: "fill: var(--kv-ink)", reserved: "fill: var(--kv-ink); opacity: 0.35", internal: `fill: url(#${hatch})`, external: "fill: none" };
    for (const kind of KINDS) {
      const share = now[kind] / data.slots, w = share * wide;
      parts.push(box(x, 2, w, 13, looks[kind]));
      if (w > 78) parts.push(write(x + 2, 29, `${kind} ${(100 * share).toFixed(0)} %`, { class: "muted" }));
      else if (w > 30) parts.push(write(x + 2, 29, `${(100 * share).toFixed(0)} %`, { class: "muted" }));
      x += w;
    }
    parts.push(box(left, 2, wide, 13, "fill: none; stroke: var(--kv-line)"));
    return parts;
  }

  function drawMap(now) {
    const parts = [...strip(0, data.slots, "fill: none; stroke: var(--kv-line)")];
    for (let row = 0; row < rows; row++) parts.push(write(left - 6, top + row * line + 13, number(row * data.row), { class: "muted", "text-anchor": "end" }));
    for (const { id, start, room, used, total } of now.running) {
      parts.push(...strip(start, used, `fill: ${colour(id)}`));
      parts.push(...strip(start + used, total - used, `fill: ${colour(id)}; opacity: 0.35`));
      parts.push(...strip(start + total, room - total, `fill: url(#${hatch})`));
      const room1 = Math.min(used, data.row - (start % data.row)) * scale;
      if (room1 > 22) {
        parts.push(write(left + (start % data.row) * scale + 4, top + Math.floor(start / data.row) * line + 13, id + 1,
          { style: "fill: var(--kv-paper); font-size: 11px; font-weight: 600" }));
      }
    }
    parts.push(...strip(...now.largest, "fill: none; stroke: var(--kv-ink)", { "stroke-width": 2 }));
    parts.push(box(left, wait, now.needed * scale, 13, "fill: var(--kv-accent)"));
    const text = `request ${now.admitted + 1} waits for ${number(now.needed)}`;
    const x = left + now.needed * scale + 6;
    parts.push(x > width - 190 ? write(left, wait + 27, text) : write(x, wait + 11, text));
    return parts;
  }

  let drawn = "";
  const at = (step) => left + (step / data.horizon) * wide;
  const height = (slot) => past + high * (1 - slot / data.slots);
  const outline = (points) => path(points.map(([step, slot]) => [at(Math.min(step, data.horizon)), height(slot)])) + "z";
  function drawHistory({ policy, fit }) {
    const parts = [box(left, past, wide, high, "fill: none; stroke: var(--kv-line)")];
    data.traces[`${policy}|${fit}`].forEach(([start, since], id) => {
      const [prompt, output] = data.requests[id];
      const room = data.rooms[policy][id], end = Math.min(since + output, data.horizon), grown = prompt + end - since;
      const add = (points, style) => parts.push(svg("path", { d: outline(points), style }));
      add([[since, start], [end, start], [end, start + prompt + output], [since, start + prompt + output]], `fill: ${colour(id)}; opacity: 0.35`);
      add([[since, start], [end, start], [end, start + grown], [since, start + prompt]], `fill: ${colour(id)}`);
      if (room > prompt + output) {
        add([[since, start + prompt + output], [end, start + prompt + output], [end, start + room], [since, start + room]], `fill: url(#${hatch})`);
      }
    });
    for (let step = 0; step <= data.horizon; step += data.horizon / 4) {
      parts.push(write(at(step), past + high + 15, step ? number(step) : "step 0", { class: "muted", "text-anchor": step === data.horizon ? "end" : "middle" }));
    }
    parts.push(write(left, past - 6, "the same arena over time", { class: "muted" }));
    history.replaceChildren(...parts);
  }

  kit.start((state) => {
    const { policy, fit, time } = state, step = time * data.unit;
    if (drawn !== `${policy}|${fit}`) drawHistory(state);
    drawn = `${policy}|${fit}`;
    const now = arenaAt(data, policy, fit, step);
    map.replaceChildren(...drawShares(now), ...drawMap(now),
      svg("line", { x1: at(step), x2: at(step), y1: past - 4, y2: past + high + 3, style: "stroke: var(--kv-ink)", "stroke-width": 1.5 }));
    before.disabled = search(time, -1) === null;
    after.disabled = search(time, 1) === null;

    const share = (kind) => `${(100 * now[kind] / data.slots).toFixed(1)} % ${kind}`;
    const verdict = now.external >= now.needed
      ? element("b", {}, "Enough is free, and no hole is large enough: refused.")
      : "There is not enough, in however many pieces.";
    const served = data.traces[`${policy}|${fit}`].filter(([, since], id) => since + data.requests[id][1] <= step).length;
    kit.readout.replaceChildren(
      `Step ${number(step)}, ${policy}, ${fit} fit: ${now.running.length} requests run, ${served} are served. `,
      KINDS.map(share).join(", "), `. Request ${now.admitted + 1} needs ${number(now.needed)} slots; ${number(now.external)} are free, the largest hole has ${number(now.largest[1])}. `, verdict);
    const expected = data.expected[`${policy}|${fit}|${step}`];
    delete kit.root.dataset.agrees;
    if (expected) {
      const found = [...KINDS.map((kind) => now[kind]), now.running.length, now.holes.length, now.largest[1], now.needed];
      const agrees = found.join() === expected.join();
      kit.root.dataset.agrees = agrees;
      kit.readout.append(agrees ? " The Python of this page counts the same." : ` PYTHON COUNTS ${expected.join(", ")}`);
    }
  });
}
