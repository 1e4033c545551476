// Charts: axes and lines, and the loss curve of a run.

/** Draw axes on a canvas: lines at round numbers from low to high, which `name` writes, and below
    them the names of places from 0 to 1, [[place, name]]. Return {context, x(place), y(value)}. */
function axes(canvas, [width, height], [low, high], places, name = (v) => num(v, 2)) {
  const context = fit(canvas, width, height);
  const [left, bottom, top, right] = [38, 20, 8, 14];
  const x = (place) => left + (width - left - right) * place;
  const y = (v) => top + (height - top - bottom) * (1 - (v - low) / (high - low || 1));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (const v of roundTicks(low, high)) {
    context.fillStyle = paint.soft;
    context.fillText(name(v), 0, y(v));
    context.fillStyle = paint.line;
    context.fillRect(left, y(v), width - left - right, 1);
  }
  context.fillStyle = paint.soft;
  context.textAlign = "center";
  for (const [place, text] of places) context.fillText(text, x(place), height - 8);
  context.textAlign = "left";
  return { context, x, y };
}

/** Three to six round numbers between two: multiples of 1, 2 or 5 times a power of ten. */
function roundTicks(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((n) => n * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** Draw a line through [[x, y]]; `dots` marks each of the points. */
function polyline(context, points, colour, { width = 2, alpha = 1, dash = [], dots = false } = {}) {
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = width;
  context.globalAlpha = alpha;
  context.lineJoin = "round";
  context.setLineDash(dash);
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  context.stroke();
  if (dots) for (const point of points) dot(context, point, 3);
  context.globalAlpha = 1;
}

function dot(context, [x, y], radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fill();
}

/** Draw axes over the steps of a run, spaced logarithmically, with a cursor at step `now`.
    Return {context, x(step), y(value)}. */
function axesOverSteps(canvas, size, range, lastStep, now) {
  const place = (step) => Math.log1p(step) / Math.log1p(lastStep || 1);
  const named = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000, 300000]
    .filter((step) => step <= lastStep)
    .map((step) => [place(step), count(step)]);
  const { context, x, y } = axes(canvas, size, range, named);
  context.fillStyle = paint.ink;
  context.fillRect(x(place(now)) - 0.75, 0, 1.5, size[1] - 18);
  return { context, x: (step) => x(place(step)), y };
}

/** The loss curve of metrics.jsonl with a cursor at the snapshot; a click goes to the nearest. */
function makeLossChart(app, models) {
  const canvas = el("canvas.losses", { role: "img" });
  const caption = el("figcaption");
  const node = el("figure", canvas, caption);
  const { metrics } = app.data;
  const train = metrics.filter((m) => Number.isFinite(m.loss) && m.step > 0);
  const held = metrics.filter((m) => Number.isFinite(m.val_loss));
  const losses = [...train.map((m) => m.loss), ...held.map((m) => m.val_loss)];
  const range = [Math.floor(Math.min(...losses) * 2) / 2, Math.ceil(Math.max(...losses))];
  const last = Math.max(...metrics.map((m) => m.step ?? 0), models.at(-1).step);
  const widthNow = widthOf(node, 600);
  let place = null;
  if (!losses.length) {
    canvas.hidden = true;
    caption.textContent = "No metrics.jsonl beside this checkpoint: its loss curve is not known.";
    return { node, draw: () => {} };
  }

  function draw() {
    const now = app.data.models[app.state.model].step ?? 0;
    place = axesOverSteps(canvas, [widthNow(), 210], range, last, now);
    const { context, x, y } = place;
    polyline(
      context,
      train.map((m) => [x(m.step), y(m.loss)]),
      paint.this,
    );
    context.fillStyle = paint.beside;
    for (const m of held) dot(context, [x(m.step), y(m.val_loss)], 4);
    context.fillStyle = paint.soft;
    for (const model of models) context.fillRect(x(model.step) - 0.5, 186, 1, 6);
    const at = train.findLast((m) => m.step <= now) ?? train[0];
    canvas.setAttribute(
      "aria-label",
      `Training loss, ${num(train[0]?.loss)} at first, ${num(train.at(-1)?.loss)} at the end`,
    );
    refill(
      caption,
      el("b.this", "Line"),
      ": loss in training; ",
      el("b.beside", "dots"),
      ": on held-out text; ticks: snapshots. The steps are spaced logarithmically.",
      at && ` At step ${count(now)} the loss was about ${num(at.loss)} nats.`,
    );
  }
  canvas.addEventListener("click", (event) => {
    const from = event.clientX - canvas.getBoundingClientRect().left;
    const distance = (model) => Math.abs(place.x(model.step) - from);
    const nearest = models.reduce((best, one) => (distance(one) < distance(best) ? one : best));
    app.change({ model: nearest.index });
  });
  return { node, draw };
}
