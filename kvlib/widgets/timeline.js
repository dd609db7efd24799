// Who runs in which step, and how many blocks are free: the records of kvlib's engine, step by step.
// data: { runs: { "door|pool|way": { rows: ["w3d20…"], free: "48 47 …", tokens, ms, made, moved: [[step, tokens]], out: [[step, ids]] } }, doors, pools, ways,
//         guests: [[prompt, output]], places, start: { door, pool, way, step }, expected: { key: [steps, preemptions, output tokens, tokens computed] } }
// Letters, each with the number of steps that it lasts: d decodes, p reads its prompt (or reads again), s has a place and no turn, w waits, o preempted, h preempted to the host, . not there.

function explore(kit, data) {
  const { svg, element } = kit;
  const count = data.guests.length;
  const colour = (i) => `var(--kv-r${i % 8})`;
  const plural = (n, noun, many = `${noun}s`) => `${number(n)} ${n === 1 ? noun : many}`;
  const unpacked = {};
  function unpack(key) {
    const { rows, out, moved, ...lists } = data.runs[key];
    const run = { rows: rows.map((row) => row.replace(/(\D)(\d+)/g, (_, letter, times) => letter.repeat(Number(times)))) };
    for (const [name, text] of Object.entries(lists)) run[name] = text.split(" ").map(Number);
    run.out = run.free.map(() => []);
    run.moved = run.free.map(() => 0);
    for (const [at, ids] of out) run.out[at] = ids;
    for (const [at, tokens] of moved) run.moved[at] = tokens;
    return run;
  }
  const named = (door, pool, way) => (unpacked[`${door}|${pool}|${way}`] ??= unpack(`${door}|${pool}|${way}`));
  const runOf = ({ door, pool, way }) => named(door, data.pools[pool], way);
  const sum = (list, end = list.length) => list.slice(0, end).reduce((a, b) => a + b, 0);

  const setStep = kit.range("step", "Step", { min: 1, max: data.expected[`${data.start.door}|${data.start.pool}|${data.start.way}`][0], value: data.start.step });
  const slider = kit.root.querySelector("input[type=range]");
  const shown = kit.root.querySelector("output");
  const preemptions = (run) => run.out.flatMap((ids, i) => (ids.length ? [i + 1] : []));
  const following = (run, step) => { const all = preemptions(run); return all.find((at) => at > step) ?? all[0]; };
  const jump = kit.button("Next preemption", () => setStep(following(runOf(kit.state), Math.min(kit.state.step, runOf(kit.state).free.length))));
  kit.select("door", "Batching", data.doors.map((name) => [name, name]), data.start.door);
  kit.select("way", "Who is preempted", data.ways.map((name) => [name, name === "swap" ? "is swapped out and in" : "computes again"]), data.start.way);
  const choice = kit.root.querySelectorAll("select")[1];
  kit.range("pool", "Blocks in the pool", { min: 0, max: data.pools.length - 1, value: data.pools.indexOf(data.start.pool), show: (i) => String(data.pools[i]) });

  const width = 664, left = 84, right = 8, row = 17, top = 22;
  const blocks = { top: top + count * row + 34, height: 62 };
  const load = { top: blocks.top + blocks.height + 34, height: 44 };
  const height = load.top + load.height + 38;
  const picture = kit.drawing(width, height, "A row for each request over the steps, free blocks and tokens of each step below");
  picture.style.minWidth = "37rem";              // on a phone it scrolls

  const hatch = svg("pattern", { id: `${kit.root.id}-hatch`, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("rect", { width: 5, height: 5, style: "fill: var(--kv-paper)" }), svg("rect", { width: 1.6, height: 5, style: "fill: var(--kv-ink)" }));
  const crossed = svg("pattern", { id: `${kit.root.id}-host`, width: 5, height: 5, patternUnits: "userSpaceOnUse" },
    svg("rect", { width: 5, height: 5, style: "fill: var(--kv-paper)" }), svg("circle", { cx: 2.5, cy: 2.5, r: 1.2, style: "fill: var(--kv-ink)" }));
  picture.append(svg("defs", {}, hatch, crossed));
  const layer = svg("g");
  picture.append(layer);

  const key = element("div", { class: "kv-key" });
  const swatch = (style, text) => element("span", {}, element("i", { style }), text);
  key.append(
    swatch("background: var(--kv-r0)", "decodes"),
    swatch("background: color-mix(in srgb, var(--kv-r0) 40%, transparent)", "reads its prompt, or reads again"),
    swatch("background: var(--kv-muted)", "has a place and no turn"),
    swatch("background: var(--kv-line)", "waits"),
    swatch("background: repeating-linear-gradient(45deg, var(--kv-ink) 0 1.6px, var(--kv-paper) 1.6px 5px)", "preempted"),
    swatch("background: radial-gradient(var(--kv-ink) 30%, var(--kv-paper) 34%) 0 0 / 5px 5px", "preempted, in host memory"));
  kit.readout.before(key);

  const styles = {
    d: (i) => ({ style: `fill: ${colour(i)}` }),
    p: (i) => ({ style: `fill: ${colour(i)}`, opacity: 0.4 }),
    s: () => ({ style: "fill: var(--kv-muted)" }),
    w: () => ({ style: "fill: var(--kv-line)" }),
    o: () => ({ style: `fill: url(#${kit.root.id}-hatch)` }),
    h: () => ({ style: `fill: url(#${kit.root.id}-host)` }),
  };
  const write = (x, y, text, extra = {}) => svg("text", { x, y, ...extra }, text);

  // An area of one value per step.
  const area = (values, x, y, base) =>
    path([[x(0), base], ...values.flatMap((value, i) => [[x(i), y(value)], [x(i + 1), y(value)]]), [x(values.length), base]]) + "Z";

  kit.start((state) => {
    const run = runOf(state), pool = data.pools[state.pool], steps = run.free.length;
    slider.max = steps;                          // the browser moves the handle back if it stands beyond the end
    const step = Math.min(state.step, steps), at = step - 1;
    if (step !== state.step) {
      state.step = step;
      kit.root.dataset.state = JSON.stringify(state);
    }
    shown.textContent = `${step} of ${steps}`;
    const all = preemptions(run);
    choice.disabled = !all.length;
    jump.disabled = !all.length || following(run, step) === step;

    const longest = Math.max(...data.doors.flatMap((door) => data.ways.map((way) => named(door, pool, way).free.length)));
    const unit = (width - left - right) / longest, x = (i) => left + i * unit;
    const parts = [];
    for (let i = 0; i < count; i++) {
      const letters = run.rows[i], y = top + i * row, [prompt, output] = data.guests[i];
      parts.push(write(left - 8, y + 11.5, `${prompt} + ${output}`, { "text-anchor": "end", style: `font-size: 11px; font-weight: ${"dps".includes(letters[at]) ? 700 : 400}` }));
      for (let from = 0; from < steps;) {
        let to = from + 1;
        while (to < steps && letters[to] === letters[from]) to++;
        if (styles[letters[from]]) {
          const thin = letters[from] === "w" ? 5 : 0;
          parts.push(svg("rect", { x: x(from), y: y + 1 + thin, width: Math.max(0.8, (to - from) * unit), height: row - 4 - 2 * thin, ...styles[letters[from]](i) }));
        }
        from = to;
      }
    }
    parts.push(write(left - 8, 12, "prompt + output", { "text-anchor": "end", class: "muted", style: "font-size: 9.5px" }),
      write(left, 12, "a row for each request, in order of arrival", { class: "muted" }));

    const panel = (box, values, most, name, fill) => {
      const base = box.top + box.height, y = (value) => base - (box.height * Math.min(value, most)) / most;
      parts.push(write(left, box.top - 7, name, { class: "muted" }),
        write(left - 8, box.top + 5, number(most), { "text-anchor": "end", class: "muted" }),
        write(left - 8, base + 3, "0", { "text-anchor": "end", class: "muted" }),
        svg("path", { d: area(values, x, y, base), style: `fill: ${fill}` }),
        svg("line", { x1: left, x2: width - right, y1: base, y2: base, style: "stroke: var(--kv-muted)" }),
        svg("line", { x1: left, x2: width - right, y1: box.top, y2: box.top, style: "stroke: var(--kv-line); stroke-dasharray: 2 3" }));
    };
    panel(blocks, run.free, pool, "blocks free", "var(--kv-r1)");
    panel(load, run.ms, Math.ceil(Math.max(...run.ms)), "milliseconds of the step, simulated", "var(--kv-line)");
    for (const i of all) parts.push(svg("path", { d: `M${x(i - 0.5) - 3.5} ${blocks.top + blocks.height + 9}h7l-3.5 -7z`, style: "fill: var(--kv-accent)" }));

    const bottom = load.top + load.height;
    parts.push(svg("rect", { x: x(at), y: top - 4, width: Math.max(1.6, unit), height: bottom - top + 4, style: "fill: var(--kv-ink)", opacity: 0.8 }),
      svg("path", { d: `M${x(step - 0.5) - 5} ${top - 10}h10l-5 6z`, style: "fill: var(--kv-ink)" }));
    const every = longest > 400 ? 100 : 50;
    for (let i = 0; i <= longest; i += every) {
      parts.push(svg("line", { x1: x(i), x2: x(i), y1: bottom, y2: bottom + 4, style: "stroke: var(--kv-muted)" }),
        write(x(i), bottom + 16, String(i), { "text-anchor": "middle", class: "muted" }));
    }
    parts.push(write((left + width) / 2, bottom + 32, "step", { "text-anchor": "middle", class: "muted" }));
    layer.replaceChildren(...parts);

    const now = run.rows.map((letters) => letters[at]);
    const having = (letters) => now.filter((letter) => letters.includes(letter)).length;
    const decodes = having("d"), prompts = having("p"), waits = having("w"), away = having("oh"), idle = having("s");
    const reading = run.tokens[at] - decodes;
    const seconds = sum(run.ms, step) / 1000, made = sum(run.made, step), sent = sum(run.out.map((ids) => ids.length), step);
    const busy = [decodes ? `${plural(decodes, "request decodes", "requests decode")}` : "", prompts ? `${number(prompts)} ${prompts === 1 ? "reads" : "read"} ${plural(reading, "token")} of prompt` : ""].filter(Boolean).join(", ");
    const moved = run.moved[at] ? `, ${number(run.moved[at])} cross the bus` : "";
    const mine = [steps, sum(run.out.map((ids) => ids.length)), sum(run.made), sum(run.tokens)];
    const agrees = mine.join() === data.expected[`${state.door}|${pool}|${state.way}`].join();
    kit.root.dataset.agrees = agrees;
    kit.readout.replaceChildren(element("b", {}, `Step ${step}: ${busy}.`),
      ` ${plural(run.tokens[at], "token")} in this step${moved}; it takes ${number(run.ms[at], 1)} ms. ${plural(run.free[at], "block")} of ${pool} free.`
      + ` ${having("dps")} of ${data.places} places are taken${idle ? `, ${number(idle)} without a turn` : ""}; ${number(waits)} ${waits === 1 ? "waits" : "wait"}, ${number(away)} ${away === 1 ? "is" : "are"} preempted`
      + (run.out[at].length ? ` (in this step: ${run.out[at].map((i) => data.guests[i].join(" + ")).join(", ")})` : "")
      + `. So far: ${plural(sent, "preemption")}, ${plural(made, "token")} written in ${number(seconds, 2)} s, ${number(made / seconds)} a second. `
      + `The whole run takes ${number(sum(run.ms) / 1000, 2)} s. ` + (agrees ? "kvlib's summary of it says the same." : "KVLIB'S SUMMARY SAYS SOMETHING ELSE!"));
  });
}
