// Shared by every explorable; an explorable's own file follows in the same module and defines
//   function explore(kit, data) -> redraw(state)
// kit: { root, stage, readout, state, element(), svg(), range(), select(), button(), drawing(), update(), start() } as built
// below. axes(), path() and number() help to draw.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// An SVG element; colours are written as CSS classes or var(--kv-…), so that light and dark both work.
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const number = (value, digits = 0) =>
  value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits });

// Axes inside `picture`, in the box {left, top, width, height}. `x` and `y`: {from, to, log, ticks: [values], show, label}.
// Returns the two scales (value -> user units) and a group to draw into: {x(), y(), layer}.
function axes(picture, box, x, y) {
  const scaled = ({ from, to, log }, start, length) => {
    const at = log ? Math.log : (value) => value;
    return (value) => start + (length * (at(value) - at(from))) / (at(to) - at(from));
  };
  const bottom = box.top + box.height;
  const scales = { x: scaled(x, box.left, box.width), y: scaled(y, bottom, -box.height) };
  for (const value of y.ticks) {
    const at = scales.y(value);
    picture.append(
      svg("line", { x1: box.left, x2: box.left + box.width, y1: at, y2: at, stroke: "var(--kv-line)", "stroke-width": 0.7 }),
      svg("text", { x: box.left - 6, y: at + 4, "text-anchor": "end", class: "muted" }, (y.show ?? String)(value)));
  }
  for (const value of x.ticks) {
    const at = scales.x(value);
    picture.append(
      svg("line", { x1: at, x2: at, y1: bottom, y2: bottom + 4, stroke: "var(--kv-muted)" }),
      svg("text", { x: at, y: bottom + 17, "text-anchor": "middle", class: "muted" }, (x.show ?? String)(value)));
  }
  picture.append(
    svg("line", { x1: box.left, x2: box.left + box.width, y1: bottom, y2: bottom, stroke: "var(--kv-muted)" }),
    svg("text", { x: box.left + box.width / 2, y: bottom + 34, "text-anchor": "middle", class: "muted" }, x.label ?? ""),
    svg("text", { x: box.left, y: box.top - 8, class: "muted" }, y.label ?? ""));
  const layer = svg("g");
  picture.append(layer);
  return { ...scales, layer };
}

// The d of a path through [x, y] points, already in user units.
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");

function makeKit(root) {
  const controls = element("div", { class: "kv-controls" });
  const stage = element("div", { class: "kv-stage" });
  const readout = element("div", { class: "kv-readout", "aria-live": "polite" });
  root.append(controls, stage, readout);
  const state = {};
  let redraw = () => {};
  const changed = () => {
    root.dataset.state = JSON.stringify(state);
    redraw(state);
  };
  let serial = 0;
  const labelled = (label, control, value) => {
    control.id = `${root.id}-${serial++}`;
    const row = element("div", { class: "kv-control" }, element("label", { for: control.id }, label), control);
    if (value) row.append(value);
    controls.append(row);
  };
  const kit = {
    root, stage, readout, state, element, svg,
    // A slider over the integers min … max; show(value) is what is written beside it.
    range(name, label, { min = 0, max, value = min, step = 1, show = String }) {
      state[name] = value;
      const input = element("input", { type: "range", min, max, step, value });
      const output = element("output", {}, show(value));
      input.addEventListener("input", () => {
        state[name] = Number(input.value);
        output.textContent = show(state[name]);
        changed();
      });
      labelled(label, input, output);
      return (next) => {  // a setter, for buttons that move the slider
        input.value = next;
        input.dispatchEvent(new Event("input"));
      };
    },
    // A choice among [value, label] pairs.
    select(name, label, options, value = options[0][0]) {
      state[name] = value;
      const input = element("select", {}, ...options.map(([v, l]) => element("option", { value: v }, l)));
      input.value = value;
      input.addEventListener("change", () => {
        state[name] = input.value;
        changed();
      });
      labelled(label, input);
    },
    button(label, action, title = label) {
      const button = element("button", { type: "button", "aria-label": title }, label);
      button.addEventListener("click", action);
      controls.append(button);
      return button;
    },
    // An empty drawing of the given size in user units; it scales to the width of the page.
    drawing(width, height, description) {
      const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description });
      stage.append(picture);
      return picture;
    },
    // For controls that an explorable builds itself: change the state and draw it.
    update(changes) {
      Object.assign(state, changes);
      changed();
    },
    start(draw) {
      redraw = draw;
      changed();
    },
  };
  return kit;
}

let counter = 0;

function render({ model, el }) {
  const root = element("div", { class: "kv-explorable", id: `kv-explorable-${++counter}` });
  el.append(root);
  explore(makeKit(root), model.get("data"));
}

export default { render };
