// Token by token: which rows of K and V each step of generation computes, and which it remembers.
// data: { tokens, prompt, layers, perRow, perPair, perStep, change[layer][edited][row], edits }

function explore(kit, data) {
  const { tokens, prompt } = data;
  const steps = tokens.length - prompt;         // step s feeds the first prompt + s - 1 tokens and yields the next
  const known = (step) => prompt + step - 1;    // tokens whose rows exist after that step
  const cost = (rows, context) => rows * data.perRow + rows * context * data.perPair + data.perStep;
  const totals = { without: [0], with: [0] };   // multiply-adds up to and including each step
  for (let s = 1; s <= steps; s++) {
    totals.without.push(totals.without[s - 1] + cost(known(s), known(s)));
    totals.with.push(totals.with[s - 1] + cost(s === 1 ? prompt : 1, known(s)));
  }

  const short = (x) => (x >= 1e9 ? `${(x / 1e9).toFixed(2)} billion` : `${(x / 1e6).toFixed(1)} million`);
  const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

  const setStep = kit.range("step", "Step", { min: 1, max: steps, show: (s) => `${s} of ${steps}` });
  const back = kit.button("Back", () => setStep(kit.state.step - 1), "One step back");
  const next = kit.button("Next token", () => setStep(kit.state.step + 1), "Generate the next token");
  kit.select("cache", "The model", [["without", "recomputes (no cache)"], ["with", "remembers (cache)"]]);
  kit.range("edit", "Change the byte at", { max: tokens.length - 2, value: 6, show: (j) => `${j}: ${tokens[j]} → ${data.edits[j]}` });
  kit.select("layer", "Look at the keys of", data.change.map((_, l) => [l, `layer ${l + 1}`]), 1);

  const width = 660, left = 62, column = (width - left - 4) / tokens.length, row = 13;
  const top = 26, gridEnd = top + steps * row, strip = gridEnd + 86, bars = strip + 34;
  const picture = kit.drawing(width, bars + 62, "One row per step, one column per token: rows computed and rows remembered");
  picture.style.minWidth = "37rem";              // on a phone it scrolls: squeezed, its letters could not be read
  const sample = (colour, text) => kit.element("span", {}, kit.element("i", { style: `background: var(--kv-${colour})` }), text);
  kit.readout.before(kit.element("div", { class: "kv-key" },
    sample("k", "row of K computed"), sample("v", "row of V computed"), sample("line", "both remembered")));
  const fill = (x, y, w, h, colour, opacity = 1) => svg("rect", { x, y, width: w, height: h, style: `fill: ${colour}`, opacity });
  const write = (x, y, text, extra = {}) => svg("text", { x, y, ...extra }, text);
  const x = (i) => left + i * column;

  function cell(i, y, computed, opacity) {
    const w = column - 2, h = row - 2;
    if (computed) return [fill(x(i), y, w, h / 2, "var(--kv-k)", opacity), fill(x(i), y + h / 2, w, h / 2, "var(--kv-v)", opacity)];
    return [svg("rect", { x: x(i) + 0.5, y: y + 0.5, width: w - 1, height: h - 1, opacity, style: "fill: var(--kv-faint); stroke: var(--kv-line)" })];
  }

  function drawGrid({ step, cache }) {
    const parts = [];
    tokens.forEach((token, i) => {
      const shown = i <= known(step);
      const generated = i >= prompt ? "fill: var(--kv-q); " : "";
      if (shown) parts.push(write(x(i) + column / 2 - 1, 16, token, { "text-anchor": "middle", style: `${generated}font: 12px ui-monospace, monospace` }));
    });
    for (let s = step + 1; s <= steps; s++) {  // what is still to come: its outline
      parts.push(svg("rect", { x: x(0), y: top + (s - 1) * row, width: known(s) * column - 2, height: row - 2, style: "fill: none; stroke: var(--kv-line)", opacity: 0.45 }));
    }
    for (let s = 1; s <= step; s++) {
      const y = top + (s - 1) * row, fed = known(s), opacity = s === step ? 1 : 0.4;
      for (let i = 0; i < fed; i++) parts.push(...cell(i, y, cache === "without" || s === 1 || i === fed - 1, opacity));
      parts.push(write(x(fed) + column / 2 - 1, y + 10, tokens[fed], { "text-anchor": "middle", opacity: s === step ? 1 : 0.6, style: "fill: var(--kv-q); font: 11px ui-monospace, monospace" }));
    }
    parts.push(write(0, top + (step - 1) * row + 10, `step ${step}`, { style: "font-weight: 600" }));
    return parts;
  }

  // How far each stored key moves when one byte of the text is another one, in percent of its length.
  function drawStrip({ step, edit, layer }) {
    const height = 44, fed = known(step), moved = data.change[layer][edit];
    const parts = [write(0, gridEnd + 24, `If byte ${edit} were ${data.edits[edit]}: how far each key of layer ${Number(layer) + 1} moves`, { class: "muted" }),
      svg("line", { x1: left, x2: width, y1: strip, y2: strip, style: "stroke: var(--kv-line)" }),
      write(0, strip, "0 %", { class: "muted" }), write(0, strip - height + 8, "100 %", { class: "muted" })];
    if (edit < fed) parts.push(fill(x(edit) - 1, strip - height - 2, column, height + 4, "var(--kv-faint)"));
    for (let i = 0; i < fed; i++) {
      const h = Math.min(moved[i], 100) / 100 * height;
      if (edit < fed && h > 0) parts.push(fill(x(i), strip - h, column - 2, h, "var(--kv-k)"));
    }
    return parts;
  }

  function drawTotals({ step, cache }) {
    const most = totals.without[steps], scale = (width - left - 210) / most;
    return ["without", "with"].flatMap((kind, index) => {
      const y = bars + index * 26, total = totals[kind][step], chosen = kind === cache;
      return [write(0, y + 13, kind === "with" ? "cache" : "no cache", { style: chosen ? "font-weight: 600" : "", class: chosen ? "" : "muted" }),
        fill(left, y, Math.max(1, total * scale), 17, "var(--kv-accent)", chosen ? 1 : 0.45),
        write(left + total * scale + 6, y + 13, `${short(total)} multiply-adds`, { class: chosen ? "" : "muted" })];
    });
  }

  function describe({ step, cache, edit, layer }) {
    const fed = known(step), computed = cache === "without" || step === 1 ? fed : 1;
    const remembered = fed - computed;
    let text = `Step ${step}: in each layer ${plural(computed, "row")} of K and V computed, ${remembered} remembered. `;
    text += `So far ${(totals.without[step] / totals.with[step]).toFixed(1)} times fewer multiply-adds with a cache. `;
    if (edit >= fed) return `${text}Byte ${edit} is not in the text yet: no stored key of layer ${Number(layer) + 1} depends on it.`;
    const stale = data.change[layer][edit].slice(0, fed).filter((c) => c > 0).length;
    return `${text}Change byte ${edit}, and ${plural(stale, "stored key")} of layer ${Number(layer) + 1} would be wrong; ${number(fed - stale)} would still be right.`;
  }

  kit.start((state) => {
    back.disabled = state.step === 1;
    next.disabled = state.step === steps;
    picture.replaceChildren(...drawGrid(state), ...drawStrip(state), ...drawTotals(state));
    kit.readout.textContent = describe(state);
  });
}
