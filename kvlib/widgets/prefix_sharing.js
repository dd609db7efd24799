// Prefix sharing: the tree of eight chats as a cache of a given size holds it, request by request.
// data: { sizes, trunk, block, runs[order][size][request], expected[order][size] }; a request is
//   [chat, blocks found, tokens of prompt, blocks of text, [blocks cached behind the trunk, per chat], [[chat, blocks lost], …]].

function explore(kit, data) {
  const { runs, sizes, trunk, block } = data;
  const orders = Object.keys(runs);
  const count = runs[orders[0]][sizes[0]].length;
  const chats = runs[orders[0]][sizes[0]][0][4].length;
  const longest = Math.max(...runs[orders[0]][sizes[0]].map((step) => step[3]));
  const most = Math.max(...runs[orders[0]][sizes[0]].map((step) => step[2]));
  const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
  const share = (part, whole) => `${(100 * part / whole).toFixed(1)} %`;
  const sum = (list) => list.reduce((total, value) => total + value, 0);

  kit.select("order", "Order of service", orders.map((name) => [name, name]));
  kit.select("size", "Cache", sizes.map((size) => [String(size), `${size} blocks`]), "120");
  const setRequest = kit.range("request", "Request", { min: 1, max: count, value: 18, show: (r) => `${r} of ${count}` });
  const back = kit.button("Back", () => setRequest(kit.state.request - 1), "One request back");
  const next = kit.button("Next", () => setRequest(kit.state.request + 1), "Serve the next request");

  const left = 46, wide = 7.3, pitch = 19, high = 13, top = 24;
  const width = left + longest * wide + 6;
  const bottom = top + chats * pitch, barsTop = bottom + 34, barsHigh = 74;
  const picture = kit.drawing(width, barsTop + barsHigh + 22, "The blocks of eight chats as a tree, and the requests as bars");
  picture.style.minWidth = "37rem";
  const colour = (chat) => `var(--kv-r${chat})`;
  const sample = (style, text) => kit.element("span", {}, kit.element("i", { style }), text);
  const key = kit.element("div", { class: "kv-key" },
    sample(`background: ${colour(0)}`, "found (in the chat's colour)"),
    sample("background: var(--kv-ink)", "computed now"),
    sample(`background: ${colour(0)}; opacity: 0.4`, "cached, of the others"),
    sample("box-shadow: inset 0 0 0 2px var(--kv-accent)", "evicted by this request"),
    sample("box-shadow: inset 0 0 0 1px var(--kv-line)", "evicted earlier"));
  kit.readout.before(key);

  const x = (position) => left + position * wide;
  const y = (chat) => top + chat * pitch;
  const cell = (position, at, style, opacity = 1) => svg("rect", { x: x(position), y: at, width: wide - 1.3, height: high, opacity, style });
  const write = (tx, ty, text, extra = {}) => svg("text", { x: tx, y: ty, ...extra }, text);

  // The most blocks that each chat has had behind the trunk, up to and including request `last`.
  function reached(steps, last) {
    const blocks = Array(chats).fill(0);
    for (let i = 0; i <= last; i++) blocks[steps[i][0]] = Math.max(blocks[steps[i][0]], steps[i][3] - trunk);
    return blocks;
  }

  function drawTree(steps, at) {
    const [chat, found, , text, cached, lost] = steps[at];
    const known = reached(steps, at), gone = new Map(lost);
    const middle = top + (chats * pitch - pitch + high) / 2 - high / 2;
    const parts = [write(left, 14, "system prompt", { class: "muted" }), write(x(trunk) + 16, 14, "what each chat has added →", { class: "muted" })];
    const join = x(trunk) + 2;
    for (let c = 0; c < chats; c++) {
      if (!known[c]) continue;
      const running = c === chat;
      parts.push(svg("path", { d: `M${join} ${middle + high / 2}C${join + 10} ${middle + high / 2} ${join + 4} ${y(c) + high / 2} ${join + 14} ${y(c) + high / 2}`,
        style: `fill: none; stroke: ${running ? "var(--kv-ink)" : "var(--kv-line)"}; stroke-width: ${running ? 1.8 : 1}` }));
    }
    for (let i = 0; i < trunk; i++) parts.push(cell(i, middle, i < found ? "fill: var(--kv-muted)" : "fill: var(--kv-ink)"));
    for (let c = 0; c < chats; c++) {
      const running = c === chat, evicted = gone.get(c) ?? 0;
      parts.push(write(0, y(c) + 11, `chat ${c}`, { class: running ? "" : "muted", style: running ? "font-weight: 600" : "" }));
      for (let i = 0; i < known[c]; i++) {
        const position = trunk + i + 2.2;
        if (running) parts.push(cell(position, y(c), i < text - trunk && trunk + i >= found ? "fill: var(--kv-ink)" : `fill: ${colour(c)}`));
        else if (i < cached[c]) parts.push(cell(position, y(c), `fill: ${colour(c)}`, 0.4));
        else {
          const now = i < cached[c] + evicted;
          parts.push(svg("rect", { x: x(position) + 0.8, y: y(c) + 0.8, width: wide - 2.9, height: high - 1.6,
            style: `fill: none; stroke: ${now ? "var(--kv-accent)" : "var(--kv-line)"}; stroke-width: ${now ? 1.6 : 1}` }));
        }
      }
    }
    return parts;
  }

  function drawBars(steps, at) {
    const step = (width - left - 6) / count, scale = barsHigh / most, floor = barsTop + barsHigh;
    const parts = [write(left, barsTop - 8, "tokens of each prompt: found, and computed", { class: "muted" }),
      svg("line", { x1: left, x2: width, y1: floor, y2: floor, style: "stroke: var(--kv-line)" })];
    steps.forEach(([chat, found, tokens], i) => {
      const opacity = i === at ? 1 : i < at ? 0.6 : 0.18, old = found * block * scale;
      parts.push(svg("rect", { x: left + i * step, y: floor - old, width: step - 2, height: old, opacity, style: `fill: ${colour(chat)}` }),
        svg("rect", { x: left + i * step, y: floor - tokens * scale, width: step - 2, height: tokens * scale - old, opacity, style: "fill: var(--kv-ink)" }));
    });
    parts.push(svg("path", { d: `M${left + (at + 0.5) * step - 5} ${floor + 12}l4-8 4 8z`, style: "fill: var(--kv-ink)" }));
    return parts;
  }

  function describe({ order, size, request }) {
    const steps = runs[order][size], [chat, found, tokens, text, cached, lost] = steps[request - 1];
    const upTo = steps.slice(0, request), inUse = Math.min(trunk, text) + sum(cached);
    const hit = (some) => sum(some.map((step) => step[1] * block)), all = (some) => sum(some.map((step) => step[2]));
    const taken = lost.length ? `To make room it takes ${lost.map(([c, n]) => `${plural(n, "block")} of chat ${c}`).join(" and ")}. ` : "It takes nothing from the others. ";
    const agrees = hit(steps) === data.expected[order][size];
    kit.root.dataset.agrees = agrees;
    return `Request ${request} is chat ${chat}'s: ${plural(found, "block")} of its prompt of ${number(tokens)} tokens found, `
      + `${text - found} computed (the answer's included). ${taken}`
      + `In use now: ${inUse} of ${size} blocks. Found so far: ${share(hit(upTo), all(upTo))} of the prompt tokens; in the whole run ${share(hit(steps), all(steps))}`
      + (agrees ? ", as the Python of this page counts." : `. PYTHON COUNTS ${data.expected[order][size]} tokens.`);
  }

  kit.start((state) => {
    back.disabled = state.request === 1;
    next.disabled = state.request === count;
    const steps = runs[state.order][state.size];
    picture.replaceChildren(...drawTree(steps, state.request - 1), ...drawBars(steps, state.request - 1));
    kit.readout.textContent = describe(state);
  });
}
