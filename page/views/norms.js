// How long the vector of a position is, and what each part adds to it.

function makeNorms(app) {
  const canvas = el("canvas", { role: "img" });
  const caption = el("figcaption");
  const node = el("figure.norms", canvas, caption);
  const widthNow = widthOf(node, 600);

  function read(trace, t) {
    const length = (values) => lengthOf(values, trace.shape.C, t);
    const stream = [length(trace.embed)];
    const parts = [];
    for (const block of trace.blocks) {
      stream.push(length(block.middle), length(block.out));
      parts.push(length(block.attention_out), length(block.ffwd_out));
    }
    return { stream, parts };
  }

  function update() {
    const { trace, beside, state } = app;
    const t = state.position;
    const { stream, parts } = read(trace, t);
    const other = beside && t < beside.shape.T ? read(beside, t).stream : [];
    const width = widthNow();
    const slot = (width - 52) / stream.length; // pixels of one value
    const every = Math.ceil(17 / slot); // layers from one name to the next
    const names = [[0.5 / stream.length, "embed"]];
    for (let i = 1; i < stream.length; i++) {
      const layer = Math.floor((i - 1) / 2);
      if (layer % every || (i % 2 === 0 && slot < 30)) continue;
      const name = i % 2 ? "attention" : "ffwd";
      names.push([(i + 0.5) / stream.length, `${slot > 54 ? `${name} ` : name[0]}${layer}`]);
    }
    const most = Math.max(...stream, ...parts, ...other) * 1.08;
    const { context, x, y } = axes(canvas, [width, 150], [0, most], names);
    const points = (values) => values.map((v, i) => [x((i + 0.5) / values.length), y(v)]);
    parts.forEach((v, i) => {
      context.fillStyle = i % 2 ? paint.line : paint.soft;
      const wide = Math.min(28, slot / 2);
      context.fillRect(x((i + 1.5) / stream.length) - wide / 2, y(v), wide, y(0) - y(v));
    });
    polyline(context, points(other), paint.beside, { dash: [4, 3], dots: true });
    polyline(context, points(stream), paint.this, { dots: true });
    const told = stream.map((v) => num(v, 2)).join(", ");
    canvas.setAttribute("aria-label", `Norm of the residual stream: ${told}`);
    refill(
      caption,
      el("b", "Residual stream. "),
      `Line: the length of ${quoted(trace.pieces[t])}'s vector from the embedding on; bars: the ` +
        "length of what each attention (dark) and feed-forward network (pale) adds to it.",
      beside && ` Dashed: the line of ${app.besideModel.name}.`,
    );
  }
  return { node, update };
}

/** The length of row i of rows. */
const lengthOf = (rows, width, i) => engine.rowNorms(rowOf(rows, width, i), 1)[0];
