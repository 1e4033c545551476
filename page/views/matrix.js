// A weight matrix as a picture, from the whole of it down to single numbers.

const MATRIX_HEIGHT = 420;
const [WIDE, HIGH] = [62, 24]; // pixels of a cell with its number in it, which is the largest

function makeMatrix(app, root) {
  const tensors = app.data.models[app.final].tensors ?? [];
  const matrices = tensors.filter(({ shape }) => shape.length === 2);
  const options = matrices.map(({ name }) => {
    const label = name.replace(".weight", "").replace(/^decoder_blocks\.(\d+)\./, "block $1, ");
    return el("option", { value: name }, label);
  });
  const select = el("select", { "aria-label": "Matrix", onchange: load }, options);
  const [byRow, byColumn] = ["rows", "columns"].map((name) => {
    const button = el("button.choice", { "aria-pressed": "false" }, `sort ${name} by length`);
    button.addEventListener("click", () => {
      setPressed(button, button.ariaPressed !== "true");
      if (!matrix) return;
      order();
      draw();
    });
    return button;
  });
  const zoomer = (name, label, factor) =>
    el("button", { "aria-label": label, onclick: () => zoom(factor) }, name);
  const canvas = el("canvas.matrix", { role: "img", tabindex: 0, "aria-label": "A matrix" });
  const readout = el("p.mono.matrixcell", { role: "status" });
  const caption = el("p.note");
  const zooming = [zoomer("+", "Zoom in", 0.5), zoomer("−", "Zoom out", 2)];
  const controls = [el("div.choices", byRow, byColumn), el("div.choices", zooming)];
  const whole = zoomer("whole matrix", "Show the whole matrix", Infinity);
  const shown = el("div", el("div.row", select, controls, whole), canvas, readout, caption);
  root.append(
    app.frozen ? el("p.missing", "The weights of this model are not in the page.") : shown,
  );
  const widthNow = widthOf(shown, 600);
  let matrix = null; // {name, values, R, C, most, rows, columns: {norms, order}}
  let seen = null; // the part of it that is, {top, left, rows, columns} in cells
  let cell = [0, 0]; // the chosen one, as a place in the picture
  let asked = "";

  const update = () => {
    if (!app.frozen && view.visible) load();
  };

  /** Fetch the chosen matrix of the model that is shown, and draw it. */
  async function load() {
    const [model, tensor] = [app.state.model, select.value];
    if (asked === `${model} ${tensor}`) return matrix && draw();
    const wanted = (asked = `${model} ${tensor}`);
    const { values, shape } = await app.client.ask({ type: "weights", model, tensor });
    if (wanted !== asked) return;
    const [R, C] = shape;
    const columns = new Float32Array(C);
    for (let i = 0; i < values.length; i++) columns[i % C] += values[i] * values[i];
    const another = matrix?.name !== tensor;
    matrix = { name: tensor, values, R, C, most: magnitude(values) };
    matrix.rows = { norms: engine.rowNorms(values, R) };
    matrix.columns = { norms: columns.map(Math.sqrt) };
    if (another) [seen, cell] = [{ top: 0, left: 0, rows: R, columns: C }, [0, 0]];
    order();
    draw();
  }

  function order() {
    sort(matrix.rows, byRow);
    sort(matrix.columns, byColumn);
  }

  function sort(side, button) {
    side.order = Array.from(side.norms.keys());
    if (button.ariaPressed === "true")
      side.order.sort((a, b) => side.norms[b] - side.norms[a] || a - b);
  }

  function draw() {
    const { values, R, C, most, rows, columns } = matrix;
    const width = Math.max(100, widthNow());
    const ratio = window.devicePixelRatio;
    const [w, h] = [Math.round(width * ratio), Math.round(MATRIX_HEIGHT * ratio)];
    canvas.style.height = `${MATRIX_HEIGHT}px`;
    // A pixel shows the number in its middle, where it stands for several.
    const middle = (i, n, from, many) => Math.floor(from + ((i + 0.5) * many) / n);
    const along = (n, from, many, side) =>
      Int32Array.from({ length: n }, (_, i) => side.order[middle(i, n, from, many)]);
    const at = along(w, seen.left, seen.columns, columns);
    const down = along(h, seen.top, seen.rows, rows);
    const tone = (v) => signedShade(v, most);
    drawPixels(canvas, h, w, paint.diverging, (y, x) => tone(values[down[y] * C + at[x]]));
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const [dx, dy] = [width / seen.columns, MATRIX_HEIGHT / seen.rows];
    if (dx >= 0.8 * WIDE && dy >= 0.8 * HIGH) writeNumbers(context, dx, dy, tone);
    context.strokeStyle = paint.ink;
    context.lineWidth = 2;
    const [x, y] = [(cell[1] - seen.left) * dx, (cell[0] - seen.top) * dy];
    context.strokeRect(x - 1, y - 1, Math.max(dx, 3) + 2, Math.max(dy, 3) + 2);
    canvas.style.touchAction = seen.rows < R || seen.columns < C ? "none" : "pan-y";
    const several = Math.max(1, seen.rows / h) * Math.max(1, seen.columns / w);
    const parts = [seen.rows, seen.columns].map((n) => count(Math.ceil(n))).join(" × ");
    caption.textContent =
      `${count(R)} rows, ${count(C)} columns; blue below zero, orange above, the strongest colour ` +
      `at ±${num(most)}. Shown: ${parts}` +
      (several > 1.01
        ? `; a pixel stands for ${num(several, 2)} numbers and shows one of them.`
        : ".") +
      " Drag to move, + and − zoom, double-click zooms in, arrow keys choose a cell.";
    tell(cell);
  }

  function writeNumbers(context, dx, dy, tone) {
    const { values, C, rows, columns } = matrix;
    context.font = `12px ${paint.mono}`;
    [context.textAlign, context.textBaseline] = ["center", "middle"];
    for (let r = Math.floor(seen.top); r < seen.top + seen.rows; r++)
      for (let c = Math.floor(seen.left); c < seen.left + seen.columns; c++) {
        const v = values[rows.order[r] * C + columns.order[c]];
        context.fillStyle = inkOn(paint.diverging, tone(v));
        const [x, y] = [(c + 0.5 - seen.left) * dx, (r + 0.5 - seen.top) * dy];
        context.fillText(num(v), x, y, dx - 4);
      }
  }

  /** Say the number at a place of the picture, its row and its column. */
  function tell([r, c]) {
    const { name, values, C, rows, columns } = matrix;
    const [row, column] = [rows.order[r], columns.order[c]];
    const short = name.replace(".weight", "").split(".").at(-1);
    const token = /^(embeddings|final_linear)/.test(name) ? ` of ${quoted(app.piece(row))}` : "";
    const text =
      `${short}[${row}, ${column}] = ${num(values[row * C + column])}; ` +
      `row ${row}${token} is ${num(rows.norms[row])} long, ` +
      `column ${column} ${num(columns.norms[column])}`;
    write(readout, text);
    canvas.setAttribute("aria-label", `${select.selectedOptions[0].text}: ${text}`);
  }

  /** See `factor` times as much, with the point (y, x), parts of the picture, where it is. */
  function zoom(factor, [y, x] = [0.5, 0.5]) {
    if (!matrix) return;
    const scale = (from, many, all, part, least) => {
      const next = Math.min(all, Math.max(least, many * factor));
      return [clamp(from + part * (many - next), 0, all - next), next];
    };
    const [top, rows] = scale(seen.top, seen.rows, matrix.R, y, MATRIX_HEIGHT / HIGH);
    const [left, columns] = scale(seen.left, seen.columns, matrix.C, x, widthNow() / WIDE);
    seen = { top, left, rows, columns };
    draw();
  }

  function move(dy, dx) {
    seen.top = clamp(seen.top + dy, 0, matrix.R - seen.rows);
    seen.left = clamp(seen.left + dx, 0, matrix.C - seen.columns);
  }

  /** Choose a cell, and move until it is seen. */
  function choose(r, c) {
    cell = [clamp(r, 0, matrix.R - 1), clamp(c, 0, matrix.C - 1)];
    const out = (at, from, many) => Math.min(0, at - from) + Math.max(0, at + 1 - from - many);
    move(out(cell[0], seen.top, seen.rows), out(cell[1], seen.left, seen.columns));
    draw();
  }

  const partOf = ({ offsetX, offsetY }) =>
    [offsetY / canvas.clientHeight, offsetX / canvas.clientWidth].map((x) => clamp(x, 0, 0.9999));
  const partOfCell = () => [
    (cell[0] + 0.5 - seen.top) / seen.rows,
    (cell[1] + 0.5 - seen.left) / seen.columns,
  ];
  const cellAt = ([y, x]) => [
    Math.floor(seen.top + y * seen.rows),
    Math.floor(seen.left + x * seen.columns),
  ];
  let [grip, moved] = [null, false];
  canvas.addEventListener("pointerdown", (event) => {
    [grip, moved] = [partOf(event), false];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!matrix) return;
    const [y, x] = partOf(event);
    if (!grip) return tell(cellAt([y, x]));
    if (!moved && Math.hypot(y - grip[0], x - grip[1]) < 0.008) return;
    move((grip[0] - y) * seen.rows, (grip[1] - x) * seen.columns);
    [grip, moved] = [[y, x], true];
    draw();
  });
  for (const end of ["pointerup", "pointercancel"])
    canvas.addEventListener(end, () => (grip = null));
  canvas.addEventListener("pointerleave", () => matrix && tell(cell));
  canvas.addEventListener("click", (event) => {
    if (matrix && !moved) choose(...cellAt(partOf(event)));
  });
  canvas.addEventListener("dblclick", (event) => zoom(0.5, partOf(event)));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    zoom(2 ** (event.deltaY / 100), partOf(event));
  });
  onArrows(canvas, (right, down) => matrix && choose(cell[0] + down, cell[1] + right));
  canvas.addEventListener("keydown", (event) => {
    const factor = { "+": 0.5, "=": 0.5, "-": 2, 0: Infinity }[event.key];
    if (!matrix || !factor || event.ctrlKey || event.metaKey) return;
    zoom(factor, partOfCell());
    event.preventDefault();
  });
  const view = { update, onVisible: (visible) => visible && app.trace && update() };
  return view;
}

const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
