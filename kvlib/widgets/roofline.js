// A step of a model on the roof of a device: the products with weights and attention as two points, and the least time.
// data: models {name: {parameters, heads, kvHeads, width, layers, bits {codec: bits per number}}}, devices {name: {bandwidth, peak, memory}},
//       contexts, batches, news (choices), expected {"model|batch|context|new|codec": [intensity, intensity, ms on an H200]}.

function explore(kit, data) {
  const { svg } = kit;
  const list = (object) => Object.keys(object).map((name) => [name, name]);
  kit.select("device", "Device", list(data.devices), "H200");
  kit.select("model", "Model", list(data.models));
  kit.select("codec", "Cache in", list(Object.values(data.models)[0].bits));
  kit.select("share", "Heads", [["own", "as in the model"], ["mha", "one key to each query head"], ["mqa", "one key to all"]]);
  const choice = (name, label, values, start) =>
    kit.range(name, label, { min: 0, max: values.length - 1, value: values.indexOf(start), show: (i) => number(values[i]) });
  choice("batch", "Batch", data.batches, 16);
  choice("context", "Context", data.contexts, 8192);
  choice("fresh", "New tokens", data.news, 1);

  const picture = kit.drawing(660, 400, "A roofline with two points, and a bar of the time that each takes");
  const layer = svg("g");
  picture.append(layer);

  // Pairs of a query and a key that it sees: the last `fresh` of `context` positions.
  const pairs = (fresh, context) => fresh * (context - fresh + 1) + (fresh * (fresh - 1)) / 2;

  function work(model, { batch, context, fresh, codec, share }) {
    const kvHeads = share === "mha" ? model.heads : share === "mqa" ? 1 : model.kvHeads;
    const lanes = batch * model.layers;
    const row = (2 * kvHeads * model.width * model.bits[codec]) / 8;  // K and V of one token, in bytes
    const linear = { flops: 2 * model.parameters * batch * fresh, bytes: 2 * model.parameters };
    const attention = {
      flops: lanes * model.heads * pairs(fresh, context) * 4 * model.width,
      bytes: lanes * ((context + fresh) * row + model.heads * fresh * 4 * model.width),
    };
    return { linear, attention, cache: lanes * context * row };
  }

  kit.start((state) => {
    const device = data.devices[state.device], model = data.models[state.model];
    const batch = data.batches[state.batch], context = data.contexts[state.context];
    const fresh = Math.min(data.news[state.fresh], context);
    const { linear, attention, cache } = work(model, { ...state, batch, context, fresh });
    const least = ({ flops, bytes }) => Math.max(flops / device.peak, bytes / device.bandwidth);
    const ridge = device.peak / device.bandwidth;

    const parts = [];
    const holder = svg("g");
    const power = (value) => (value >= 1 ? number(value) : String(value));
    const scale = axes(holder, { left: 62, top: 26, width: 580, height: 240 },
      { from: 0.3, to: 3e4, log: true, ticks: [1, 10, 100, 1000, 10000], show: power, label: "FLOP per byte of memory" },
      { from: 2e11, to: 6e15, log: true, ticks: [1e12, 1e13, 1e14, 1e15], show: (v) => `${number(v / 1e12)} T`, label: "FLOP a second, at most" });
    const roof = (x) => Math.min(device.peak, x * device.bandwidth);
    scale.layer.append(
      svg("path", { d: path([0.3, ridge, 3e4].map((x) => [scale.x(x), scale.y(roof(x))])), fill: "none", stroke: "var(--kv-ink)", "stroke-width": 1.6 }),
      svg("line", { x1: scale.x(ridge), x2: scale.x(ridge), y1: scale.y(roof(ridge)), y2: scale.y(2e11), stroke: "var(--kv-line)", "stroke-dasharray": "3 3" }),
      svg("text", { x: scale.x(ridge) + 5, y: scale.y(2.6e11), class: "muted" }, `ridge ${ridge.toFixed(0)}`));
    const points = [["weights", linear, "var(--kv-amber)", 16], ["attention", attention, "var(--kv-r1)", -9]];
    for (const [name, { flops, bytes }, colour, dy] of points) {
      const x = Math.min(3e4, Math.max(0.3, flops / bytes));
      const right = scale.x(x) > 520;
      scale.layer.append(
        svg("circle", { cx: scale.x(x), cy: scale.y(roof(x)), r: 6, fill: colour, stroke: "var(--kv-paper)" }),
        svg("text", { x: scale.x(x) + (right ? -10 : 10), y: scale.y(roof(x)) + dy, "text-anchor": right ? "end" : "start" }, `${name}: ${number(flops / bytes, flops / bytes < 100 ? 1 : 0)}`));
    }
    parts.push(holder);

    const times = points.map(([, part]) => 1e3 * least(part)), total = times[0] + times[1];
    let left = 62;
    points.forEach(([name, , colour], i) => {
      const wide = (580 * times[i]) / total;
      parts.push(svg("rect", { x: left, y: 330, width: Math.max(0.5, wide), height: 22, fill: colour }));
      left += wide;
    });
    parts.push(
      svg("text", { x: 62, y: 322, class: "muted" }, "where the time goes: weights, attention"),
      svg("text", { x: 62, y: 372 }, `${times[0].toPrecision(3)} ms weights`),
      svg("text", { x: 642, y: 372, "text-anchor": "end" }, `${times[1].toPrecision(3)} ms attention`));
    layer.replaceChildren(...parts);

    const bound = ({ flops, bytes }) => (flops / bytes < ridge ? "memory" : "arithmetic");
    const room = 2 * model.parameters + cache;
    const fits = room <= device.memory ? "" : ` Weights and cache are ${number(room / 1e9)} GB, more than the ${number(device.memory / 1e9)} GB of one ${state.device}.`;
    const known = data.expected[`${state.model}|${batch}|${context}|${fresh}|${state.codec}`];
    const near = (a, b) => Math.abs(a / b - 1) < 0.01;
    const agree = known && state.share === "own" && near(known[0], linear.flops / linear.bytes) && near(known[1], attention.flops / attention.bytes)
      && (state.device !== "H200" || near(known[2], total));
    const limited = fresh < data.news[state.fresh] ? ` (the whole context of ${number(context)})` : "";
    kit.readout.textContent = `${number(batch)} × ${number(fresh)} new tokens${limited} at ${number(context)}: at least ${total.toPrecision(3)} ms, ${number((1e3 * batch * fresh) / total)} tokens a second. `
      + `The weights' product waits for ${bound(linear)}, attention for ${bound(attention)}.${fits}${known && state.share === "own" ? (agree ? " kvlib counts the same." : " kvlib counts something else!") : ""}`;
  });
}
