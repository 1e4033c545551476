// The model at a glance: the text goes in at the left, the next token comes out at the right.

const FLOW_HEIGHT = 236; // pixels of the pictures of the residual stream
const MANY = 5; // layers, above which columns are narrow and show the mean of their heads
const SHARP = 256; // numbers in a row up to which each is drawn; more are averaged by the browser

/** Build the section: pictures of the residual stream, a row for each position, and above them what
    attention and feed-forward add; all of them can be clicked. */
function makeFlow(app, root) {
  const tokens = el("canvas.flowtokens", { role: "img" });
  const layers = el("div.flow", { role: "group", "aria-label": "The model at a glance" });
  const next = el("div.bars");
  const note = el("p.note");
  const follow = makeFollow(app, layers);
  root.append(el("div.flowbox", layers), follow.node, note);
  let [columns, shape] = [[], ""];

  const update = (names) => {
    const { trace, state } = app;
    const { L, H } = trace.shape;
    if (shape !== `${L} ${H}`) build(L, H);
    shape = `${L} ${H}`;
    const redraw = names.has("trace") || names.has("theme");
    if (redraw) drawPictures();
    drawTokens();
    for (const { node, mark, layer, heads } of columns) {
      mark.style.top = `${(100 * state.position) / trace.shape.T}%`;
      mark.style.height = `${100 / trace.shape.T}%`;
      node.classList.toggle("on", layer === state.layer);
      for (const { button, head } of heads) {
        const on = layer === state.layer && [ALL, state.head].includes(head);
        button.setAttribute("aria-pressed", String(on));
      }
    }
    showNext();
    follow.update();
    note.textContent =
      `Each large picture is the residual stream: a row is a position, its ${trace.shape.C} numbers ` +
      "from left to right, blue below zero, orange above, each picture with its own scale. The " +
      `frame marks ${quoted(trace.pieces[state.position])}. Above: where each head looks, and what ` +
      "the feed-forward network computes; both are added to the stream.";
  };

  function build(L, H) {
    const heads = L > MANY ? [ALL] : [...Array(H).keys()];
    columns = [makeColumn(-1, []), ...Array.from({ length: L }, (_, l) => makeColumn(l, heads))];
    layers.style.setProperty("--layers", L);
    layers.classList.toggle("many", L > MANY);
    layers.style.setProperty("--height", `${FLOW_HEIGHT}px`);
    layers.replaceChildren(
      el(
        "div.flowcolumn",
        el("p.note", "Above the stream: attention heads, feed-forward network"),
        el("p.columnname", "tokens"),
        tokens,
      ),
      ...columns.map(({ node }) => node),
      el("div.flowcolumn.flownext", el("div.parts"), el("p.columnname", "next token"), next),
    );
  }

  /** The embedding (layer −1) or a block: its parts above, the stream after it below. */
  function makeColumn(layer, shown) {
    const [stream, hidden, mark] = [el("canvas"), el("canvas"), el("i.mark")];
    const heads = shown.map((head) => {
      const canvas = el("canvas");
      const button = el(
        "button",
        {
          "aria-label": head === ALL ? `Layer ${layer}, mean of all heads` : headName(layer, head),
          title: head === ALL ? `layer ${layer}` : headName(layer, head),
          onclick: () => app.change(head === ALL ? { layer } : { layer, head }),
        },
        canvas,
      );
      return { button, canvas, head };
    });
    const grid = el(
      "div.flowheads",
      heads.map(({ button }) => button),
    );
    grid.style.setProperty("--side", Math.ceil(Math.sqrt(heads.length)));
    const name = layer < 0 ? "embedding" : `after block ${layer}`;
    const short = app.config().n_layers > MANY ? String(layer) : name;
    const picture = el(
      "button.stream",
      { "aria-label": `Residual ${name}`, onclick: (event) => pick(event, layer) },
      stream,
      mark,
    );
    const node = el(
      "div.flowcolumn",
      el("div.parts", layer >= 0 && [grid, hidden]),
      el("p.columnname", { title: name }, layer < 0 ? name : short),
      picture,
      follow.station(layer),
    );
    return { node, layer, heads, stream, hidden, mark };
  }

  function pick(event, layer) {
    const box = event.currentTarget.getBoundingClientRect();
    const { T } = app.trace.shape;
    const position = event.detail // 0 for the keyboard, which has no place
      ? Math.min(T - 1, Math.floor(((event.clientY - box.top) / box.height) * T))
      : app.state.position;
    app.change(layer < 0 ? { position } : { position, layer });
  }

  function drawPictures() {
    const { trace } = app;
    const { C, hidden } = trace.shape;
    for (const column of columns) {
      const block = trace.blocks[column.layer];
      drawNumbers(column.stream, trace, block ? block.out : trace.embed, C);
      if (block) drawNumbers(column.hidden, trace, block.hidden, hidden);
      for (const { canvas, head } of column.heads) drawHead(canvas, trace, column.layer, head);
    }
  }

  /** Rows of numbers as pixels, in the colours of the strips. */
  function drawNumbers(canvas, trace, values, width) {
    const scale = magnitude(values);
    canvas.classList.toggle("sharp", width <= SHARP);
    drawTrace(canvas, trace, scale, width, paint.diverging, (r, c) => {
      const v = values[r * width + c] / scale;
      return v < 0 ? 0.5 - 0.5 * Math.sqrt(-v) : 0.5 + 0.5 * Math.sqrt(v);
    });
  }

  /** The tokens as rows, with their text where there is room, else that of the selected one. */
  function drawTokens() {
    const { trace, state } = app;
    const { T } = trace.shape;
    const width = 104;
    const context = fit(tokens, width, FLOW_HEIGHT);
    const [row, { nats }] = [FLOW_HEIGHT / T, app.scores(trace)];
    context.font = `12px ${paint.mono}`;
    context.textBaseline = "middle";
    for (let i = 0; i < T; i++) {
      const t = i ? Math.min(1, nats[i - 1] / SURPRISED) : 0;
      context.fillStyle = shade(paint.surprisal, t);
      const top = Math.round(i * row);
      context.fillRect(0, top, width, Math.round((i + 1) * row) - top - (row > 4 ? 1 : 0));
      if (row < 12) continue;
      context.fillStyle = inkOn(paint.surprisal, t);
      context.fillText(showPiece(trace.pieces[i]), 6, (i + 0.5) * row, width - 12);
    }
    const y = Math.max(9, Math.min(FLOW_HEIGHT - 9, (state.position + 0.5) * row));
    if (row < 12) {
      context.fillStyle = paint.paper;
      context.fillRect(0, y - 9, width, 18);
      context.fillStyle = paint.ink;
      context.fillText(showPiece(trace.pieces[state.position]), 6, y, width - 12);
    }
    context.strokeStyle = paint.ink;
    context.lineWidth = 2;
    if (row < 12) context.strokeRect(1, y - 9, width - 2, 18);
    else context.strokeRect(1, state.position * row + 1, width - 2, row - 2);
    tokens.setAttribute(
      "aria-label",
      `${T} tokens, ${quoted(trace.pieces[state.position])} selected`,
    );
  }

  function showNext() {
    const { trace, beside, state } = app;
    const t = state.position;
    const [p, other] = [probabilities(trace, t), beside && probabilities(beside, t)];
    const top = engine.largest(p, 9).map((id) => ({ id, p: p[id], second: other?.[id] ?? null }));
    next.replaceChildren(...tokenBars(app, top, { follows: following(trace, t) }));
  }
  tokens.addEventListener("click", (event) => pick(event, -1));
  return { update };
}

Object.assign(globalThis, { makeFlow });
