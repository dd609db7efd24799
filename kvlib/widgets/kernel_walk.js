// Programs of a paged decode kernel, tile by tile: who reads which block in which round.
// data: tables (block ids of each sequence), lengths, block (tokens to a block), blocks (in the pool), heads, group, tiles and splits (choices),
//       tokens {"tile|splits": tokens of K that the real kernel asked for}.

function explore(kit, data) {
  const { svg } = kit;
  const numbers = (values) => values.map((value) => [String(value), String(value)]);
  kit.select("tile", "Tile", data.tiles.map((tile) => [String(tile), `${tile} tokens`]));
  kit.select("splits", "Splits", numbers(data.splits), "2");
  kit.select("processors", "Processors", numbers([2, 4, 8, 16]), "8");
  const most = 40;
  const setRound = kit.range("round", "Round", { min: 0, max: most, value: 1 });
  const back = kit.button("Back", () => setRound(kit.state.round - 1), "One round back");
  const next = kit.button("Next round", () => setRound(kit.state.round + 1), "One round on");
  const picture = kit.drawing(660, 470, "Programs and the tiles that they fold, and the pool of blocks that they read");
  const layer = svg("g");
  picture.append(layer);
  const colour = (seq) => `var(--kv-r${seq})`;

  // Every program with its tiles, and the round in which it folds each of them: waves of as many programs as processors.
  function programs({ tile, splits, processors }) {
    const list = [];
    data.lengths.forEach((length, seq) => {
      const share = Math.ceil(Math.ceil(length / tile) / splits) * tile;
      for (let head = 0; head < data.heads; head++) {
        for (let split = 0; split < splits; split++) {
          const tiles = [];
          for (let first = split * share; first < Math.min((split + 1) * share, length); first += tile) {
            tiles.push([first, Math.min(first + tile, length)]);
          }
          list.push({ seq, head, split, tiles });
        }
      }
    });
    const free = Array(processors).fill(0);  // the round in which each processor is free
    for (const program of list) {
      const processor = free.indexOf(Math.min(...free));
      program.begins = free[processor];
      program.processor = processor;
      free[processor] += Math.max(1, program.tiles.length);
    }
    return { list, rounds: Math.max(...free) + (splits > 1 ? 1 : 0) };
  }

  kit.start((state) => {
    const settings = { tile: Number(state.tile), splits: Number(state.splits), processors: Number(state.processors) };
    const { list, rounds } = programs(settings);
    const round = Math.min(state.round, rounds);
    back.disabled = state.round === 0;
    next.disabled = state.round === most;
    const parts = [svg("text", { x: 8, y: 14, class: "muted" }, "programs: one row each; a cell is a tile, named by its blocks; the line is now")];
    const left = 150, high = Math.min(17, 250 / list.length), wide = Math.min(46, 500 / rounds);
    const reading = new Map(), read = new Map();  // block -> sequence
    let busy = 0, done = 0;
    list.forEach((program, row) => {
      const y = 24 + row * high;
      parts.push(svg("text", { x: left - 8, y: y + high * 0.7, "text-anchor": "end", class: "muted", style: `font-size: ${Math.min(10, high)}px` },
        `seq ${program.seq}, head ${program.head}, split ${program.split}`));
      if (!program.tiles.length) {
        parts.push(svg("rect", { x: left + program.begins * wide, y, width: wide - 1.5, height: high - 1.5, fill: "none", stroke: "var(--kv-muted)", "stroke-dasharray": "2 2" }));
      }
      program.tiles.forEach(([from, to], i) => {
        const when = program.begins + i, blocks = [];
        for (let slot = from; slot < to; slot += data.block) blocks.push(data.tables[program.seq][Math.floor(slot / data.block)]);
        const now = when === round - 1, past = when < round;
        if (past) blocks.forEach((block) => read.set(block, program.seq));
        if (now) blocks.forEach((block) => reading.set(block, program.seq));
        busy += now ? 1 : 0;
        done += past && program.head === 0 ? to - from : 0;
        parts.push(
          svg("rect", { x: left + when * wide, y, width: wide - 1.5, height: high - 1.5, fill: past ? colour(program.seq) : "var(--kv-faint)", stroke: now ? "var(--kv-ink)" : "none", "stroke-width": 1.5 }),
          svg("text", { x: left + when * wide + wide / 2 - 1, y: y + high * 0.7, "text-anchor": "middle", style: `font-size: ${Math.min(9, high * 0.7, wide / 4)}px` }, blocks.join(" ")));
      });
    });
    if (settings.splits > 1) {
      parts.push(svg("text", { x: left + (rounds - 1) * wide + 2, y: 20, class: "muted", style: "font-size: 9px" }, "merge"));
    }
    parts.push(svg("line", { x1: left + round * wide - 1, x2: left + round * wide - 1, y1: 20, y2: 26 + list.length * high, stroke: "var(--kv-accent)", "stroke-width": 1.5 }));

    const top = 330, perRow = 12, cell = 42;
    parts.push(svg("text", { x: 8, y: top - 10, class: "muted" }, "the pool: block by block, filled as far as it has been read; framed: being read in this round"));
    for (let block = 0; block < data.blocks; block++) {
      const x = 100 + (block % perRow) * cell, y = top + Math.floor(block / perRow) * 36;
      const owner = data.tables.findIndex((table) => table.includes(block));
      const place = owner < 0 ? -1 : data.tables[owner].indexOf(block);
      const held = owner < 0 ? 0 : Math.min(data.block, data.lengths[owner] - place * data.block) / data.block;
      parts.push(svg("rect", { x, y, width: cell - 4, height: 30, fill: "var(--kv-faint)" }));
      if (owner >= 0) {
        parts.push(svg("rect", { x, y, width: (cell - 4) * held, height: 30, fill: colour(owner), "fill-opacity": read.has(block) ? 1 : 0.3,
          stroke: reading.has(block) ? "var(--kv-ink)" : "none", "stroke-width": 2 }));
      }
      parts.push(svg("text", { x: x + (cell - 4) / 2, y: y + 19, "text-anchor": "middle", style: "font-size: 10px", class: owner < 0 ? "muted" : "" }, String(block)));
    }
    parts.push(svg("text", { x: 100, y: top + 88, class: "muted" }, `each processor: ${settings.processors} in all, ${round > 0 && round <= rounds ? busy : 0} of them fold a tile now`));
    layer.replaceChildren(...parts);

    const tokens = data.lengths.reduce((sum, length) => sum + length, 0);
    const empty = list.filter(({ tiles }) => !tiles.length).length;
    const known = data.tokens[`${state.tile}|${state.splits}`];
    const over = state.round > rounds ? ` Round ${state.round} is past the end.` : "";
    const waves = Math.ceil(list.length / settings.processors);
    kit.readout.textContent = `Round ${round} of ${rounds}: ${list.length} programs on ${settings.processors} processors, ${waves} ${waves === 1 ? "wave" : "waves"}, ${empty} with nothing to read. `
      + `${done} of ${tokens} tokens of K have been read, each once for all ${data.group} query heads.${round === rounds && known === done ? ` The real kernel asked for ${known} too.` : ""}${over}`;
  });
}
