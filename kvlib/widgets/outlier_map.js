// A map of |K| or |V| by token and channel, and below it where a grouping and a number of bits leave their error.
// data: { tokens, channels, layers, heads, k, v: [per layer and head: base64 of int8, token by token],
//         groups: [[name, label, axis, size]], bits, plants: [{name, label, channels, tokens, factor}],
//         expected: {"side|layer|head|plant|group|bits": [error of all, error of the numbers not planted]} }

function decodeInt8(text) {
  return Int8Array.from(atob(text), (c) => c.charCodeAt(0));
}

// The numbers of group g, as indices into the map; `axis` says in which direction they lie.
function groupIndices(g, axis, size, { tokens, channels }) {
  if (axis === "token") {
    const perRow = channels / size;
    const start = Math.floor(g / perRow) * channels + (g % perRow) * size;
    return Array.from({ length: size }, (_, i) => start + i);
  }
  const start = Math.floor(g / channels) * size * channels + (g % channels);
  return Array.from({ length: size }, (_, i) => start + i * channels);
}

function roundTrip(x, bits, axis, size, shape) {
  const out = new Float64Array(x.length);
  const levels = 2 ** bits - 1;
  for (let g = 0; g < x.length / size; g++) {
    const places = groupIndices(g, axis, size, shape);
    const numbers = places.map((i) => x[i]);
    const low = Math.min(...numbers);
    const scale = (Math.max(...numbers) - low) / levels || 1;
    for (const i of places) out[i] = Math.round((x[i] - low) / scale) * scale + low;
  }
  return out;
}

function relative(error, x, chosen) {
  let wrong = 0, all = 0;
  for (let i = 0; i < x.length; i++) {
    if (!chosen[i]) continue;
    wrong += error[i] * error[i];
    all += x[i] * x[i];
  }
  return Math.sqrt(wrong / all);
}

function explore(kit, data) {
  const { tokens, channels } = data;
  const maps = Object.fromEntries(["k", "v"].map((side) => [side, data[side].map(decodeInt8)]));
  const percent = (share) => (share >= 2 ? `${number(share, 1)} times` : `${number(100 * share, 1)} %`);

  kit.select("side", "Show", [["k", "keys"], ["v", "values"]]);
  kit.range("layer", "Layer", { max: data.layers - 1, value: 2 });
  kit.select("head", "KV head", Array.from({ length: data.heads }, (_, h) => [String(h), String(h)]));
  kit.select("group", "One scale for", data.groups.map(([name, label]) => [name, label]));
  kit.select("bits", "Bits", data.bits.map((b) => [String(b), String(b)]));
  kit.select("plant", "Plant", data.plants.map(({ name, label }) => [name, label]));

  const [left, wide, cellWidth, cellHeight] = [74, 660, (660 - 78) / tokens, 4.2];
  const high = channels * cellHeight, first = 22, second = first + high + 30, bars = second + high + 34, step = 21;
  const picture = kit.drawing(wide, bars + data.groups.length * step + 6,
    "Two maps of channels by tokens, magnitude and error, and one bar for each way to group");
  picture.style.minWidth = "37rem";              // on a phone it scrolls
  const levels = 8;
  const layer = () => Array.from({ length: levels }, (_, i) => {
    const path = svg("path", { opacity: (i + 1) / levels });
    picture.append(path);
    return path;
  });
  const shades = { x: layer(), error: layer() };
  const notes = svg("g");
  picture.append(notes);
  const write = (x, y, text, extra = {}) => svg("text", { x, y, ...extra }, text);

  // A number in one of 8 shades: full colour from `full` on. One path for each shade.
  function paint(paths, numbers, full, top, colour) {
    const d = paths.map(() => []);
    for (let i = 0; i < numbers.length; i++) {
      const shade = Math.min(levels, Math.round(levels * Math.abs(numbers[i]) / full));
      if (!shade) continue;
      const x = left + Math.floor(i / channels) * cellWidth, y = top + (i % channels) * cellHeight;
      d[shade - 1].push(`M${x.toFixed(1)} ${y.toFixed(1)}h${cellWidth.toFixed(2)}v${cellHeight}h-${cellWidth.toFixed(2)}z`);
    }
    paths.forEach((path, i) => {
      path.setAttribute("d", d[i].join(""));
      path.setAttribute("style", `fill: var(--kv-${colour})`);
    });
  }

  kit.start((state) => {
    const plant = data.plants.find(({ name }) => name === state.plant);
    const loud = (i) => plant.channels.includes(i % channels) || plant.tokens.includes(Math.floor(i / channels));
    const source = maps[state.side][state.layer * data.heads + Number(state.head)];
    const x = Float64Array.from(source, (value, i) => (loud(i) ? plant.factor : 1) * value);
    const everything = Array.from(x, () => true), quiet = Array.from(x, (_, i) => !loud(i));
    const results = data.groups.map(([name, label, axis, size]) => {
      const rounded = roundTrip(x, Number(state.bits), axis, size, data);
      const error = rounded.map((value, i) => value - x[i]);
      return { name, label, axis, size, error, all: relative(error, x, everything), rest: relative(error, x, quiet) };
    });
    const chosen = results.find(({ name }) => name === state.group);
    const rms = Math.sqrt(x.reduce((sum, value, i) => sum + (quiet[i] ? value * value : 0), 0) / quiet.filter(Boolean).length);

    paint(shades.x, x, 3 * rms, first, state.side);
    paint(shades.error, chosen.error, 1.5 * rms, second, "accent");
    const parts = [];
    const names = { k: "|K|", v: "|V|" };
    for (const [top, title] of [[first, `${names[state.side]}: full colour from 3 times the usual size on`],
      [second, "error: full colour from 1.5 times the usual size on"]]) {
      parts.push(write(left, top - 7, title, { class: "muted" }),
        svg("rect", { x: left, y: top, width: tokens * cellWidth, height: high, style: "fill: none; stroke: var(--kv-line)" }),
        write(left - 6, top + 11, "channel 0", { "text-anchor": "end", class: "muted" }),
        write(left - 6, top + high, String(channels - 1), { "text-anchor": "end", class: "muted" }));
      // the outline of one group, in the middle of the map
      const [w, h] = chosen.axis === "token" ? [1, chosen.size] : [chosen.size, 1];
      const [at, row] = chosen.axis === "token" ? [tokens / 2, 0] : [chosen.size < tokens ? chosen.size : 0, channels / 2];
      parts.push(svg("rect", { x: left + at * cellWidth, y: top + row * cellHeight, width: w * cellWidth, height: h * cellHeight,
        style: "fill: none; stroke: var(--kv-ink)", "stroke-width": 1.6 }));
    }
    parts.push(write(left + tokens * cellWidth, second + high + 14, `token ${tokens - 1}`, { "text-anchor": "end", class: "muted" }),
      write(left, second + high + 14, "token 0", { class: "muted" }));
    const bitsFor = (size) => Number(state.bits) + 32 / size;
    const longest = Math.max(...results.map(({ rest }) => rest)), room = wide - left - 330;
    const best = Math.min(...results.map(({ rest }) => rest));
    results.forEach(({ name, label, size, rest, all }, i) => {
      const y = bars + i * step, mine = name === state.group;
      parts.push(write(left + 110, y + 12, `${label}, ${number(bitsFor(size), 2)} bits`, { "text-anchor": "end", style: mine ? "font-weight: 700" : "" }),
        svg("rect", { x: left + 118, y, width: room * rest / longest, height: 15,
          style: `fill: var(--kv-${rest === best ? "amber" : "accent"})`, opacity: mine ? 1 : 0.55 }),
        write(left + 124 + room * rest / longest, y + 12,
          percent(rest) + (plant.factor > 1 ? `, with the planted ${percent(all)}` : ""), { style: mine ? "font-weight: 700" : "" }));
    });
    notes.replaceChildren(...parts);

    const others = results.filter((other) => other.rest < chosen.rest).length;
    const what = plant.factor > 1 ? "The error of what is not planted" : "The error";
    const rank = others === 0 ? "no other grouping does better" : others === 1 ? "one other grouping does better"
      : `${others === results.length - 1 ? "all" : others} of the other ${results.length - 1} groupings do better`;
    kit.readout.replaceChildren(
      `${state.side.toUpperCase()} of layer ${state.layer}, KV head ${state.head}: ${state.bits} bits and a scale and offset for `,
      `${chosen.size} numbers make `, element("b", {}, `${number(bitsFor(chosen.size), 2)} bits per number`), `. ${what} is `,
      element("b", {}, percent(chosen.rest)), `${chosen.rest >= 2 ? "" : " of"} its size; ${rank}.`);
    const expected = data.expected[[state.side, state.layer, state.head, state.plant, state.group, state.bits].join("|")];
    delete kit.root.dataset.agrees;
    if (expected) {
      const agrees = [chosen.all, chosen.rest].every((found, i) => Math.abs(found - expected[i]) < 1e-4);
      kit.root.dataset.agrees = agrees;
      kit.readout.append(agrees ? " The Python of this page finds the same." : ` PYTHON FINDS ${expected.join(", ")}.`);
    }
  });
}
