// A long prompt arrives among sequences that decode: chunk size against memory, time to first token and the longest gap.
// data: device {peak, bandwidth}, model {parameters, heads, kvHeads, width, layers}, prompts, crowds, chunks (choices), tile (keys),
//       start {prompt, crowd, chunk}, expected {"prompt|crowd|chunk": [tokens that the crowd holds, first token, longest gap (ms)]}, as
//       kvlib's engine simulates them. The script computes every step for itself, from the same roofline.

function explore(kit, data) {
  const { svg } = kit;
  const { device, model } = data;
  const choice = (name, label, values, start) =>
    kit.range(name, label, { min: 0, max: values.length - 1, value: values.indexOf(start), show: (i) => number(values[i]) });
  choice("chunk", "Tokens of a chunk", data.chunks, data.start.chunk);
  choice("prompt", "Tokens of the prompt", data.prompts, data.start.prompt);
  choice("crowd", "Sequences that decode", data.crowds, data.start.crowd);
  const picture = kit.drawing(660, 430, "Memory, first token and longest gap by the size of a chunk, and the steps of the prefill");
  const layer = svg("g");
  picture.append(layer);

  // Milliseconds of a step: the longer of computing and reading, for the weights, the chunk's attention and the decodes'.
  const least = (flops, bytes) => 1e3 * Math.max(flops / device.peak, bytes / device.bandwidth);
  const row = 4 * model.kvHeads * model.width * model.layers;  // K and V of a token, two bytes each
  const query = 4 * model.heads * model.width * model.layers;  // a query and its output, two bytes each
  const pair = 4 * model.heads * model.width * model.layers;   // operations for a query and a key
  function milliseconds(size, end, crowd, held) {
    const seen = size * (end - size + 1) + (size * (size - 1)) / 2;
    const each = held / crowd;
    return least(2 * model.parameters * (size + crowd), 2 * model.parameters)
      + least(pair * seen, (end + size) * row + size * query)
      + least(pair * held, crowd * ((each + 1) * row + query));
  }

  function steps(prompt, crowd, chunk, held) {
    const times = [];
    for (let start = 0; start < prompt; start += chunk) {
      const end = Math.min(start + chunk, prompt);
      times.push(milliseconds(end - start, end, crowd, held + times.length * crowd));
    }
    return times;
  }

  const scores = (chunk, keys) => model.heads * chunk * keys * 4;  // float32, one layer
  const bytes = (value) => (value >= 1e9 ? `${number(value / 1e9, 1)} GB` : `${number(value / 1e6, value < 1e7 ? 1 : 0)} MB`);
  const span = (ms) => (ms >= 1000 ? `${number(ms / 1000, 2)} s` : `${number(ms, ms < 100 ? 1 : 0)} ms`);

  const tick = (ms) => (ms >= 1000 ? `${ms / 1000} s` : `${ms} ms`);

  kit.start((state) => {
    const prompt = data.prompts[state.prompt], crowd = data.crowds[state.crowd];
    const chunk = Math.min(data.chunks[state.chunk], prompt);
    const expectedOf = (size) => data.expected[`${prompt}|${crowd}|${size}`];
    const known = data.chunks.filter((size) => size <= prompt);
    const rows = known.map((size) => {
      const times = steps(prompt, crowd, size, expectedOf(size)[0]);
      return { size, times, first: times.reduce((a, b) => a + b, 0), gap: Math.max(...times) };
    });
    const agrees = rows.every(({ size, first, gap }) => {
      const [, wanted, wait] = expectedOf(size);
      return Math.abs(first / wanted - 1) < 0.002 && Math.abs(gap / wait - 1) < 0.002;
    });
    kit.root.dataset.agrees = agrees;
    const here = rows.find(({ size }) => size === chunk);
    const parts = [];

    const few = [64, 1024, 16384];
    const show = (value) => (value >= 1024 ? `${value / 1024}K` : String(value));
    const panel = (left, label, from, to, ticks, name, curves) => {
      const group = svg("g");
      const scale = axes(group, { left, top: 34, width: 150, height: 190 },
        { from: 64, to: 65536, log: true, ticks: few, show, label: "tokens of a chunk" },
        { from, to, log: true, ticks, show: name, label });
      for (const [value, colour, text] of curves) {
        const points = rows.map((one) => [scale.x(one.size), scale.y(value(one))]);
        scale.layer.append(
          svg("path", { d: path(points), fill: "none", stroke: colour, "stroke-width": 2 }),
          svg("circle", { cx: scale.x(chunk), cy: scale.y(value(here)), r: 5.5, fill: colour, stroke: "var(--kv-paper)", "stroke-width": 1.5 }));
        if (text) scale.layer.append(svg("text", { x: points[0][0] + 4, y: points[0][1] + 18, style: `fill: ${colour}` }, text));
      }
      parts.push(group);
    };
    panel(52, "scores of a layer", 2e5, 1e12, [1e6, 1e9, 1e12], (v) => (v >= 1e12 ? "1 TB" : bytes(v).replace(".0", "")),
      [[({ size }) => scores(size, prompt), "var(--kv-r1)", "one shot"], [({ size }) => scores(size, data.tile), "var(--kv-amber)", "tiles"]]);
    panel(272, "first token", 50, 12000, [100, 1000, 10000], tick, [[({ first }) => first, "var(--kv-accent)", ""]]);
    panel(492, "longest gap", 3, 4000, [10, 100, 1000], tick, [[({ gap }) => gap, "var(--kv-r0)", ""]]);

    // The steps of the prefill, one after the other, as wide as they take; between two of them everybody gets a token.
    const left = 52, wide = 590, top = 320, high = 40;
    let x = left;
    here.times.forEach((ms, i) => {
      const width = (wide * ms) / here.first;
      const gap = width > 3 ? 1 : 0;
      parts.push(svg("rect", { x, y: top, width: Math.max(0.3, width - gap), height: high,
        fill: ms === here.gap ? "var(--kv-r0)" : i % 2 ? "var(--kv-line)" : "var(--kv-faint)" }));
      x += width;
    });
    const steady = here.times.length === 1 ? "1 step" : `${number(here.times.length)} steps`;
    parts.push(
      svg("text", { x: left, y: top - 10, class: "muted" }, `the newcomer's prefill: ${steady}, each as wide as it takes; the longest in colour`),
      svg("text", { x: left, y: top + high + 18, class: "muted" }, "0"),
      svg("text", { x: left + wide, y: top + high + 18, "text-anchor": "end", class: "muted" }, span(here.first)),
      svg("text", { x: left, y: top + high + 44 }, `first step ${span(here.times[0])}`),
      svg("text", { x: left + wide, y: top + high + 44, "text-anchor": "end" }, `last step ${span(here.times.at(-1))}`));
    layer.replaceChildren(...parts);

    const asked = data.chunks[state.chunk];
    const cut = asked < prompt ? `Chunks of ${number(asked)}` : `Chunks of ${number(asked)}, so the whole prompt in one step`;
    kit.readout.textContent = `${cut}: scores of one layer ${bytes(scores(chunk, prompt))} in one shot, ${bytes(scores(chunk, Math.min(data.tile, prompt)))} in tiles. `
      + `First token after ${span(here.first)}; nobody who decodes waits longer than ${span(here.gap)}, and each gets ${number(here.times.length)} ${here.times.length === 1 ? "token" : "tokens"} meanwhile. `
      + (agrees ? "kvlib's engine simulates the same." : "KVLIB'S ENGINE SIMULATES SOMETHING ELSE!");
  });
}
