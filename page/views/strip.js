// A vector as a row of coloured cells: blue below zero, orange above, each cell can be clicked.

/** Make a strip. `onPick(index)` is called for a click or Enter; draw(values, options) shows
    numbers: options are {label, scale, groups, second, names}: the magnitude of the strongest
    colour, how many cells make a group (a head), a vector of the same length drawn below, and a
    function from the index to the name of a cell. */
function makeStrip(onPick) {
  const canvas = el("canvas.cells", { tabindex: 0, role: "img" });
  const readout = el("div.readout", { "aria-hidden": "true" });
  const node = el("div.stripbox", canvas, readout);
  const view = { node, values: [], cursor: -1, picked: -1 };
  const widthNow = widthOf(node, 360);
  let options = {};
  let layout = null;

  view.draw = (values, given = {}) => {
    [view.values, options] = [values, given];
    const width = widthNow();
    layout = foldCells(values.length, width, given.groups);
    const height = layout.rows * layout.row + (given.second ? layout.rows * 5 : 0);
    const context = fit(canvas, width, height);
    const scale = given.scale || magnitude(values);
    paintCells(context, values, layout, scale, given, given.second);
    for (const [index, colour] of [
      [view.cursor, paint.soft],
      [view.picked, paint.ink],
    ])
      if (index >= 0 && index < values.length) frameCell(context, layout, index, given, colour);
    canvas.setAttribute(
      "aria-label",
      `${given.label}: ${values.length} numbers, ` +
        `root mean square ${num(rms(values))}. Arrow keys choose one, Enter explains it.`,
    );
    showReadout();
  };

  function showReadout() {
    const i = view.cursor >= 0 ? view.cursor : view.picked;
    const name = options.names ? options.names(i) : `${options.label}[${i}]`;
    const text =
      i < 0 || i >= view.values.length
        ? ""
        : `${name} = ${num(view.values[i])}` +
          (options.second ? `, beside ${num(options.second[i])}` : "");
    if (readout.textContent !== text) readout.textContent = text;
  }

  function move(index) {
    view.cursor = index;
    view.draw(view.values, options);
  }

  canvas.addEventListener("pointermove", (event) => move(cellAt(event)));
  canvas.addEventListener("pointerleave", () => move(-1));
  canvas.addEventListener("blur", () => move(-1));
  canvas.addEventListener("click", (event) => {
    const index = cellAt(event);
    if (index >= 0) onPick(index);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -layout.columns,
      ArrowDown: layout.columns,
    }[event.key];
    if (step) {
      const from = view.cursor < 0 ? (view.picked < 0 ? -1 : view.picked) : view.cursor;
      move(Math.max(0, Math.min(view.values.length - 1, from + step)));
    } else if (event.key === "Enter" && view.cursor >= 0) onPick(view.cursor);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / layout.cell);
    const pitch = layout.row + (options.second ? 5 : 0);
    const index = Math.floor((event.clientY - box.top) / pitch) * layout.columns + column;
    return column < layout.columns && index >= 0 && index < view.values.length ? index : -1;
  }
  return view;
}

/** How n cells are folded into rows, a whole number of groups in each, if that fits. */
function foldCells(n, width, group = 0) {
  let columns = Math.min(n, Math.max(8, Math.floor(width / 5)));
  const unit = group && group <= columns ? group : 1; // rows hold as many units as each other
  const units = Math.ceil(n / unit);
  columns = unit * Math.ceil(units / Math.ceil(units / Math.floor(columns / unit)));
  const rows = Math.ceil(n / columns);
  return { columns, rows, cell: Math.min(16, width / columns), row: rows > 1 ? 11 : 18 };
}

function paintCells(context, values, layout, scale, options, second) {
  const { columns, cell, row } = layout;
  const pitch = row + (second ? 5 : 0);
  const gap = cell > 6 ? 1 : 0;
  const colours = options.positive ? paint.sequential : paint.diverging;
  const tone = (v) =>
    shade(
      colours,
      options.positive
        ? weightShade(v / scale)
        : 0.5 + 0.5 * Math.sign(v) * Math.sqrt(Math.min(1, Math.abs(v) / scale)),
    );
  for (let i = 0; i < values.length; i++) {
    const [x, y] = [(i % columns) * cell, Math.floor(i / columns) * pitch];
    context.fillStyle = tone(values[i]);
    context.fillRect(x, y, cell - gap + 0.3 * !gap, row - 1);
    if (second) {
      context.fillStyle = tone(second[i]);
      context.fillRect(x, y + row - 1, cell - gap + 0.3 * !gap, 4);
    }
    if (options.groups && i && i % options.groups === 0 && i % columns) {
      context.fillStyle = paint.ink;
      context.fillRect(x - 0.5, y, 1, row - 1);
    }
  }
}

function frameCell(context, layout, index, options, colour) {
  const pitch = layout.row + (options.second ? 5 : 0);
  const [x, y] = [
    (index % layout.columns) * layout.cell,
    Math.floor(index / layout.columns) * pitch,
  ];
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.strokeRect(x - 0.5, y + 0.5, Math.max(layout.cell, 4), layout.row - 2);
}

Object.assign(globalThis, { makeStrip });
