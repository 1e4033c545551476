// How long the vector of a position is, and what each part adds to it.

/** The residual stream's norm from the embedding to the last block, and what each part added. */
function makeNorms(app) {
  const canvas = el("canvas", { role: "img" });
  const caption = el("figcaption");
  const node = el("figure.norms", canvas, caption);
  const widthNow = widthOf(node, 600);

  /** The length of a position's vector. */
  const length = (values, C, t) => engine.rowNorms(values.subarray(t * C, (t + 1) * C), 1)[0];
  function read(trace, t) {
    const { C } = trace.shape;
    const stream = [length(trace.embed, C, t)];
    const parts = [];
    for (const block of trace.blocks) {
      stream.push(length(block.middle, C, t), length(block.out, C, t));
      parts.push(length(block.attention_out, C, t), length(block.ffwd_out, C, t));
    }
    return { stream, parts };
  }

  function update() {
    const { trace, beside, state } = app;
    const t = state.position;
    const { stream, parts } = read(trace, t);
    const other = beside && t < beside.shape.T ? read(beside, t).stream : [];
    const [width, height, left, bottom] = [widthNow(), 150, 34, 22];
    const context = fit(canvas, width, height);
    const most = Math.max(...stream, ...parts, ...other) * 1.08;
    const x = (i, n = stream.length) => left + ((width - left - 12) * (i + 0.5)) / n;
    const y = (v) => height - bottom - ((height - bottom - 8) * v) / most;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.fillStyle = paint.soft;
    for (const v of roundTicks(0, most)) {
      context.fillText(num(v, 2), 0, y(v));
      context.globalAlpha = 0.25;
      context.fillRect(left, y(v), width - left, 1);
      context.globalAlpha = 1;
    }
    const slot = (width - left - 12) / stream.length;
    parts.forEach((v, i) => {
      context.fillStyle = i % 2 ? paint.line : paint.soft;
      context.fillRect(
        x(i + 1) - Math.min(14, slot / 4),
        y(v),
        Math.min(28, slot / 2),
        y(0) - y(v),
      );
    });
    line(other, paint.beside, [4, 3]);
    line(stream, paint.this, []);
    context.fillStyle = paint.soft;
    context.textAlign = "center";
    const every = Math.ceil(34 / (2 * slot));
    context.fillText("embed", x(0), height - 8);
    for (let l = 0; l < trace.shape.L; l += every) {
      context.fillText(slot > 54 ? `attention ${l}` : `a${l}`, x(2 * l + 1), height - 8);
      if (slot > 30) context.fillText(slot > 54 ? `ffwd ${l}` : `f${l}`, x(2 * l + 2), height - 8);
    }
    context.textAlign = "left";
    canvas.setAttribute(
      "aria-label",
      `Norm of the residual stream: ${stream.map((v) => num(v, 2)).join(", ")}`,
    );
    caption.replaceChildren(
      el("b", "Residual stream. "),
      `Line: the length of ${quoted(trace.pieces[t])}'s vector from the embedding on; bars: the ` +
        "length of what each attention (dark) and feed-forward network (pale) adds to it." +
        (beside ? ` Dashed: the line of ${app.besideModel.name}.` : ""),
    );

    function line(values, colour, dash) {
      if (!values.length) return;
      context.strokeStyle = context.fillStyle = colour;
      context.lineWidth = 2;
      context.setLineDash(dash);
      context.beginPath();
      values.forEach((v, i) => context.lineTo(x(i, values.length), y(v)));
      context.stroke();
      context.setLineDash([]);
      values.forEach((v, i) => {
        context.beginPath();
        context.arc(x(i, values.length), y(v), 3, 0, 7);
        context.fill();
      });
    }
  }
  return { node, update };
}

Object.assign(globalThis, { makeNorms });
