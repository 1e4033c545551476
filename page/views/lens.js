// The logit lens: what each layer would predict at each position.

const LENS_WINDOW = 32; // positions shown at once
const depthName = (depth) => (depth ? `after ${depth - 1}` : "embedding");

function makeLens(app, root) {
  const table = el("div.lens", { role: "group", "aria-label": "Layer by position" });
  const scroll = el("div.lensbox", table);
  const note = el("p.note");
  const detail = el("div.card.lensdetail");
  root.append(scroll, note, detail);
  let [cells, from] = [{ reads: [] }, 0];
  let chosen = null; // the depth that is explained; null: the last
  const L = app.config().n_layers;
  const depthNow = () => chosen ?? L;
  onArrows(table, (right, down) => {
    chosen = Math.max(0, Math.min(L, depthNow() + down));
    app.change({ position: app.state.position + right });
    cells.depths[chosen][app.state.position - from].focus();
  });

  const update = () => {
    const { trace, state, beside } = app;
    const { T } = trace.shape;
    const columns = Math.min(T, LENS_WINDOW);
    if (state.position < from || state.position >= from + columns || from + columns > T)
      from = Math.max(0, Math.min(T - columns, state.position - Math.floor(columns / 2)));
    if (cells.reads.length !== columns) build(columns);
    for (let c = 0; c < columns; c++) fillColumn(c, from + c);
    const column = cells.reads[state.position - from];
    const [left, width] = [column.offsetLeft, scroll.clientWidth];
    if (left < scroll.scrollLeft + 90 || left + 90 > scroll.scrollLeft + width)
      scroll.scrollLeft = left - width / 2;
    showDetail();
    note.textContent =
      (T > columns ? `Positions ${from} to ${from + columns - 1} of ${T}. ` : "") +
      "Colour: the probability of the piece that is shown; underlined: the piece that really " +
      `follows. Small: ${beside ? app.besideModel.name : "its probability"}. `;
  };

  function build(columns) {
    const choose = (c, depth) => {
      chosen = depth;
      app.change({ position: from + c });
    };
    const row = (make) => Array.from({ length: columns }, (_, c) => make(c));
    const word = (c) => el("span.word", { onclick: () => choose(c, chosen) });
    const cell = (depth) => (c) =>
      el("button.cell", { onclick: () => choose(c, depth) }, el("span"), el("small"));
    const depths = Array.from({ length: L + 1 }, (_, depth) => row(cell(depth)));
    cells = { reads: row(word), depths, follows: row(word) };
    table.style.setProperty("--columns", columns);
    refill(
      table,
      el("span.rowname", "reads"),
      cells.reads,
      depths.map((one, depth) => [el("span.rowname", depthName(depth)), one]),
      el("span.rowname", "follows"),
      cells.follows,
    );
  }

  function fillColumn(c, t) {
    const { trace, beside, state } = app;
    const on = t === state.position;
    const ends = t + 1 === trace.shape.T;
    write(cells.reads[c], showPiece(trace.pieces[t]));
    write(cells.follows[c], ends ? "?" : showPiece(trace.pieces[t + 1]));
    cells.reads[c].classList.toggle("on", on);
    cells.follows[c].classList.toggle("on", on);
    cells.depths.forEach((row, depth) => {
      const node = row[c];
      const { rank } = trace.lens[depth];
      const [{ id, p }] = likeliest(trace, depth, t);
      const now = [id, p, t, on && chosen, on, rank[t], beside, paint.layouts];
      if (now.every((value, n) => value === node.shown?.[n])) return;
      node.shown = now;
      const [piece, small] = node.children;
      write(piece, showPiece(app.piece(id)));
      write(small, beside ? besideAt(depth, t) : percent(p));
      tint(node, paint.sequential, p * 0.85);
      node.classList.toggle("on", on);
      node.classList.toggle("hit", rank[t] === 0);
      node.title = `${depth ? `after layer ${depth - 1}` : "embedding"}, position ${t}`;
      node.tabIndex = on && depth === depthNow() ? 0 : -1;
    });
  }

  /** What the model beside says at a depth; its last stands beside the last, if it has another
      number of layers. */
  function besideAt(depth, t) {
    const other = app.beside.shape.L;
    if (depth !== L && depth >= other) return "";
    const [{ id }] = likeliest(app.beside, depth === L ? other : depth, t);
    return showPiece(app.piece(id));
  }

  function showDetail() {
    const { trace, beside, state } = app;
    const [depth, t] = [depthNow(), state.position];
    const where = depth ? `After layer ${depth - 1}` : "From the embedding alone";
    const theirs = beside && (depth === L ? beside.shape.L : Math.min(depth, beside.shape.L));
    refill(
      detail,
      el("h3", `${where}, position ${t} ${quoted(trace.pieces[t])}`),
      el(
        "div.two.three",
        showTop(app, trace, depth, el("p.legend.this", "the likeliest")),
        beside && showTop(app, beside, theirs, el("p.legend.beside", app.besideModel.name)),
        t + 1 < trace.shape.T
          ? followers(t)
          : el("p.note", "The text ends here: nothing follows yet."),
      ),
    );
  }

  /** The token that really follows, as each layer sees it coming. */
  function followers(t) {
    const { lens, pieces, shape } = app.trace;
    const most = Math.max(...lens.map(({ follows }) => follows[t]));
    const told = `what follows, ${quoted(pieces[t + 1])}: its rank of ${count(shape.V)}, its probability`;
    const bars = lens.map(({ rank, follows }, depth) =>
      barRow(`${depthName(depth)} #${rank[t] + 1}`, follows[t], { most }),
    );
    return el("div", el("p.legend", told), el("div.bars", bars));
  }
  return { update };
}

/** What a trace has at a depth as the likeliest tokens after the selected position, as bars below a
    heading, in the second colour if it is that of the model beside. */
function showTop(app, trace, depth, heading) {
  const t = app.state.position;
  const bars = tokenBars(app, likeliest(trace, depth, t), { follows: following(trace, t) });
  return el("div", heading, el("div.bars", { class: trace === app.beside && "besides" }, bars));
}
