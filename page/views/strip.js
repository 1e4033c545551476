// A vector as a row of coloured cells: blue below zero, orange above, each cell can be clicked.

const SECOND = 5; // pixels of the row of the second vector

/** Make a strip. `onPick(index)` is called for a click or Enter; draw(values, options) shows
    numbers: options are {label, scale, positive, groups, second, names}: the magnitude of the
    strongest colour, whether none is below zero, how many cells make a group (a head), a vector of
    the same length drawn below, and a function from the index to the name of a cell. */
function makeStrip(onPick) {
  const canvas = el("canvas.cells", { tabindex: 0, role: "img" });
  const readout = el("div.readout", { "aria-hidden": "true" });
  const node = el("div.stripbox", canvas, readout);
  const view = { node, picked: -1 };
  const widthNow = widthOf(node, 360);
  let [values, options, layout, cursor] = [[], {}, null, -1];

  view.draw = (given, how = {}) => {
    [values, options] = [given, how];
    layout = foldCells(values.length, widthNow(), how.groups, how.second ? SECOND : 0);
    const context = fit(canvas, widthNow(), layout.rows * layout.pitch);
    paintCells(context);
    frameCell(context, cursor, paint.soft);
    frameCell(context, view.picked, paint.ink);
    const rms = Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);
    canvas.setAttribute(
      "aria-label",
      `${how.label}: ${values.length} numbers, root mean square ${num(rms)}. ` +
        "Arrow keys choose one, Enter explains it.",
    );
    const i = cursor >= 0 ? cursor : view.picked;
    write(readout, i < 0 || i >= values.length ? "" : told(i));
  };

  function frameCell(context, index, colour) {
    if (index < 0 || index >= values.length) return;
    const [x, y] = placeOf(index);
    context.strokeStyle = colour;
    context.lineWidth = 2;
    context.strokeRect(x - 0.5, y + 0.5, Math.max(layout.cell, 4), layout.row - 2);
  }

  function told(i) {
    const { names, label, second } = options;
    const beside = second ? `, beside ${num(second[i])}` : "";
    return `${names ? names(i) : `${label}[${i}]`} = ${num(values[i])}${beside}`;
  }

  const placeOf = (i) => [
    (i % layout.columns) * layout.cell,
    Math.floor(i / layout.columns) * layout.pitch,
  ];

  function paintCells(context) {
    const { cell, row, columns } = layout;
    const { positive, second, groups } = options;
    const scale = options.scale || magnitude(values);
    const gap = cell > 6 ? 1 : 0;
    const tone = positive
      ? (v) => shade(paint.sequential, weightShade(v / scale))
      : (v) => shade(paint.diverging, signedShade(v, scale));
    for (let i = 0; i < values.length; i++) {
      const [x, y] = placeOf(i);
      context.fillStyle = tone(values[i]);
      context.fillRect(x, y, cell - gap + 0.3 * !gap, row - 1);
      if (second) {
        context.fillStyle = tone(second[i]);
        context.fillRect(x, y + row - 1, cell - gap + 0.3 * !gap, 4);
      }
      if (groups && i && i % groups === 0 && i % columns) {
        context.fillStyle = paint.ink;
        context.fillRect(x - 0.5, y, 1, row - 1);
      }
    }
  }

  function move(index) {
    cursor = index;
    view.draw(values, options);
  }

  function cellAt({ offsetX, offsetY }) {
    const column = Math.floor(offsetX / layout.cell);
    const index = Math.floor(offsetY / layout.pitch) * layout.columns + column;
    return column < layout.columns && index >= 0 && index < values.length ? index : -1;
  }
  canvas.addEventListener("pointermove", (event) => move(cellAt(event)));
  canvas.addEventListener("pointerleave", () => move(-1));
  canvas.addEventListener("blur", () => move(-1));
  canvas.addEventListener("click", (event) => cellAt(event) >= 0 && onPick(cellAt(event)));
  onArrows(canvas, (right, down) => {
    const from = cursor < 0 ? view.picked : cursor;
    move(Math.max(0, Math.min(values.length - 1, from + right + down * layout.columns)));
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || cursor < 0) return;
    onPick(cursor);
    event.preventDefault();
  });
  return view;
}

/** How n cells are folded into rows, a whole number of groups in each, if that fits; `more` is what
    each row needs below it. */
function foldCells(n, width, group = 0, more = 0) {
  let columns = Math.min(n, Math.max(8, Math.floor(width / 5)));
  const unit = group && group <= columns ? group : 1; // rows hold as many units as each other
  const units = Math.ceil(n / unit);
  columns = unit * Math.ceil(units / Math.ceil(units / Math.floor(columns / unit)));
  const rows = Math.ceil(n / columns);
  const row = rows > 1 ? 11 : 18;
  return { columns, rows, row, pitch: row + more, cell: Math.min(16, width / columns) };
}
