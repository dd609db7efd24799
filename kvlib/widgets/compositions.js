// Every composition of block size, codec and policy: what a real model's cache takes, and what it costs a real small one.
// data: blocks, policies [[name, label]], codecs [name], limits, counts;
//       parts {"limit|count": [[codes, exact tail, scales, unused, tables] in 0.1 MB, one for each composition]},
//       bits, recall [what each composition loses], expected {"limit|count|measure": [compositions that no other beats]},
//       start {block, codec, policy}. Compositions are numbered blocks first, then codecs, then policies.

const KINDS = [["codes", "r1"], ["exact tail", "r4"], ["scales", "r3"], ["unused", "line"], ["tables", "muted"]];
const GAP = 0.02;      // the axis of bits is cut here: above it lies int2 alone, far away
const squash = (bits) => (bits < GAP ? bits : GAP + 0.0008 + (bits - 0.6) * 0.02);

// The indices of compositions that no other beats in bytes and in loss; of equals the first.
function frontier(sizes, losses) {
  return sizes.flatMap((size, i) => {
    const beaten = sizes.some((other, j) => other <= size && losses[j] <= losses[i]
      && (other !== size || losses[j] !== losses[i] || j < i));
    return beaten ? [] : [i];
  });
}

function explore(kit, data) {
  const { element, svg } = kit;
  const names = data.blocks.flatMap(([block]) => data.codecs.flatMap((codec) => data.policies.map(([policy]) => [block, codec, policy])));
  const label = (pairs, name) => pairs.find(([key]) => key === name)[1];
  kit.select("block", "Blocks", data.blocks, data.start.block);
  kit.select("codec", "Codec", data.codecs.map((name) => [name, name]), data.start.codec);
  kit.select("policy", "Eviction", data.policies, data.start.policy);
  kit.range("limit", "Limit", { max: data.limits.length - 1, value: 1, show: (i) => `${number(data.limits[i])} tokens` });
  kit.range("count", "Conversations", { max: data.counts.length - 1, value: data.counts.length - 1, show: (i) => number(data.counts[i]) });
  kit.select("measure", "Cost in", [["bits", "bits per byte"], ["recall", "recall lost"]]);
  const selects = [...kit.root.querySelectorAll("select")];

  const [width, height] = [660, 400];
  const picture = kit.drawing(width, height, "Memory of the chosen composition as a stacked bar; below, all compositions by memory and cost");
  picture.style.minWidth = "37rem";
  const bar = svg("g"), plot = svg("g");
  picture.append(bar, plot);
  kit.readout.before(element("div", { class: "kv-key" },
    ...KINDS.map(([name, colour]) => element("span", {}, element("i", { style: `background: var(--kv-${colour})` }), name)),
    element("span", {}, element("i", { style: "background: var(--kv-r0); border-radius: 50%" }), "contiguous"),
    element("span", {}, element("i", { style: "background: var(--kv-accent); border-radius: 50%" }), "blocks of 32"),
    element("span", {}, element("i", { style: "background: var(--kv-r6); border-radius: 50%" }), "blocks of 256")));

  const gb = (units) => (units >= 1e5 ? `${number(units / 1e4, 0)} GB` : units >= 1e3 ? `${number(units / 1e4, 2)} GB` : `${number(units / 10, 1)} MB`);
  const sum = (parts) => parts.reduce((a, b) => a + b, 0);

  // Above, the whole against contiguous float16; below, its parts, stretched to the full width.
  function drawBar(parts, whole, chosen) {
    const total = sum(parts), wide = width - 4, share = Math.min(1, total / whole) * wide;
    const nodes = [
      svg("text", { x: 0, y: 12, class: "muted" }, chosen),
      svg("text", { x: wide, y: 12, "text-anchor": "end", class: "muted" }, `of contiguous float16, ${gb(whole)}`),
      svg("rect", { x: 0, y: 18, width: wide, height: 9, style: "fill: var(--kv-faint)" }),
      svg("rect", { x: 0, y: 18, width: share, height: 9, style: "fill: var(--kv-ink)" }),
      svg("path", { d: `M0 28L0 40L${wide} 40L${share.toFixed(1)} 28Z`, style: "fill: var(--kv-faint)" })];
    let x = 0;
    parts.forEach((size, i) => {
      const long = (size / total) * wide;
      nodes.push(svg("rect", { x, y: 40, width: Math.max(0, long), height: 22, style: `fill: var(--kv-${KINDS[i][1]})` }));
      x += long;
    });
    return nodes;
  }

  function drawPlot(sizes, losses, best, chosen, measure) {
    const group = svg("g");
    const shown = losses.map((loss) => (measure === "bits" ? squash(loss) : loss));
    const all = { from: Math.min(...sizes) / 1.25, to: Math.max(...sizes) * 1.25, log: true, label: "memory (logarithmic)", show: gb };
    all.ticks = Array.from({ length: 7 }, (_, i) => 10 ** (i + 1)).flatMap((p) => [p, 2 * p, 5 * p]).filter((t) => t >= all.from && t <= all.to);
    const y = measure === "bits"
      ? { from: -0.001, to: 0.0232, ticks: [0, 0.005, 0.01, 0.015, squash(0.66)], show: (v) => (v === 0 ? "none" : v > GAP ? "0.66" : v.toFixed(3)), label: "bits per byte more, on tinylm (less is better)" }
      : { from: -4, to: 96, ticks: [0, 20, 40, 60, 80], show: (v) => `${v} %`, label: "recall lost, on tinylm (less is better)" };
    const at = axes(group, { left: 48, top: 104, width: width - 62, height: height - 154 }, all, y);
    const order = [...best].sort((a, b) => sizes[a] - sizes[b]);
    const stairs = order.flatMap((i, n) => [...(n ? [[at.x(sizes[i]), at.y(shown[order[n - 1]])]] : []), [at.x(sizes[i]), at.y(shown[i])]]);
    at.layer.append(svg("path", { d: path(stairs), fill: "none", style: "stroke: var(--kv-ink)", "stroke-width": 1.4 }));
    if (measure === "bits") at.layer.append(svg("line", { x1: 48, x2: width - 14, y1: at.y(GAP), y2: at.y(GAP), style: "stroke: var(--kv-muted)", "stroke-dasharray": "4 4" }));
    const behind = sizes.map((_, i) => i).sort((a, b) => best.includes(a) - best.includes(b));   // the frontier in front
    behind.forEach((i) => {
      const colour = { 0: "r0", 32: "accent", 256: "r6" }[names[i][0]];
      const on = best.includes(i);
      const dot = svg("circle", { cx: at.x(sizes[i]), cy: at.y(shown[i]), r: on ? 5 : 3, style: `fill: var(--kv-${on ? colour : "paper"}); stroke: var(--kv-${colour}); cursor: pointer`, "stroke-width": 1.5 });
      dot.append(svg("title", {}, describe(i)));
      dot.addEventListener("click", () => choose(i));
      at.layer.append(dot);
    });
    at.layer.append(svg("circle", { cx: at.x(sizes[chosen]), cy: at.y(shown[chosen]), r: 9, fill: "none", style: "stroke: var(--kv-ink)", "stroke-width": 2.4 }));
    return group;
  }

  const describe = (i) => `${label(data.blocks, names[i][0])}, ${names[i][1]}, ${label(data.policies, names[i][2])}`;
  function choose(i) {
    const [block, codec, policy] = names[i];
    [block, codec, policy].forEach((value, which) => { selects[which].value = value; });
    kit.update({ block, codec, policy });
  }

  kit.start((state) => {
    const key = `${data.limits[state.limit]}|${data.counts[state.count]}`;
    const parts = data.parts[key], sizes = parts.map(sum), losses = data[state.measure];
    const chosen = names.findIndex(([block, codec, policy]) => block === state.block && codec === state.codec && policy === state.policy);
    const best = frontier(sizes, losses);
    bar.replaceChildren(...drawBar(parts[chosen], sizes[0], describe(chosen)));
    plot.replaceChildren(drawPlot(sizes, losses, best, chosen, state.measure));

    const agrees = JSON.stringify(best) === JSON.stringify(data.expected[`${key}|${state.measure}`]);
    kit.root.dataset.agrees = agrees;
    const b = (text) => element("b", {}, text);
    const tail = parts[chosen][1] / sizes[chosen], unused = parts[chosen][3] / sizes[chosen];
    const better = sizes.map((_, i) => i).filter((i) => sizes[i] <= sizes[chosen] && losses[i] <= losses[chosen] && (sizes[i] < sizes[chosen] || losses[i] < losses[chosen]));
    const lines = [b(gb(sizes[chosen])), `, ${number(sizes[0] / sizes[chosen], 1)} times smaller than contiguous float16; `,
      `${number(100 * tail)} % of it exact tail, ${number(100 * unused)} % unused. It costs `,
      b(`${number(data.bits[chosen], 3)} bits per byte`), " and ", b(`${number(data.recall[chosen], 0)} point${data.recall[chosen] === 1 ? "" : "s"} of recall`), ". "];
    if (best.includes(chosen)) lines.push(b("On the frontier"), ": no other is smaller and as good. ");
    else if (better.length) {
      const pick = better.reduce((a, c) => (sizes[c] < sizes[a] ? c : a));
      lines.push(`${better.length} ${better.length === 1 ? "is" : "are"} at least as small and as good, the smallest `, b(describe(pick)), `, ${gb(sizes[pick])}. `);
    } else lines.push("Another one is exactly as large and as good. ");
    lines.push(agrees ? "Python finds the same frontier." : "PYTHON FINDS ANOTHER FRONTIER.");
    kit.readout.replaceChildren(...lines);
  });
}
