// One real key on a grid of levels: how many bits, one scale for how many numbers, and what it does to attention.
// data: { tile[token][channel], query[channel], tokens [labels], group, expected { "bits|shared|grid|fault|clip": [rms, moved] } }

const roundHalfEven = (x) => {
  const down = Math.floor(x), rest = x - down;
  if (rest !== 0.5) return Math.round(x);
  return down % 2 === 0 ? down : down + 1;
};

// The tile after it was stored and read: {decoded, step, low, levels} with a step and a low for each number.
function store(tile, { bits, shared, grid, fault, clip }, group) {
  const T = tile.length, D = tile[0].length;
  const levels = 2 ** bits - (grid === "symmetric" ? 2 : 1);
  const [tall, wide] = { token: [1, D], group: [1, group], channel: [T, 1], tile: [T, D] }[shared];
  const empty = () => tile.map((row) => row.map(() => 0));
  const decoded = empty(), step = empty(), low = empty();
  for (let t0 = 0; t0 < T; t0 += tall) {
    for (let d0 = 0; d0 < D; d0 += wide) {
      let lo = Infinity, hi = -Infinity;
      for (let t = t0; t < t0 + tall; t++) for (let d = d0; d < d0 + wide; d++) {
        lo = Math.min(lo, tile[t][d]);
        hi = Math.max(hi, tile[t][d]);
      }
      const middle = grid === "symmetric" ? 0 : (lo + hi) / 2;
      const half = (clip / 100) * (grid === "symmetric" ? Math.max(-lo, hi) : (hi - lo) / 2);
      const s = (2 * half) / levels, start = middle - half;
      for (let t = t0; t < t0 + tall; t++) for (let d = d0; d < d0 + wide; d++) {
        let code = (tile[t][d] - start) / s;
        if (fault !== "truncate") code = roundHalfEven(code);
        else if (grid === "symmetric") code = Math.trunc(tile[t][d] / s) + levels / 2;  // towards zero
        else code = Math.floor(code);
        code = Math.min(Math.max(code, 0), levels);
        if (fault === "wrap" && code >= 2 ** (bits - 1)) code -= 2 ** bits;             // read as a signed integer
        decoded[t][d] = code * s + start;
        step[t][d] = s;
        low[t][d] = start;
      }
    }
  }
  return { decoded, step, low, levels, metadata: (grid === "symmetric" ? 16 : 32) / (tall * wide) };
}

function attention(tile, query) {
  const scores = tile.map((row) => row.reduce((sum, x, d) => sum + x * query[d], 0) / Math.sqrt(query.length));
  const most = Math.max(...scores), weights = scores.map((s) => Math.exp(s - most));
  const total = weights.reduce((a, b) => a + b);
  return weights.map((w) => w / total);
}

function explore(kit, data) {
  const { tile, query, tokens, group } = data;
  const T = tile.length, D = query.length;
  kit.range("bits", "Bits", { min: 2, max: 8, value: 4 });
  kit.select("shared", "One scale for", [["token", `a token (${D} numbers)`], ["group", `${group} numbers of a token`],
    ["channel", `a channel (${T} tokens)`], ["tile", `all ${T} tokens`]]);
  kit.select("grid", "Grid", [["affine", "affine: smallest to largest"], ["symmetric", "symmetric around zero"]]);
  kit.select("fault", "Stored", [["none", "correctly"], ["wrap", "wrapped around (as signed)"], ["truncate", "truncated, not rounded"]]);
  kit.range("clip", "Range kept", { min: 40, max: 100, step: 5, value: 100, show: (c) => `${c} %` });
  kit.range("token", "Look at token", { max: T - 1, value: data.start, show: (t) => `${t}: ${tokens[t]}` });

  const width = 680, left = 46, column = (width - left - 8) / D, mid = column / 2;
  const value = { top: 26, height: 210 }, miss = { top: 274, height: 84 }, soft = { top: 398, height: 84 };
  const picture = kit.drawing(width, soft.top + soft.height + 22, "A key on its grid, the error of each number, and the attention weights");
  picture.style.minWidth = "37rem";
  const sample = (style, text) => kit.element("span", {}, kit.element("i", { style }), text);
  kit.readout.before(kit.element("div", { class: "kv-key" },
    sample("background: var(--kv-k)", "what the key holds"), sample("background: var(--kv-accent)", "what is read back"),
    sample("background: var(--kv-line)", "levels"), sample("background: var(--kv-amber)", "half a step: the bound"),
    sample("background: var(--kv-q)", "attention weight")));
  const all = tile.flat(), from = Math.min(...all), to = Math.max(...all);
  const exact = attention(tile, query);
  const write = (x, y, text, extra = {}) => svg("text", { x, y, ...extra }, text);
  const line = (x1, y1, x2, y2, colour, w = 1) => svg("line", { x1, y1, x2, y2, style: `stroke: ${colour}; stroke-width: ${w}` });
  const bar = (x, y, w, h, style) => svg("rect", { x, y, width: w, height: Math.max(h, 0), style });
  const short = (x) => (Math.abs(x) >= 10 ? x.toFixed(0) : Math.abs(x) >= 0.1 ? x.toFixed(2) : x.toPrecision(2));
  const yValue = (x) => value.top + value.height * (1 - (x - from) / (to - from));
  const inside = (y) => Math.min(Math.max(y, value.top - 6), value.top + value.height + 6);

  function drawKey({ token, bits }, { decoded, step, low, levels }) {
    const parts = [write(0, 14, `Token ${token}, its ${D} channels`, { class: "muted" })];
    let dashes = "";
    for (let d = 0; d < D; d++) {
      const x = left + d * column;
      const [bottom, top] = [low[token][d], low[token][d] + levels * step[token][d]].map((v) => inside(yValue(v)));
      if (bits > 6) parts.push(bar(x, top, column - 2, bottom - top, "fill: var(--kv-line)"));   // too many to draw
      else for (let i = 0; i <= levels; i++) {
        const y = yValue(low[token][d] + i * step[token][d]);
        if (y === inside(y)) dashes += `M${x.toFixed(1)} ${y.toFixed(1)}h${(column - 2).toFixed(1)}`;
      }
    }
    parts.push(svg("path", { d: dashes, style: "stroke: var(--kv-line); stroke-width: 1; fill: none" }));
    for (const v of [from, 0, to]) parts.push(write(left - 6, yValue(v) + 4, short(v), { class: "muted", "text-anchor": "end" }));
    for (let d = 0; d < D; d++) {
      const x = left + d * column + mid - 1, y = yValue(tile[token][d]), back = inside(yValue(decoded[token][d]));
      parts.push(line(x, y, x, back, "var(--kv-accent)", 2.5),
        svg("rect", { x: x - 5, y: back - 1.5, width: 10, height: 3, style: "fill: var(--kv-accent)" }),
        svg("circle", { cx: x, cy: y, r: 3.2, style: "fill: var(--kv-k)" }));
    }
    return parts;
  }

  function drawErrors({ token }, { decoded, step }) {
    const errors = tile[token].map((x, d) => decoded[token][d] - x);
    const most = 1.1 * Math.max(...errors.map(Math.abs), ...step[token].map((s) => s / 2));
    const centre = miss.top + miss.height / 2, y = (e) => (miss.height / 2) * (e / most);
    const parts = [write(0, miss.top - 12, "The error of each number, and the bound", { class: "muted" }),
      write(left - 6, miss.top + 8, `+${short(most)}`, { class: "muted", "text-anchor": "end" }),
      write(left - 6, miss.top + miss.height, `−${short(most)}`, { class: "muted", "text-anchor": "end" }),
      line(left, centre, width - 8, centre, "var(--kv-line)")];
    errors.forEach((e, d) => {
      const x = left + d * column, b = y(step[token][d] / 2);
      parts.push(bar(x + 2, e > 0 ? centre - y(e) : centre, column - 6, Math.abs(y(e)), "fill: var(--kv-accent)"),
        line(x, centre - b, x + column - 2, centre - b, "var(--kv-amber)", 2), line(x, centre + b, x + column - 2, centre + b, "var(--kv-amber)", 2));
    });
    return parts;
  }

  function drawWeights({ token }, weights) {
    const most = Math.max(...exact, ...weights), wide = (width - left - 8) / T, base = soft.top + soft.height;
    const parts = [write(0, soft.top - 12, `Attention of one real query to the ${T} tokens: outline, from the exact keys`, { class: "muted" }),
      write(left - 6, soft.top + 8, `${(100 * most).toFixed(0)} %`, { class: "muted", "text-anchor": "end" }), line(left, base, width - 8, base, "var(--kv-line)")];
    for (let t = 0; t < T; t++) {
      const x = left + t * wide, h = (soft.height * weights[t]) / most, e = (soft.height * exact[t]) / most;
      parts.push(bar(x + 1, base - h, wide - 4, h, "fill: var(--kv-q)"),
        bar(x + 1, base - e, wide - 4, e, "fill: none; stroke: var(--kv-ink); stroke-width: 1.2"),
        write(x + wide / 2 - 1, base + 15, tokens[t], { "text-anchor": "middle", style: `font: 12px ui-monospace, monospace; font-weight: ${t === token ? 700 : 400}; fill: var(${t === token ? "--kv-k" : "--kv-muted"})` }));
    }
    return parts;
  }

  kit.start((state) => {
    const stored = store(tile, state, group), weights = attention(stored.decoded, query);
    picture.replaceChildren(...drawKey(state, stored), ...drawErrors(state, stored), ...drawWeights(state, weights));
    const errors = tile[state.token].map((x, d) => Math.abs(stored.decoded[state.token][d] - x));
    const beyond = errors.filter((e, d) => e > (stored.step[state.token][d] / 2) * (1 + 1e-9)).length;
    const squares = tile.flatMap((row, t) => row.map((x, d) => (stored.decoded[t][d] - x) ** 2));
    const rms = Math.sqrt(squares.reduce((a, b) => a + b) / squares.length);
    const moved = weights.reduce((sum, w, t) => sum + Math.abs(w - exact[t]), 0) / 2;
    const bold = (text) => kit.element("b", {}, text);
    kit.readout.replaceChildren(
      bold(`${number(state.bits + stored.metadata, 2)} bits`), " a number, metadata included · this key: largest error ", bold(short(Math.max(...errors))),
      `, ${beyond ? `${beyond} of ${D} beyond the bound` : "all within the bound"} · all ${T} keys: rms error `, bold(short(rms)),
      " · attention moved: ", bold(`${number(100 * moved, 1)} %`));
    const expected = data.expected[[state.bits, state.shared, state.grid, state.fault, state.clip].join("|")];
    delete kit.root.dataset.agrees;
    if (expected) {
      const agrees = Math.abs(expected[0] - rms) < 1e-6 * (1 + rms) && Math.abs(expected[1] - moved) < 1e-6;
      kit.root.dataset.agrees = agrees;
      kit.readout.append(agrees ? " · the Python of this page finds the same" : ` · PYTHON FINDS ${expected.join(", ")}`);
    }
  });
}
