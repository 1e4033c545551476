// The selected head in full: its matrix, and its weights as arcs over the text.

/** A head's full matrix; hovering reads it, a click selects query and key. */
function makeMap(app, kind) {
  const canvas = el("canvas", { role: "img", "aria-label": "No such head" });
  const readout = el("p.readout");
  const name = el("p", { class: `legend ${kind}` });
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
    const cell = size / T;
    const [query, at] = hover ?? [position, key];
    context.strokeStyle = paint.ink;
    context.lineWidth = 1.5;
    context.strokeRect(
      0.75,
      query * cell,
      Math.max(2, (query + 1) * cell - 1.5),
      Math.max(2, cell),
    );
    if (at <= query)
      context.strokeRect(at * cell, query * cell, Math.max(2, cell), Math.max(2, cell));
    const weight = trace.blocks[layer].attention[(head * T + query) * T + at];
    readout.textContent =
      `${query} ${quoted(trace.pieces[query])} reads ${at} ` +
      `${quoted(trace.pieces[at])}: ${num(weight)}`;
    canvas.setAttribute(
      "aria-label",
      `Attention of layer ${layer}, head ${head}. ` + readout.textContent,
    );
  }
  function at(event) {
    const box = canvas.getBoundingClientRect();
    const { T } = trace.shape;
    const inside = (v, from) => Math.max(0, Math.min(T - 1, Math.floor(((v - from) / size) * T)));
    const query = inside(event.clientY, box.top);
    return [query, Math.min(query, inside(event.clientX, box.left))];
  }
  canvas.addEventListener("pointermove", (event) => {
    if (!trace) return;
    hover = at(event);
    draw(trace, name.textContent);
    view.onHover(...hover);
  });
  canvas.addEventListener("pointerleave", () => {
    hover = null;
    draw(trace, name.textContent);
    view.onHover(app.state.position, app.state.key);
  });
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

  function show(query, key, layer = app.state.layer, head = app.state.head) {
    const { trace } = app;
    const { T } = trace.shape;
    const row = trace.blocks[layer].attention.subarray(
      (head * T + query) * T,
      (head * T + query + 1) * T,
    );
    while (words.children.length < T) {
      const i = words.children.length;
      words.append(
        el("span", {
          onclick: () => app.change(i <= app.state.position ? { key: i } : { position: i }),
        }),
      );
    }
    while (words.children.length > T) words.lastChild.remove();
    trace.pieces.forEach((piece, i) => {
      const span = words.children[i];
      const text = showPiece(piece);
      if (span.textContent !== text) span.textContent = text;
      const t = i <= query ? weightShade(row[i]) : 0;
      span.style.background = i <= query ? shade(paint.sequential, t) : "transparent";
      span.style.color = i <= query ? inkOn(paint.sequential, t) : "";
      span.className = i === query ? "query" : i === key ? "key" : i > query ? "later" : "";
    });
    drawArcs(query, row);
  }

  function drawArcs(query, row) {
    const box = node.getBoundingClientRect();
    const context = fit(canvas, node.clientWidth, node.clientHeight);
    const place = (i) => {
      const r = words.children[i].getBoundingClientRect();
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

Object.assign(globalThis, { makeArcs, makeMap });
