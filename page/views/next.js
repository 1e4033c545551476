// The next token: its probabilities under the sampling settings.

/** Build the section. */
function makeNext(app, root) {
  const title = el("h3");
  const legend = el("p.legend");
  const bars = el("div.bars.wide");
  const curve = el("canvas.curve", { role: "img" });
  const caption = el("p.note");
  const facts = el("dl.facts");
  const set = (name) => (value) =>
    app.change({ settings: { ...app.state.settings, [name]: value } });
  // The slider of top-k is logarithmic: 0 is off, then 1 to the whole vocabulary.
  const V = app.config().vocab_size;
  const kOf = (x) => (x >= 100 ? 0 : Math.round(V ** (x / 100)));
  const sliders = {
    temperature: slider(
      "temperature",
      { min: 0, max: 2, step: 0.05, value: 1 },
      (v) => (v ? v.toFixed(2) : "0, greedy"),
      set("temperature"),
    ),
    top_k: slider(
      "top-k",
      { min: 0, max: 100, step: 1, value: 100 },
      (x) => (kOf(x) ? count(kOf(x)) : "off"),
      (x) => set("top_k")(kOf(x)),
    ),
    top_p: slider(
      "top-p",
      { min: 0.01, max: 1, step: 0.01, value: 1 },
      (v) => (v < 1 ? v.toFixed(2) : "off"),
      set("top_p"),
    ),
    min_p: slider(
      "min-p",
      { min: 0, max: 1, step: 0.01, value: 0 },
      (v) => (v ? v.toFixed(2) : "off"),
      set("min_p"),
    ),
  };
  const reset = el(
    "button.quiet",
    { onclick: () => app.change({ settings: { temperature: 1, top_k: 0, top_p: 1, min_p: 0 } }) },
    "all as the model says",
  );
  const write = makeWrite(app);
  const side = el(
    "div",
    Object.values(sliders).map((s) => s.node),
    reset,
    facts,
    curve,
    caption,
  );
  const widthNow = widthOf(side, 300);
  root.append(title, el("div.two", el("div", legend, bars), side), write.node);

  const update = (names) => {
    if (names.has("error")) return;
    const { trace, beside, state } = app;
    const t = state.position;
    showSettings(state.settings);
    const { V: vocabulary, T } = trace.shape;
    const raw = probabilities(trace, t);
    const left = probabilities(trace, t, state.settings);
    const other = beside && probabilities(beside, t, state.settings);
    const changed =
      state.settings.temperature !== 1 ||
      state.settings.top_k > 0 ||
      state.settings.top_p < 1 ||
      state.settings.min_p > 0;
    const second = other ?? (changed ? raw : null);
    const tokens = engine
      .largest(left, 14)
      .filter((id) => left[id] > 0)
      .map((id) => ({ id, p: left[id], second: second && second[id] }));
    title.textContent =
      `After ${t === T - 1 ? "the last token" : `position ${t}`}, ` + quoted(trace.pieces[t]);
    legend.textContent =
      (second ? `Thin bar: ${other ? app.besideModel.name : "before the sliders"}. ` : "") +
      "Click one to let the text go on with it from here.";
    const more = (id) => ({
      title: `id ${id}, logit ${num(trace.logits[t * vocabulary + id])}`,
      onclick: () => app.frozen() || app.setIds([...app.ids.slice(0, t + 1), id]),
    });
    bars.replaceChildren(...tokenBars(app, tokens, { follows: following(trace, t), more }));
    const n = left.reduce((sum, p) => sum + (p > 0), 0);
    facts.replaceChildren(
      fact("entropy", `${num(engine.entropy(left))} nats`, { title: "of what is drawn from" }),
      fact("as unsure as among", `${num(Math.exp(engine.entropy(left)))} tokens`, {
        title: "e to the entropy",
      }),
      fact("tokens left", `${count(n)} of ${count(vocabulary)}`, { title: "the nucleus" }),
      fact("before the sliders", `${num(engine.entropy(raw))} nats`, {
        title: "the model's own entropy",
      }),
    );
    drawCurve(curve, widthNow(), raw, left, n);
    caption.textContent =
      "All tokens of the vocabulary, likeliest at the left, both axes " +
      "logarithmic; filled: those that are left to draw from.";
    write.update(names);
  };
  function showSettings({ temperature, top_k, top_p, min_p }) {
    sliders.temperature.set(temperature);
    if (kOf(Number(sliders.top_k.input.value)) !== top_k)
      sliders.top_k.set(top_k ? Math.round((100 * Math.log(top_k)) / Math.log(V)) : 100);
    sliders.top_p.set(top_p);
    sliders.min_p.set(min_p);
  }
  return { update };
}

/** Probability by rank over the whole vocabulary, with the part that is left filled. */
function drawCurve(canvas, width, raw, left, n) {
  const [height, base] = [130, 16];
  const context = fit(canvas, width, height);
  const sorted = Float32Array.from(raw).sort().reverse();
  const V = sorted.length;
  const low = -8;
  const x = (rank) => (width * Math.log(rank + 1)) / Math.log(V + 1);
  const y = (p) => (height - base) * Math.min(1, Math.log10(Math.max(p, 1e-12)) / low);
  const ranks = [];
  for (let r = 0; r < V; r = Math.max(r + 1, Math.floor(r * 1.03))) ranks.push(r);
  context.fillStyle = paint.line;
  context.strokeStyle = paint.this;
  context.lineWidth = 2;
  const path = (until) => {
    context.beginPath();
    context.moveTo(0, height - base);
    for (const r of ranks) if (r < until) context.lineTo(x(r), y(sorted[r]));
    if (until < V) context.lineTo(x(until), y(sorted[until - 1]));
    context.lineTo(x(Math.min(until, V)), height - base);
    context.closePath();
  };
  path(V);
  context.fill();
  context.fillStyle = paint.this;
  path(n);
  context.fill();
  context.fillStyle = paint.soft;
  context.font = "11px system-ui, sans-serif";
  for (const r of [1, 10, 100, 1000, 10000])
    if (r <= V)
      context.fillText(r.toLocaleString("en-US"), Math.min(x(r - 1) + 1, width - 34), height - 3);
  [context.fillStyle, context.strokeStyle, context.lineWidth] = [paint.ink, paint.paper, 4];
  for (const p of [0, 2, 4, 6]) {
    const [name, top] = [p ? `10⁻${"⁰¹²³⁴⁵⁶"[p]}` : "1", y(10 ** -p) + (p ? 4 : 11)];
    context.strokeText(name, width - 28, top); // a rim, for it lies on the filled part
    context.fillText(name, width - 28, top);
  }
  canvas.setAttribute("aria-label", `Probability by rank; ${n} of ${V} tokens are left`);
}

Object.assign(globalThis, { makeNext });
