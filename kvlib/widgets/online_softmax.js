// Walk over scores tile by tile with a running maximum and sum, in an order and a tile size of the reader's choice.
// data: heads {name: {scores, m, l}}, the last two as Python found them over all scores; letters, one a key; sizes of tiles.

function explore(kit, data) {
  const { svg } = kit;
  const keys = data.letters.length;
  const orders = {
    forwards: (n) => Array.from({ length: n }, (_, i) => i),
    backwards: (n) => Array.from({ length: n }, (_, i) => n - 1 - i),
    inside: (n) => Array.from({ length: n }, (_, i) => (i % 2 ? n - 1 - (i >> 1) : i >> 1)),
  };
  kit.select("head", "Scores of", Object.keys(data.heads).map((name) => [name, name]), Object.keys(data.heads)[1]);
  kit.select("size", "Tile", data.sizes.map((size) => [String(size), size === 1 ? "1 key" : `${size} keys`]), "8");
  kit.select("order", "Order", [["forwards", "oldest first"], ["backwards", "newest first"], ["inside", "from both ends"]]);
  const setRead = kit.range("read", "Keys read", { min: 0, max: keys, value: 40 });
  const size = () => Number(kit.state.size);
  const back = kit.button("Back", () => setRead((Math.ceil(kit.state.read / size()) - 1) * size()), "One tile back");
  const next = kit.button("Next tile", () => setRead((Math.floor(kit.state.read / size()) + 1) * size()), "Read the next tile");

  const width = 660, left = 40, plot = 590, top = 26, height = 150;
  const picture = kit.drawing(width, 300, "Scores of 96 keys as bars, the running maximum, and the share of the final sum gathered");
  const layer = svg("g");
  picture.append(layer);

  // The partial after each tile, and whether its maximum was a new one. Of the last tile, only what is still to be read.
  function walk({ head, order }, read) {
    const { scores } = data.heads[head];
    let m = -Infinity, l = 0;
    return orders[order](keys / size()).slice(0, Math.ceil(read / size())).map((tile, i) => {
      const part = scores.slice(tile * size(), tile * size() + Math.min(size(), read - i * size()));
      const largest = Math.max(m, ...part);
      const keep = m === -Infinity ? 0 : Math.exp(m - largest);
      const rose = largest > m;
      l = l * keep + part.reduce((sum, s) => sum + Math.exp(s - largest), 0);
      m = largest;
      return { tile, part, m, l, keep, rose };
    });
  }

  kit.start((state) => {
    const { scores, m: finalM, l: finalL } = data.heads[state.head];
    const steps = walk(state, keys), done = walk(state, state.read), last = done.at(-1);
    const count = done.length, wide = size();
    back.disabled = state.read === 0;
    next.disabled = state.read === keys;
    const low = Math.min(...scores), high = Math.max(...scores);
    const x = (key) => left + (plot * key) / keys;
    const y = (score) => top + height * (1 - (score - low) / (high - low || 1));
    const seen = new Set(done.flatMap(({ tile, part }) => part.map((_, i) => tile * wide + i)));
    const parts = [svg("text", { x: left, y: 14, class: "muted" }, "score of each key, oldest on the left; read tiles are coloured by their share of the answer")];
    scores.forEach((score, key) => {
      const was = seen.has(key);
      const weight = Math.exp(score - finalM);
      parts.push(svg("rect", {
        x: x(key) + 0.5, width: plot / keys - 1, y: y(score), height: top + height + 3 - y(score),
        fill: was ? "var(--kv-accent)" : "var(--kv-line)", "fill-opacity": was ? 0.25 + 0.75 * weight : 1 }));
      parts.push(svg("text", { x: x(key + 0.5), y: top + height + 16, "text-anchor": "middle", class: "muted", style: "font-size: 8px" }, data.letters[key]));
    });
    if (last) {
      parts.push(
        svg("line", { x1: left, x2: left + plot, y1: y(last.m), y2: y(last.m), stroke: "var(--kv-ink)", "stroke-dasharray": "4 3" }),
        svg("text", { x: left - 5, y: y(last.m) + 4, "text-anchor": "end" }, "m"),
        svg("rect", { x: x(last.tile * wide), width: (plot * wide) / keys, y: top - 4, height: height + 8, fill: "none", stroke: "var(--kv-ink)" }));
    }
    // The sum so far, in units of the final maximum, tile after tile in the order in which they come.
    const base = 290, tall = 70;
    parts.push(svg("text", { x: left, y: base - tall - 10, class: "muted" }, "share of the final sum after each tile, in the order of reading; a mark where the maximum rose"));
    const pitch = plot / steps.length;
    steps.forEach((whole, i) => {
      const read = i < count;
      const { m, l, rose } = read ? done[i] : whole;
      const share = (l * Math.exp(m - finalM)) / finalL;
      parts.push(svg("rect", { x: left + i * pitch + 0.5, width: Math.max(0.6, pitch - 1), y: base - tall * share, height: Math.max(0.8, tall * share),
        fill: read ? "var(--kv-accent)" : "var(--kv-faint)" }));
      if (rose && read) parts.push(svg("rect", { x: left + i * pitch + pitch / 2 - 1.5, width: 3, y: base + 3, height: 5, fill: "var(--kv-ink)" }));
    });
    parts.push(svg("line", { x1: left, x2: left + plot, y1: base, y2: base, stroke: "var(--kv-muted)" }));
    layer.replaceChildren(...parts);

    const rises = done.filter(({ rose }) => rose).length;
    if (!last) {
      kit.readout.textContent = `Nothing read of ${steps.length} tiles: m = −∞, l = 0.`;
      return;
    }
    const share = (100 * last.l * Math.exp(last.m - finalM)) / finalL;
    const kept = last.rose && count > 1 ? ` This tile raised it: what came before was multiplied by ${last.keep.toPrecision(2)}.` : "";
    const same = state.read === keys && Math.abs(last.m - finalM) < 1e-6 && Math.abs(last.l / finalL - 1) < 1e-3;
    kit.readout.textContent = `${state.read} of ${keys} keys, ${count} of ${steps.length} tiles: m = ${last.m.toFixed(1)}, l = ${last.l.toPrecision(4)}, ${number(share, share < 1 ? 3 : 1)} % of the final sum. `
      + `The maximum has risen ${rises} ${rises === 1 ? "time" : "times"}.${kept}${same ? " The softmax over all keys at once, in Python, has the same m and l." : ""}`;
  });
}
