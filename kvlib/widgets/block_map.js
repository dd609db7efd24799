// Replay what a real cache did with its memory: every event, as one pool of blocks and as the table of each sequence.
// data: { slots, limit, names, moments: { size: [{ text, bad (requests lost), tables: { name: ids }, lengths: { name: tokens }, refs, copied }] },
//         labels: [[size, label]], expected: { size: [[held slots, stored tokens, shared blocks]] } }

function explore(kit, data) {
  const { svg, element } = kit;
  const colour = (name) => `var(--kv-r${data.names.indexOf(name) % 8})`;
  const count = data.moments[data.labels[0][0]].length;
  const plural = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;

  const setEvent = kit.range("event", "Event", { min: 1, max: count, value: data.start ?? 1, show: (e) => `${e} of ${count}` });
  const back = kit.button("Back", () => setEvent(kit.state.event - 1), "One event back");
  const next = kit.button("Next", () => setEvent(kit.state.event + 1), "Next event");
  kit.select("size", "Memory in", data.labels.map(([size, label]) => [String(size), label]), String(data.size));
  kit.select("follow", "Follow the table of", data.names.map((name) => [name, name]), data.follow);

  const width = 664, columns = 32, rows = data.slots / columns;
  const left = 8, pitch = 20.25, cell = 17.5, line = 31;
  const history = { top: 18, height: 40 };
  const tables = { top: 90, row: 23, left: 92, token: (width - 92 - 60) / data.limit };
  const pool = { top: tables.top + data.most * tables.row + 54 };
  const height = pool.top + rows * line + 2;
  const picture = kit.drawing(width, height, "The tables of all sequences above, the pool of blocks below");
  picture.style.minWidth = "37rem";              // on a phone it scrolls

  const key = element("div", { class: "kv-key" });
  const swatch = (style, text) => element("span", {}, element("i", { style }), text);
  key.append(
    swatch("background: var(--kv-r0)", "a stored token"),
    swatch("background: color-mix(in srgb, var(--kv-r0) 22%, transparent)", "held, and empty"),
    swatch("background: linear-gradient(var(--kv-r0) 50%, var(--kv-r4) 50%)", "held by two sequences"),
    swatch("background: var(--kv-faint); border: 1px solid var(--kv-line)", "free"),
    swatch("border: 2px solid var(--kv-ink)", "taken in this event"));
  kit.readout.before(key);

  const rect = (x, y, w, h, style, extra = {}) => svg("rect", { x, y, width: Math.max(0, w), height: h, style, ...extra });
  const write = (x, y, text, extra = {}) => svg("text", { x, y, ...extra }, text);

  // Who holds a block, and how many of its slots are written.
  function holders(moment, size) {
    const held = new Map();
    for (const [name, ids] of Object.entries(moment.tables)) {
      ids.forEach((id, i) => {
        const filled = Math.max(0, Math.min(size, moment.lengths[name] - i * size));
        const block = held.get(id) ?? { owners: [], filled: 0 };
        block.owners.push(name);
        block.filled = Math.max(block.filled, filled);
        held.set(id, block);
      });
    }
    return held;
  }

  function totals(moment, size) {
    const held = [...holders(moment, size).values()];
    const stored = held.reduce((sum, block) => sum + block.filled, 0);
    return { held: held.length * size, stored, shared: held.filter((block) => block.owners.length > 1).length };
  }

  const corner = (slot) => [left + (slot % columns) * pitch, pool.top + Math.floor(slot / columns) * line];

  // One slot, its colours stacked if several sequences hold it.
  function drawSlot(slot, owners, written) {
    const [x, y] = corner(slot);
    if (!owners) return [rect(x, y, cell, cell, "fill: var(--kv-faint)", { rx: 2 })];
    const band = cell / owners.length;
    return owners.map((name, i) => rect(x, y + i * band, cell, band + (i < owners.length - 1 ? 0.3 : 0), `fill: ${colour(name)}`, { opacity: written ? 1 : 0.2 }));
  }

  // The outline of a block: one frame for each row of the picture that it reaches over.
  function frames(id, size, style, extra = {}) {
    const parts = [];
    for (let slot = id * size; slot < (id + 1) * size; slot += columns) {
      const [x, y] = corner(slot);
      parts.push(rect(x - 1.6, y - 1.6, (Math.min(size, columns) - 1) * pitch + cell + 3.2, cell + 3.2, `fill: none; ${style}`, { rx: 3.5, ...extra }));
    }
    return parts;
  }

  function drawPool(moment, before, size) {
    const held = holders(moment, size), earlier = before ? holders(before, size) : new Map();
    const cells = [], outlines = [], labels = [];
    for (let id = 0; id < data.slots / size; id++) {
      const block = held.get(id);
      for (let place = 0; place < size; place++) cells.push(...drawSlot(id * size + place, block?.owners, block && place < block.filled));
      if (block) outlines.push(...frames(id, size, earlier.has(id) ? "stroke: var(--kv-muted); stroke-width: 0.7" : "stroke: var(--kv-ink); stroke-width: 2"));
      else if (earlier.has(id)) outlines.push(...frames(id, size, "stroke: var(--kv-muted); stroke-width: 1.2; stroke-dasharray: 3 2"));
      if (size >= 4 || id % 4 === 0) {
        const [x, y] = corner(id * size);
        labels.push(write(x, y - 3.5, String(id), { class: "muted", style: "font-size: 8.5px" }));
      }
    }
    return [...cells, ...outlines, ...labels];
  }

  function drawTables(moment, size, follow) {
    const parts = [write(left, tables.top - 6, "Tables: what a sequence sees", { style: "font-weight: 600" }),
      write(left, pool.top - 17, "Pool: where it lies", { style: "font-weight: 600" })];
    Object.entries(moment.tables).forEach(([name, ids], row) => {
      const y = tables.top + 4 + row * tables.row, tokens = moment.lengths[name], chosen = name === follow;
      parts.push(rect(left, y + 1, 14, 14, `fill: ${colour(name)}`, { rx: 3 }),
        write(left + 20, y + 13, name, { style: `font-weight: ${chosen ? 700 : 400}` }),
        write(left + 76, y + 13, `${tokens}`, { "text-anchor": "end", class: "muted" }));
      ids.forEach((id, i) => {
        const x = tables.left + i * size * tables.token, wide = size * tables.token;
        const filled = Math.max(0, Math.min(size, tokens - i * size)) * tables.token;
        const gap = Math.min(2, wide * 0.2), shared = moment.refs[id] > 1;
        parts.push(rect(x, y, wide - gap, 16, `fill: ${colour(name)}`, { opacity: 0.2 }),
          rect(x, y, Math.min(filled, wide - gap), 16, `fill: ${colour(name)}`, { opacity: chosen ? 1 : 0.62 }));
        if (shared) parts.push(rect(x, y + 17.2, wide - gap, 2.4, "fill: var(--kv-ink)"));
        if (wide >= 24) parts.push(write(x + (wide - gap) / 2, y + 12, String(id), { "text-anchor": "middle", style: "font-size: 10.5px; fill: var(--kv-ink); paint-order: stroke; stroke: var(--kv-paper); stroke-width: 2.6px" }));
      });
      if (chosen) parts.push(rect(left - 4, y - 3, width - left, 22, "fill: none; stroke: var(--kv-line)", { rx: 4 }));
    });
    return parts;
  }

  // From each entry of the followed table to its block.
  function drawLinks(moment, size, follow) {
    const names = Object.keys(moment.tables), row = names.indexOf(follow);
    if (row < 0) return [];
    const y = tables.top + 4 + row * tables.row + 17;
    return moment.tables[follow].map((id, i) => {
      const x = tables.left + (i + 0.5) * size * tables.token - 1;
      const [slotX, slotY] = corner(id * size);
      const toX = slotX + (Math.min(size, columns) * pitch) / 2 - 1.5, toY = slotY - 2;
      const bend = (toY - y) * 0.5;
      const line = { d: `M${x} ${y}C${x} ${y + bend} ${toX} ${toY - bend} ${toX} ${toY}` };
      const wide = size >= 8 ? 1.9 : 1;
      return svg("g", {},
        svg("path", { ...line, style: `fill: none; stroke: var(--kv-paper); stroke-width: ${wide + 1.8}`, opacity: size >= 4 ? 0.8 : 0 }),
        svg("path", { ...line, style: `fill: none; stroke: ${colour(follow)}; stroke-width: ${wide}`, opacity: size >= 4 ? 1 : 0.55 }),
        svg("circle", { cx: toX, cy: toY, r: size >= 4 ? 3.2 : 1.4, style: `fill: ${colour(follow)}; stroke: var(--kv-paper); stroke-width: ${size >= 4 ? 1 : 0}` }));
    });
  }

  // What every event left behind, small: stored, held, and where somebody was lost.
  function drawHistory(moments, size, event) {
    const step = (width - left - 6) / count, base = history.top + history.height;
    const parts = [write(left, 11, "All events: slots stored, and held", { class: "muted" }),
      svg("line", { x1: left, x2: width - 6, y1: history.top, y2: history.top, style: "stroke: var(--kv-line); stroke-dasharray: 2 3" }),
      svg("line", { x1: left, x2: width - 6, y1: base, y2: base, style: "stroke: var(--kv-line)" }),
      write(width - 6, 11, `all ${data.slots} slots`, { class: "muted", "text-anchor": "end" })];
    moments.forEach((moment, i) => {
      const { held, stored } = totals(moment, size), scale = history.height / data.slots, x = left + i * step;
      const now = i === event - 1;
      parts.push(rect(x, base - held * scale, step - 2, held * scale, "fill: var(--kv-muted)", { opacity: 0.3 }),
        rect(x, base - stored * scale, step - 2, stored * scale, now ? "fill: var(--kv-ink)" : "fill: var(--kv-muted)"));
      if (moment.bad) parts.push(svg("path", { d: `M${x + step / 2 - 5} ${base + 3}l8 8m0 -8l-8 8`, style: "stroke: var(--kv-v); stroke-width: 2" }));
      if (now) parts.push(svg("path", { d: `M${x + step / 2 - 6} ${history.top - 5}h10l-5 5z`, style: "fill: var(--kv-ink)" }));
    });
    return parts;
  }

  kit.start(({ event, size: chosen, follow }) => {
    const size = Number(chosen), moments = data.moments[chosen], moment = moments[event - 1], before = moments[event - 2];
    back.disabled = event === 1;
    next.disabled = event === count;
    picture.replaceChildren(...drawHistory(moments, size, event), ...drawPool(moment, before, size),
      ...drawLinks(moment, size, follow), ...drawTables(moment, size, follow));

    const { held, stored, shared } = totals(moment, size), lost = moments.slice(0, event).reduce((sum, { bad }) => sum + bad, 0);
    const here = Object.keys(moment.tables).length;
    const seen = Object.values(moment.lengths).reduce((sum, tokens) => sum + tokens, 0);
    const ids = moment.tables[follow];
    kit.readout.replaceChildren(element("b", {}, `${event}. ${moment.text}`),
      ` ${plural(here, "sequence")} ${here === 1 ? "sees" : "see"} ${plural(seen, "token")}, stored in ${plural(stored, "slot")} of ${number(held)} held: ${plural(held - stored, "slot")} wasted.`
      + ` ${shared ? `${plural(shared, "block")} shared. ` : ""}${lost ? `Lost so far: ${plural(lost, "request")}. ` : ""}`
      + (moment.copied ? `Copied because shared: ${plural(moment.copied, "block")} of ${size}. ` : "")
      + (ids ? `${follow} has ${plural(ids.length, "block")}.` : `${follow} is not in the cache now.`));
    const mine = [held, stored, shared], agrees = mine.join() === data.expected[chosen][event - 1].join();
    kit.root.dataset.agrees = agrees;
    kit.readout.append(agrees ? " The Python of this page counts the same." : ` PYTHON COUNTS ${data.expected[chosen][event - 1].join(", ")}`);
  });
}
