// Charts over the steps of training.

/** Axes over training: steps logarithmic, values from low to high; returns x(step) and y(value). */
function axes(context, width, height, lastStep, low, high) {
  const [left, bottom, top, right] = [38, 20, 8, 14];
  const x = (step) =>
    left + ((width - left - right) * Math.log1p(step)) / Math.log1p(lastStep || 1);
  const y = (v) => top + (height - top - bottom) * (1 - (v - low) / (high - low || 1));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (const v of roundTicks(low, high)) {
    context.fillStyle = paint.soft;
    context.fillText(num(v, 2), 0, y(v));
    context.fillStyle = paint.line;
    context.fillRect(left, y(v), width - left - right, 1);
  }
  context.fillStyle = paint.soft;
  context.textAlign = "center";
  for (const s of [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000, 300000])
    if (s <= lastStep) context.fillText(count(s), x(s), height - 8);
  context.textAlign = "left";
  return { x, y };
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

function polyline(context, points, colour, width, alpha = 1) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.globalAlpha = alpha;
  context.lineJoin = "round";
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  context.stroke();
  context.globalAlpha = 1;
}

function cursor(context, x, height) {
  context.fillStyle = paint.ink;
  context.fillRect(x - 0.75, 0, 1.5, height - 18);
}

/** The loss curve of metrics.jsonl with a cursor at the snapshot; a click goes to the nearest. */
function makeLossChart(app, models) {
  const canvas = el("canvas.losses", { role: "img" });
  const caption = el("figcaption");
  const node = el("figure", canvas, caption);
  const { metrics } = app.data;
  const train = metrics.filter((m) => Number.isFinite(m.loss) && m.step > 0);
  const held = metrics.filter((m) => Number.isFinite(m.val_loss));
  const widthNow = widthOf(node, 600);
  let place = null;

  function draw() {
    if (!train.length && !held.length) {
      canvas.hidden = true;
      caption.textContent = "No metrics.jsonl beside this checkpoint: its loss curve is not known.";
      return;
    }
    const [width, height] = [widthNow(), 210];
    const context = fit(canvas, width, height);
    const losses = [...train.map((m) => m.loss), ...held.map((m) => m.val_loss)];
    const last = Math.max(...metrics.map((m) => m.step ?? 0), models.at(-1)?.model.step ?? 0);
    const low = Math.min(...losses);
    place = axes(
      context,
      width,
      height,
      last,
      Math.floor(low * 2) / 2,
      Math.ceil(Math.max(...losses)),
    );
    polyline(
      context,
      train.map((m) => [place.x(m.step), place.y(m.loss)]),
      paint.this,
      2,
    );
    context.fillStyle = paint.beside;
    for (const m of held) {
      context.beginPath();
      context.arc(place.x(m.step), place.y(m.val_loss), 4, 0, 7);
      context.fill();
    }
    context.fillStyle = paint.soft;
    for (const { model } of models)
      context.fillRect(place.x(model.step ?? 0) - 0.5, height - 24, 1, 6);
    const now = app.data.models[app.state.model];
    if (now.group === "run") cursor(context, place.x(now.step ?? 0), height);
    const at = train.findLast((m) => m.step <= (now.step ?? 0)) ?? train[0];
    canvas.setAttribute(
      "aria-label",
      `Training loss, ${num(train[0]?.loss)} at first, ` + `${num(train.at(-1)?.loss)} at the end`,
    );
    caption.replaceChildren(
      el("b.this", "Line"),
      ": loss in training; ",
      el("b.beside", "dots"),
      ": on held-out text; ticks: snapshots. The steps are " +
        "spaced logarithmically." +
        (at && now.group === "run"
          ? ` At step ${count(now.step ?? 0)} the loss was about ${num(at.loss)} nats.`
          : ""),
    );
  }
  canvas.addEventListener("click", (event) => {
    if (!place) return;
    const x = event.clientX - canvas.getBoundingClientRect().left;
    const distance = ({ model }) => Math.abs(place.x(model.step ?? 0) - x);
    const nearest = models.reduce((best, one) => (distance(one) < distance(best) ? one : best));
    app.change({ model: nearest.index });
  });
  return { node, draw };
}

Object.assign(globalThis, { axes, cursor, makeLossChart, polyline, roundTicks });
