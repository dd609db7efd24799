// What fits: weights and cache of any registry model on a card, and every pair of context and batch that would still fit.
// data: models [{name, weights, made}], codecs [[name, label]], cards [[name, GB]], contexts, batches,
//       parts {"model|codec": [[bytes of a group, fixed bytes, groups at most or 0, tokens in a group], …]}, one for layers that cache alike,
//       expected {"model|codec": bytes of one sequence at each context}, start {control: value},
//       fits {"model|codec": [batch, context]}, as kvlib finds them for fitsAt {tokens, batch, room {"model|codec": bytes}}.

const LONGEST = 2 ** 30;   // where kvlib's max_context stops looking, too

// Bytes of the cache of `batch` sequences of `tokens` tokens.
function cacheBytes(parts, tokens, batch) {
  const one = parts.reduce((sum, [perGroup, fixed, most, group]) => {
    const groups = Math.ceil(tokens / group);
    return sum + fixed + perGroup * (most ? Math.min(groups, most) : groups);
  }, 0);
  return one * batch;
}

const maxBatch = (parts, tokens, room) => Math.max(0, Math.floor(room / cacheBytes(parts, tokens, 1)));

function maxContext(parts, batch, room) {
  if (cacheBytes(parts, 1, batch) > room) return 0;
  let [fitting, tooLong] = [1, LONGEST + 1];
  while (tooLong - fitting > 1) {
    const middle = Math.floor((fitting + tooLong) / 2);
    if (cacheBytes(parts, middle, batch) <= room) fitting = middle; else tooLong = middle;
  }
  return fitting;
}

function explore(kit, data) {
  const { element, svg } = kit;
  const names = data.models.map(({ name }) => [name, name]);
  kit.select("model", "Model", names, data.start.model);
  kit.select("weights", "Weights in", [["2", "16 bits"], ["1", "8 bits"], ["0.5", "4 bits"]]);
  kit.select("codec", "Cache in", data.codecs);
  kit.select("card", "Card", data.cards.map(([name, gb]) => [name, `${name}, ${gb} GB`]), data.start.card);
  kit.select("count", "Cards", [1, 2, 4, 8].map((n) => [String(n), String(n)]));
  kit.range("share", "Usable", { min: 50, max: 100, value: data.start.share, show: (percent) => `${percent} %` });
  const setContext = kit.range("context", "Context",
    { max: data.contexts.length - 1, value: data.start.context, show: (i) => `${number(data.contexts[i])} tokens` });
  const setBatch = kit.range("batch", "Batch",
    { max: data.batches.length - 1, value: data.start.batch, show: (i) => `${number(data.batches[i])} sequence${i ? "s" : ""}` });

  const [barTop, barHigh, row, gridTop] = [28, 38, 17, 128];
  const gridEnd = gridTop + row * data.batches.length;
  let width, left, column, every;   // on a phone the columns are narrow, and only every third has its label
  const picture = kit.drawing(660, gridEnd + 58, "Weights, cache and what is left on the card; below, which contexts and batches fit");
  function measure() {
    const narrow = kit.root.clientWidth > 0 && kit.root.clientWidth < 480;
    [width, left, every] = narrow ? [330, 40, 3] : [660, 62, 1];
    column = (width - left - 4) / data.contexts.length;
    picture.setAttribute("viewBox", `0 0 ${width} ${gridEnd + 58}`);
    return narrow;
  }
  const bar = svg("g"), grid = svg("g");
  picture.append(bar, grid);
  const sample = (colour, text) => element("span", {}, element("i", { style: `background: var(--kv-${colour})` }), text);
  kit.readout.before(element("div", { class: "kv-key" }, sample("muted", "weights"), sample("k", "keys"), sample("v", "values"),
    sample("accent", "latent (K and V in one)"), sample("r0", "fits")));

  const gb = (bytes) => `${number(bytes / 1e9, bytes < 1e9 ? 3 : bytes < 1e11 ? 2 : 0)} GB`;
  const rect = (x, y, w, h, colour, extra = {}) => svg("rect", { x, y, width: Math.max(0, w), height: h, style: `fill: ${colour}`, ...extra });
  const write = (x, y, text, extra = {}) => svg("text", { x, y, ...extra }, text);

  function drawBar({ memory, usable, weights, cache, latent }) {
    const scale = (width - 4) / Math.min(Math.max(memory, weights + cache) * 1.02, 2.2 * memory);
    const at = (bytes) => Math.min(bytes * scale, width - 2);
    const end = at(weights + cache), from = at(weights), wide = Math.max(end - from, cache ? 1 : 0);
    const nodes = [
      rect(0, barTop, at(memory), barHigh, "var(--kv-faint)"),
      rect(0, barTop, from, barHigh, "var(--kv-muted)"),
      ...(latent ? [rect(from, barTop, wide, barHigh, "var(--kv-accent)")]
        : [rect(from, barTop, wide, barHigh / 2, "var(--kv-k)"), rect(from, barTop + barHigh / 2, wide, barHigh / 2, "var(--kv-v)")]),
      svg("line", { x1: at(memory), x2: at(memory), y1: barTop - 6, y2: barTop + barHigh + 6, stroke: "var(--kv-ink)", "stroke-width": 2 }),
      svg("line", { x1: at(usable), x2: at(usable), y1: barTop - 6, y2: barTop + barHigh + 6, stroke: "var(--kv-ink)", "stroke-dasharray": "3 3" }),
      write(Math.min(at(memory), width - 4), barTop - 10, `${number(memory / 1e9)} GB`, { "text-anchor": at(memory) > 60 ? "end" : "start" }),
      write(0, barTop - 10, "weights | cache | left", { class: "muted" }),
      write(0, barTop + barHigh + 18, `weights ${gb(weights)} · cache ${gb(cache)} · ` +
        (weights + cache <= usable ? `left ${gb(usable - weights - cache)}` : `${gb(weights + cache - usable)} too much`)),
    ];
    if ((weights + cache) * scale > width) nodes.push(write(width - 6, barTop + barHigh / 2 + 4, "→", { "text-anchor": "end" }));
    return nodes;
  }

  function drawGrid({ parts, room, made, context, batch }) {
    const nodes = [write(0, gridTop - 12, "sequences", { class: "muted" })];
    data.batches.forEach((size, b) => {
      const y = gridEnd - (b + 1) * row;
      nodes.push(write(left - 8, y + 13, number(size), { "text-anchor": "end", class: "muted" }));
      data.contexts.forEach((tokens, c) => {
        const fits = cacheBytes(parts, tokens, size) <= room;
        const cell = rect(left + c * column, y, column - 2, row - 2, fits ? "var(--kv-r0)" : "var(--kv-faint)",
          { opacity: fits && made && tokens > made ? 0.45 : 1 });
        cell.addEventListener("click", () => { setContext(c); setBatch(b); });
        nodes.push(cell);
      });
    });
    data.contexts.forEach((tokens, c) => c % every || nodes.push(
      write(left + (c + 0.5) * column - 1, gridEnd + 15, number(tokens), { "text-anchor": "middle", class: "muted" })));
    nodes.push(write(left + 5 * column, gridEnd + 34, "tokens in each sequence", { "text-anchor": "middle", class: "muted" }),
      write(left + 5 * column, gridEnd + 50, "(pale: longer than the model was made for)", { "text-anchor": "middle", class: "muted" }),
      svg("rect", { x: left + context * column - 2, y: gridEnd - (batch + 1) * row - 2, width: column + 2, height: row + 2, rx: 2,
        style: "fill: none; stroke: var(--kv-ink); stroke-width: 2.5" }));
    return nodes;
  }

  // Does this agree with what kvlib computed in the notebook?
  function check(key, parts, state, tokens) {
    const bytes = data.expected[key][state.context];
    let agrees = bytes === cacheBytes(parts, tokens, 1);
    const { fitsAt } = data;
    if (data.fits[key]) {
      const [batch, context] = data.fits[key];
      agrees &&= batch === maxBatch(parts, fitsAt.tokens, fitsAt.room[key]) && context === maxContext(parts, fitsAt.batch, fitsAt.room[key]);
    }
    return agrees;
  }

  function draw(state) {
    measure();
    const model = data.models.find(({ name }) => name === state.model);
    const key = `${state.model}|${state.codec}`, parts = data.parts[key];
    const tokens = data.contexts[state.context], size = data.batches[state.batch];
    const memory = data.cards.find(([name]) => name === state.card)[1] * 1e9 * Number(state.count);
    const usable = memory * state.share / 100, weights = Math.ceil(model.weights * Number(state.weights));
    const room = usable - weights, cache = cacheBytes(parts, tokens, size);
    bar.replaceChildren(...drawBar({ memory, usable, weights, cache, latent: model.latent }));
    grid.replaceChildren(...drawGrid({ parts, room, made: model.made, context: state.context, batch: state.batch }));

    const agrees = check(key, parts, state, tokens);
    kit.root.dataset.agrees = agrees;
    const b = (text) => element("b", {}, text);
    const each = cacheBytes(parts, tokens, 1) / tokens;
    const lines = [b(`${number(each, each < 1000 ? 1 : 0)} bytes`), ` for a token at this context, ${gb(cache)} for all: `,
      b(`${number(cache / weights, cache < weights ? 2 : 1)} times the weights`), ". "];
    if (room <= 0) {
      lines.push(b("The weights alone do not fit"), `: ${gb(weights)} against ${gb(usable)}. `);
    } else {
      const most = maxBatch(parts, tokens, room), longest = maxContext(parts, size, room);
      const words = longest >= LONGEST ? "any length: every layer has a window" : `${number(longest)} tokens each`;
      lines.push("At this context ", b(`${number(most)} sequence${most === 1 ? "" : "s"}`),
        most === 1 ? " fits; at this batch " : " fit; at this batch ", b(words),
        model.made && longest > model.made ? ` (the model was made for ${number(model.made)}). ` : ". ");
    }
    lines.push(agrees ? "kvlib counts the same." : "KVLIB COUNTS DIFFERENTLY.");
    kit.readout.replaceChildren(...lines);
  }
  kit.start(draw);
  let narrow = measure();
  new ResizeObserver(() => { if (narrow !== measure()) { narrow = !narrow; draw(kit.state); } }).observe(kit.root);
}
