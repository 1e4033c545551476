// The selected head in full: its matrix, and its weights as arcs over the text.

/** A head's full matrix; hovering reads it, a click selects query and key. */
function makeMap(app, kind) {
  const canvas = el("canvas", { role: "img", "aria-label": "No such head" });
  const readout = el("p.readout");
  const name = el("p.legend", { class: kind });
  const node = el("div.map", name, canvas, readout);
  const pixels = el("canvas");
  const view = { node, draw, onHover: () => {} };
  const widthNow = widthOf(node, 380);
  let [trace, size, hover] = [null, 0, null];

  function draw(given, label) {
    trace = given;
    name.textContent = label;
    size = Math.min(380, widthNow());
    const context = fit(canvas, size, size);
    if (!trace) {
      readout.textContent = "This model has no such head.";
      return;
    }
    const { layer, head, position, key } = app.state;
    const { T } = trace.shape;
    drawHead(pixels, trace, layer, head);
    context.imageSmoothingEnabled = T > size;
    context.drawImage(pixels, 0, 0, size, size);
    context.strokeStyle = paint.line;
    context.strokeRect(0.5, 0.5, size - 1, size - 1);
    const [query, at] = hover ?? [position, key];
    const cell = size / T;
    const side = Math.max(2, cell);
    context.strokeStyle = paint.ink;
    context.lineWidth = 1.5;
    context.strokeRect(0.75, query * cell, Math.max(2, (query + 1) * cell - 1.5), side);
    if (at <= query) context.strokeRect(at * cell, query * cell, side, side);
    const weight = trace.blocks[layer].attention[(head * T + query) * T + at];
    readout.textContent =
      `${query} ${quoted(trace.pieces[query])} reads ${at} ` +
      `${quoted(trace.pieces[at])}: ${num(weight)}`;
    const described = `Attention of layer ${layer}, head ${head}. ${readout.textContent}`;
    canvas.setAttribute("aria-label", described);
  }
  function at({ offsetX, offsetY }) {
    const { T } = trace.shape;
    const inside = (v) => Math.max(0, Math.min(T - 1, Math.floor((v / size) * T)));
    return [inside(offsetY), Math.min(inside(offsetY), inside(offsetX))];
  }
  function point(place) {
    hover = place;
    draw(trace, name.textContent);
    view.onHover(...(hover ?? [app.state.position, app.state.key]));
  }
  canvas.addEventListener("pointermove", (event) => trace && point(at(event)));
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("click", (event) => {
    if (!trace) return;
    const [position, key] = at(event);
    app.change({ position, key });
  });
  return view;
}

/** The text with arcs from one position to those it reads, as thick as their weights. */
function makeArcs(app) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const words = el("p.arcwords");
  const node = el("div.arcs", canvas, words);
  const choose = (i) => app.change(i <= app.state.position ? { key: i } : { position: i });

  function show(query, key, layer = app.state.layer, head = app.state.head) {
    const { trace } = app;
    const row = attentionRow(trace, layer, head, query);
    const spans = fillUp(words, trace.shape.T, (i) => el("span", { onclick: () => choose(i) }));
    spans.forEach((span, i) => {
      const later = i > query;
      write(span, showPiece(trace.pieces[i]));
      if (later) span.removeAttribute("style");
      else tint(span, paint.sequential, weightShade(row[i]));
      span.className = i === query ? "query" : i === key ? "key" : later ? "later" : "";
    });
    drawArcs(query, row, spans);
  }

  function drawArcs(query, row, spans) {
    const box = node.getBoundingClientRect();
    const context = fit(canvas, node.clientWidth, node.clientHeight);
    const place = (i) => {
      const r = spans[i].getBoundingClientRect();
      return [r.left - box.left + r.width / 2, r.top - box.top];
    };
    const [x, y] = place(query);
    context.strokeStyle = paint.this;
    context.lineCap = "round";
    for (let key = 0; key < query; key++) {
      if (row[key] < 0.02) continue;
      const [a, b] = place(key);
      const lift = Math.min(26, 8 + Math.abs(x - a) / 12);
      context.lineWidth = Math.max(0.7, 5 * row[key]);
      context.globalAlpha = 0.25 + 0.7 * row[key];
      context.beginPath();
      context.moveTo(x, y);
      context.bezierCurveTo(x, y - lift, a, b - lift, a, b);
      context.stroke();
    }
    context.globalAlpha = 1;
  }
  return { node, show };
}
