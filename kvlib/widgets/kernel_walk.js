// Programs of a paged decode kernel, tile by tile: who reads which block in which round.
// data: tables (block ids of each sequence), lengths, block (tokens to a block), blocks (in the pool), heads, group, tiles and splits (choices),
//       tokens {"tile|splits": tokens of K that the real kernel asked for}.

function explore(kit, data) {
  const { svg } = kit;
  const choices = (values, unit = "") => values.map((value) => [String(value), `${value}${unit}`]);
  kit.select("tile", "Tile", choices(data.tiles, " tokens"));
  kit.select("splits", "Splits", choices(data.splits), "2");
  kit.select("processors", "Processors", choices([2, 4, 8, 16]), "8");
  const setRound = kit.range("round", "Round", { min: 0, max: 4, value: 1 });
  const slider = kit.root.querySelector("input[type=range]");
  const back = kit.button("Back", () => setRound(kit.state.round - 1), "One round back");
  const next = kit.button("Next round", () => setRound(kit.state.round + 1), "One round on");
  const picture = kit.drawing(660, 384, "Programs and the tiles that they fold, and the pool of blocks that they read");
  picture.style.minWidth = "33rem";  // on a phone it scrolls
  const layer = svg("g");
  picture.append(layer);
  const colour = (seq) => `var(--kv-r${seq})`;
  const text = (x, y, content, more = {}) => svg("text", { x, y, ...more }, content);
  // Tinted once it is read, so that dark and light ink can both be read on it; framed while it is being read.
  const box = (x, y, width, height, seq, past, now) => svg("rect", {
    x, y, width, height, fill: past ? colour(seq) : "none", "fill-opacity": 0.4,
    stroke: now ? "var(--kv-ink)" : colour(seq), "stroke-width": now ? 2.2 : 1 });

  // Every program with its tiles, and the round in which it begins. They start in the order of a launch, all first splits before all second ones,
  // each on the processor that is free first. One that has nothing to read takes a round too.
  function plan(tile, splits, processors) {
    const programs = [];
    data.lengths.forEach((length, seq) => {
      const share = Math.ceil(Math.ceil(length / tile) / splits) * tile;
      for (let head = 0; head < data.heads; head++) {
        for (let split = 0; split < splits; split++) {
          const tiles = [];
          for (let first = split * share; first < Math.min((split + 1) * share, length); first += tile) {
            tiles.push([first, Math.min(first + tile, length)]);
          }
          programs.push({ seq, head, split, tiles });
        }
      }
    });
    const free = Array(processors).fill(0);
    for (const program of [...programs].sort((a, b) => a.split - b.split)) {
      const processor = free.indexOf(Math.min(...free));
      program.begins = free[processor];
      free[processor] += Math.max(1, program.tiles.length);
    }
    const folded = Math.max(...free);
    return { programs, folded, rounds: folded + (splits > 1 ? 1 : 0) };
  }

  kit.start((state) => {
    const tile = Number(state.tile), splits = Number(state.splits), processors = Number(state.processors);
    const { programs, folded, rounds } = plan(tile, splits, processors);
    slider.max = rounds;  // the slider ends where the walk does
    if (state.round > rounds) return setRound(rounds);
    const { round } = state;
    back.disabled = round === 0;
    next.disabled = round === rounds;

    const left = 152, top = 38, high = Math.min(26, 208 / programs.length), wide = Math.min(100, 500 / rounds);
    const size = Math.min(11, high * 0.75);
    const parts = [text(8, 13, "a row is a program, a box a tile with the blocks that it lies in", { class: "muted" })];
    for (let when = 0; when < rounds; when++) {
      parts.push(text(left + (when + 0.5) * wide, top - 7, when === folded ? "merge" : `round ${when + 1}`, {
        "text-anchor": "middle", class: when === round - 1 ? "" : "muted", style: `font-size: 10px; font-weight: ${when === round - 1 ? 700 : 400}` }));
    }
    const read = new Map(), reading = new Set();  // "block|head"
    let busy = 0, passing = 0, keys = 0, tiles = 0;
    programs.forEach(({ seq, head, split, begins, tiles: own }, row) => {
      const y = top + row * high, middle = y + high / 2 + size * 0.33;
      parts.push(text(left - 8, middle, `sequence ${seq}, head ${head}, split ${split}`, { "text-anchor": "end", class: "muted", style: `font-size: ${Math.min(10, size)}px` }));
      if (!own.length) {
        const now = begins === round - 1;
        passing += now ? 1 : 0;
        parts.push(svg("rect", { x: left + begins * wide + 1.5, y: y + 1.5, width: wide - 3, height: high - 3, fill: "none",
          stroke: now ? "var(--kv-ink)" : "var(--kv-muted)", "stroke-width": now ? 2.2 : 1, "stroke-dasharray": "3 3" }));
        parts.push(text(left + (begins + 0.5) * wide, middle, "nothing", { "text-anchor": "middle", class: "muted", style: `font-size: ${Math.min(9, size, wide / 5)}px` }));
      }
      own.forEach(([from, to], i) => {
        const when = begins + i, past = when < round, now = when === round - 1, blocks = [];
        for (let slot = from; slot < to; slot += data.block) {
          const block = data.tables[seq][Math.floor(slot / data.block)];
          blocks.push(block);
          if (past) read.set(`${block}|${head}`, seq);
          if (now) reading.add(`${block}|${head}`);
        }
        busy += now ? 1 : 0;
        keys += past ? to - from : 0;
        tiles += 1;
        parts.push(box(left + when * wide + 1.5, y + 1.5, wide - 3, high - 3, seq, past, now));
        parts.push(text(left + (when + 0.5) * wide, middle, blocks.join(" "), { "text-anchor": "middle", style: `font-size: ${Math.min(size, wide / 4)}px` }));
      });
    });
    if (splits > 1) {
      for (let first = 0; first < programs.length; first += splits) {  // one merge for all splits of a head
        const { seq } = programs[first];
        parts.push(box(left + folded * wide + 1.5, top + first * high + 1.5, wide - 3, splits * high - 3, seq, round === rounds, round === rounds));
        parts.push(text(left + (folded + 0.5) * wide, top + (first + splits / 2) * high + 3, wide > 55 ? `${splits} partials` : splits, { "text-anchor": "middle", style: "font-size: 10px" }));
      }
    }

    const pool = top + programs.length * high + 26, perRow = 12, cell = 51;
    picture.setAttribute("viewBox", `0 0 660 ${pool + 108}`);
    parts.push(text(8, pool - 6, "the pool: the number of a block, and under it its places for head 0 and head 1", { class: "muted" }));
    for (let block = 0; block < data.blocks; block++) {
      const x = 26 + (block % perRow) * cell, y = pool + 4 + Math.floor(block / perRow) * 52;
      const owner = data.tables.findIndex((table) => table.includes(block));
      parts.push(text(x, y + 11, block, { class: owner < 0 ? "muted" : "", style: "font-size: 10px" }));
      for (let head = 0; head < data.heads; head++) {
        const at = y + 15 + head * 14;
        parts.push(svg("rect", { x, y: at, width: cell - 7, height: 11, fill: "var(--kv-faint)" }));
        if (owner < 0) continue;
        const place = data.tables[owner].indexOf(block);
        const held = Math.min(data.block, data.lengths[owner] - place * data.block) / data.block;
        parts.push(box(x, at, (cell - 7) * held, 11, owner, read.has(`${block}|${head}`), reading.has(`${block}|${head}`)));
      }
    }
    layer.replaceChildren(...parts);

    const all = data.heads * data.lengths.reduce((sum, length) => sum + length, 0);
    const empty = programs.filter(({ tiles: own }) => !own.length).length;
    const doing = round === 0 ? "Nothing has begun." : round > folded ? `The second kernel merges ${splits} partials a head.` : `${busy} of ${processors} processors fold a tile${passing ? `, ${passing} ${passing === 1 ? "finds" : "find"} nothing to read` : ""}.`;
    const agrees = keys === all && data.tokens[`${tile}|${splits}`] * data.heads === keys ? " The real kernel asked for as many." : "";
    kit.readout.textContent = `Round ${round} of ${rounds}, each as long as ${tile} tokens. ${doing} Read so far: ${keys} of ${all} keys, each once for ${data.group} query heads.${agrees} `
      + `The whole walk: ${programs.length} programs, ${empty} with nothing to read; as long as ${rounds * tile} tokens; a processor folds in ${Math.round(100 * tiles / (processors * rounds))} % of its rounds.`;
  });
}
