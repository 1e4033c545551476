// The model at a glance: the text goes in at the left, the next token comes out at the right.

const FLOW_HEIGHT = 236; // pixels of the pictures of the residual stream
const MANY = 5; // layers, above which columns are narrow and show the mean of their heads
const SHARP = 256; // numbers in a row up to which each is drawn; more are averaged by the browser

/** Pictures of the residual stream, a row for each position, and above them what attention and
    feed-forward add; all of them can be clicked. */
function makeFlow(app, root) {
  const tokens = el("canvas.flowtokens", { role: "img" });
  const layers = el("div.flow", { role: "group", "aria-label": "The model at a glance" });
  const next = el("div.bars");
  const note = el("p.note");
  const follow = makeFollow(app, layers);
  root.append(el("div.flowbox", layers), follow.node, note);
  const { n_layers: L, n_heads: H } = app.config();
  const shownHeads = L > MANY ? [ALL] : [...Array(H).keys()];
  const columns = [
    makeColumn(-1, []),
    ...Array.from({ length: L }, (_, layer) => makeColumn(layer, shownHeads)),
  ];
  layers.style.setProperty("--layers", L);
  layers.classList.toggle("many", L > MANY);
  layers.style.setProperty("--height", `${FLOW_HEIGHT}px`);
  const above = el("p.note", "Above the stream: attention heads, feed-forward network");
  refill(
    layers,
    el("div.flowcolumn", above, el("p.columnname", "tokens"), tokens),
    columns.map(({ node }) => node),
    el("div.flowcolumn.flownext", el("div.parts"), el("p.columnname", "next token"), next),
    follow.frame,
  );

  const update = (names) => {
    const { trace, state } = app;
    const { T, C } = trace.shape;
    if (names.has("trace") || names.has("theme")) drawPictures();
    drawTokens();
    for (const { node, mark, layer, heads } of columns) {
      mark.style.top = `${(100 * state.position) / T}%`;
      mark.style.height = `${100 / T}%`;
      node.classList.toggle("on", layer === state.layer);
      for (const { button, head } of heads)
        setPressed(button, layer === state.layer && [ALL, state.head].includes(head));
    }
    showNext();
    follow.update();
    note.textContent =
      `Each large picture is the residual stream: a row is a position, its ${C} numbers ` +
      "from left to right, blue below zero, orange above, each picture with its own scale. The " +
      `frame marks ${quoted(trace.pieces[state.position])}. Above: where each head looks, and what ` +
      "the feed-forward network computes; both are added to the stream.";
  };

  /** The embedding (layer −1) or a block: its parts above, the stream after it below. */
  function makeColumn(layer, shown) {
    const [stream, hidden, mark] = [el("canvas"), el("canvas"), el("i.mark")];
    const heads = shown.map((head) => {
      const canvas = el("canvas");
      const name = head === ALL ? `Layer ${layer}, mean of all heads` : headName(layer, head);
      const onclick = () => app.change(head === ALL ? { layer } : { layer, head });
      const button = el("button", { "aria-label": name, title: name, onclick }, canvas);
      return { button, canvas, head };
    });
    const buttons = heads.map(({ button }) => button);
    const grid = el("div.flowheads", buttons);
    grid.style.setProperty("--side", Math.ceil(Math.sqrt(heads.length)));
    const name = layer < 0 ? "embedding" : `after block ${layer}`;
    const short = layer >= 0 && L > MANY ? String(layer) : name;
    const onclick = (event) => pick(event, layer);
    const node = el(
      "div.flowcolumn",
      el("div.parts", layer >= 0 && [grid, hidden]),
      el("p.columnname", { title: name }, short),
      el("button.stream", { "aria-label": `Residual ${name}`, onclick }, stream, mark),
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
    const at = (row, column) => signedShade(values[row * width + column], scale);
    drawTrace(canvas, trace, scale, width, paint.diverging, at);
  }

  /** The tokens as rows, with their text where there is room, else that of the selected one. */
  function drawTokens() {
    const { trace, state } = app;
    const { T } = trace.shape;
    const selected = state.position;
    const width = 104;
    const context = fit(tokens, width, FLOW_HEIGHT);
    const [row, { nats }] = [FLOW_HEIGHT / T, app.scores(trace)];
    const narrow = row < 12;
    const write = (i, y) => context.fillText(showPiece(trace.pieces[i]), 6, y, width - 12);
    context.font = `12px ${paint.mono}`;
    context.textBaseline = "middle";
    for (let i = 0; i < T; i++) {
      const t = surpriseShade(nats[i - 1]);
      const top = Math.round(i * row);
      context.fillStyle = shade(paint.surprisal, t);
      context.fillRect(0, top, width, Math.round((i + 1) * row) - top - (row > 4 ? 1 : 0));
      context.fillStyle = inkOn(paint.surprisal, t);
      if (!narrow) write(i, (i + 0.5) * row);
    }
    const middle = (selected + 0.5) * row;
    const y = narrow ? Math.max(9, Math.min(FLOW_HEIGHT - 9, middle)) : middle;
    const height = narrow ? 18 : row - 2;
    if (narrow) {
      context.fillStyle = paint.paper;
      context.fillRect(0, y - 9, width, 18);
      context.fillStyle = paint.ink;
      write(selected, y);
    }
    context.strokeStyle = paint.ink;
    context.lineWidth = 2;
    context.strokeRect(1, y - height / 2, width - 2, height);
    const name = `${T} tokens, ${quoted(trace.pieces[selected])} selected`;
    tokens.setAttribute("aria-label", name);
  }

  function showNext() {
    const { trace, beside, state } = app;
    const t = state.position;
    const [p, other] = [probabilities(trace, t), beside && probabilities(beside, t)];
    const top = engine.largest(p, 9).map((id) => ({ id, p: p[id], second: other?.[id] ?? null }));
    refill(next, tokenBars(app, top, { follows: following(trace, t) }));
  }
  tokens.addEventListener("click", (event) => pick(event, -1));
  return { update };
}
