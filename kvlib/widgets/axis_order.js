// Reorder the axes of a cache and see which bytes an operation touches: one row of the map is a page, one cell a cache line.
// data: axes [{name, label, size}], presets [[name, order]], operations [{name, label, pick, fill}], dtypes [[bytes, label]],
//       line, page (bytes), token (the slot written first), expected {"preset|operation|bytes|token": [bytes, runs, lines, pages]}.

// Byte offsets of the elements that `pick` selects, ascending; an axis that it does not name is taken whole.
function byteOffsets(order, sizes, itemsize, pick) {
  let offsets = [0];
  let stride = itemsize;
  for (const axis of [...order].reverse()) {
    const indices = pick[axis] ?? Array.from({ length: sizes[axis] }, (_, i) => i);
    offsets = indices.flatMap((i) => offsets.map((offset) => offset + i * stride));
    stride *= sizes[axis];
  }
  return offsets.sort((a, b) => a - b);
}

function countTouched(offsets, itemsize, line, page) {
  const distinct = (unit) => new Set(offsets.map((offset) => Math.floor(offset / unit))).size;
  const breaks = offsets.filter((offset, i) => i > 0 && offset - offsets[i - 1] !== itemsize).length;
  return { bytes: offsets.length * itemsize, runs: breaks + 1, lines: distinct(line), pages: distinct(page) };
}

function explore(kit, data) {
  const { element, svg } = kit;
  const sizes = Object.fromEntries(data.axes.map((axis) => [axis.name, axis.size]));
  const labels = Object.fromEntries(data.axes.map((axis) => [axis.name, axis.label]));
  const same = (a, b) => a.join() === b.join();
  kit.state.order = data.presets[0][1];

  // The order: a menu of known ones, and the axes themselves with a swap button between each two.
  const menu = element("select", { id: `${kit.root.id}-order` });
  const options = data.presets.map(([name]) => element("option", { value: name }, name));
  const own = element("option", { value: "own" }, "your own order");
  menu.append(...options);
  menu.addEventListener("change", () => {
    const preset = data.presets.find(([name]) => name === menu.value);
    if (preset) kit.update({ order: preset[1] });
  });
  const chips = data.axes.map(() => element("span", { class: "kv-chip" }));
  const strip = element("div", { class: "kv-controls kv-axes", role: "group", "aria-label": "Axes from outermost to innermost" });
  chips.forEach((chip, i) => {
    if (i > 0) {
      const swap = element("button", { type: "button", "aria-label": `swap axes ${i} and ${i + 1}` }, "⇄");
      swap.addEventListener("click", () => {
        const order = [...kit.state.order];
        [order[i - 1], order[i]] = [order[i], order[i - 1]];
        kit.update({ order });
      });
      strip.append(swap);
    }
    strip.append(chip);
  });
  const label = element("label", { for: menu.id }, "Order in memory");
  const known = element("div", { class: "kv-control" }, label, menu);
  kit.root.prepend(element("div", { class: "kv-controls" }, known), strip);

  kit.select("operation", "Operation", data.operations.map(({ name, label }) => [name, label]));
  kit.select("itemsize", "Stored as", data.dtypes.map(([bytes, label]) => [String(bytes), label]));
  kit.range("token", "Token", { max: sizes.token - 1, value: data.token, show: (t) => `no. ${t + 1} of ${sizes.token}` });

  const columns = data.page / data.line;
  const total = data.axes.reduce((product, axis) => product * axis.size, 1) * Math.max(...data.dtypes.map(([bytes]) => bytes));
  const rows = total / data.page;
  const [left, top, wide, high] = [52, 18, 10, 6];
  const picture = kit.drawing(left + columns * wide + 4, top + rows * high + 20, "Map of the cache's memory");
  picture.append(svg("text", { x: left, y: 11, class: "muted" }, "64 cache lines of 64 B = one page of 4 KiB →"));
  const paths = Object.fromEntries(
    [["empty", "--kv-faint", 1], ["stored", "--kv-line", 1], ["k", "--kv-k", 1], ["v", "--kv-v", 1], ["kv", "--kv-amber", 1],
     ["new", "--kv-accent", 1]].map(([name, colour]) => {
      const path = svg("path", { style: `fill: var(${colour})` });
      picture.append(path);
      return [name, path];
    }));
  const addresses = svg("g");
  picture.append(addresses);
  const key = element("div", { class: "kv-key" });
  kit.stage.append(key);

  // Lines of the map -> one SVG path; a line that is only partly wanted is drawn as a thinner cell.
  function cells(lines, share) {
    let path = "";
    for (const line of lines) {
      const x = left + (line % columns) * wide;
      const y = top + Math.floor(line / columns) * high;
      const h = share && share.get(line) < data.line ? (high - 1) / 2 : high - 1;
      path += `M${x} ${y}h${wide - 1}v${h}h${1 - wide}z`;
    }
    return path;
  }

  function linesOf(offsets, itemsize) {
    const share = new Map();
    for (const offset of offsets) {
      const line = Math.floor(offset / data.line);
      share.set(line, (share.get(line) ?? 0) + itemsize);
    }
    return share;
  }

  kit.start((state) => {
    const itemsize = Number(state.itemsize);
    const { order, token } = state;
    const operation = data.operations.find(({ name }) => name === state.operation);
    const upTo = Array.from({ length: token + 1 }, (_, i) => i);
    const pick = { ...operation.pick, token: operation.tokens === "new" ? [token] : upTo };
    const offsetsOf = (extra) => byteOffsets(order, sizes, itemsize, { ...pick, ...extra });

    const known = data.presets.find(([, preset]) => same(preset, order));
    if (known) own.remove(); else menu.append(own);
    menu.value = known ? known[0] : "own";
    chips.forEach((chip, i) => {
      chip.textContent = `${labels[order[i]]} ${sizes[order[i]]}`;
      chip.dataset.axis = order[i];
    });

    const wanted = offsetsOf({});
    const touched = linesOf(wanted, itemsize);
    const kinds = pick.kv ?? [0, 1];
    const lines = Object.fromEntries(["k", "v"].map((name, i) =>
      [name, kinds.includes(i) ? linesOf(offsetsOf({ kv: [i] }), itemsize) : new Map()]));
    const fresh = operation.tokens === "new" || operation.writes ? linesOf(offsetsOf({ token: [token] }), itemsize) : new Map();
    const all = order.reduce((product, axis) => product * sizes[axis], 1) * itemsize / data.line;
    const stored = linesOf(byteOffsets(order, sizes, itemsize, { token: upTo }), itemsize);
    const list = Array.from({ length: all }, (_, i) => i);
    const kind = (line) => fresh.has(line) ? "new" : lines.k.has(line) ? (lines.v.has(line) ? "kv" : "k")
      : lines.v.has(line) ? "v" : stored.has(line) ? "stored" : "empty";
    const groups = Object.fromEntries(Object.keys(paths).map((name) => [name, []]));
    list.forEach((line) => groups[kind(line)].push(line));
    // under a cell that is only partly wanted, the rest of the line shows: fetched, and not asked for
    groups.stored.push(...[...touched.keys()].filter((line) => touched.get(line) < data.line));
    for (const [name, path] of Object.entries(paths)) {
      path.setAttribute("d", cells(groups[name], name === "stored" || name === "empty" ? null : touched));
    }
    addresses.replaceChildren(...Array.from({ length: all / columns / 8 + 1 }, (_, i) =>
      svg("text", { x: left - 6, y: top + 8 * i * high + 6, "text-anchor": "end", class: "muted" }, `${i * 8 * data.page / 1024} KiB`)));

    const count = countTouched(wanted, itemsize, data.line, data.page);
    const legend = [["k", "keys"], ["v", "values"], ["kv", "both"], ["new", "written"], ["stored", "stored, not touched"]];
    key.replaceChildren(...legend.filter(([name]) => groups[name].length).map(([name, text]) =>
      element("span", {}, element("i", { style: paths[name].getAttribute("style").replace("fill", "background") }), text)));
    const share = Math.round(100 * count.bytes / (count.lines * data.line));
    kit.readout.replaceChildren(
      element("b", {}, `${number(count.bytes)} B`), " wanted, in ",
      element("b", {}, number(count.runs)), ` contiguous run${count.runs > 1 ? "s" : ""} · `,
      element("b", {}, number(count.lines)), ` cache lines move (${share} % of their bytes are wanted) · `,
      element("b", {}, number(count.pages)), ` page${count.pages > 1 ? "s" : ""}`);
    const expected = data.expected[[menu.value, operation.name, itemsize, token].join("|")];
    delete kit.root.dataset.agrees;
    if (expected) {
      const agrees = same(expected, [count.bytes, count.runs, count.lines, count.pages]);
      kit.root.dataset.agrees = agrees;
      kit.readout.append(agrees ? " · the Python of this page counts the same" : ` · PYTHON COUNTS ${expected.join(", ")}`);
    }
  });
}
