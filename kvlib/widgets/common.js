// Shared by every explorable; an explorable's own file follows in the same module and defines
//   function explore(kit, data) -> redraw(state)
// kit: { root, stage, readout, range(), select(), buttons(), svg(), text(), width } as built below.

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
