// The next token: its probabilities under the sampling settings.

function makeNext(app, root) {
  const title = el("h3");
  const legend = el("p.legend");
  const bars = el("div.bars.wide");
  const curve = el("canvas.curve", { role: "img" });
  const caption = el(
    "p.note",
    "All tokens of the vocabulary, likeliest at the left, both axes logarithmic; filled: those " +
      "that are left to draw from.",
  );
  const facts = el("dl.facts");
  // The slider of top-k is logarithmic: 1 to the whole vocabulary, where it is off.
  const V = app.config().vocab_size;
  const kOf = (x) => (x >= 100 ? 0 : Math.round(V ** (x / 100)));
  const placeOf = (k) => (k ? (100 * Math.log(k)) / Math.log(V) : 100);
  const unless = (off, name) => (x) => (x === off ? name : x.toFixed(2));
  const ranges = {
    temperature: { min: 0, max: 2, step: 0.05, format: unless(0, "0, greedy") },
    top_k: { min: 0, max: 100, step: 1, format: (x) => (kOf(x) ? count(kOf(x)) : "off") },
    top_p: { min: 0.01, max: 1, step: 0.01, format: unless(1, "off") },
    min_p: { min: 0, max: 1, step: 0.01, format: unless(0, "off") },
  };
  const same = (x) => x;
  const sliders = Object.entries(ranges).map(([name, { min, max, step, format }]) => {
    // The setting at a place of the slider, and the place of a setting.
    const [at, place] = name === "top_k" ? [kOf, placeOf] : [same, same];
    const set = (x) => app.change({ settings: { ...app.state.settings, [name]: at(x) } });
    const made = slider(name.replace("_", "-"), { min, max, step, value: max }, format, set);
    const show = (value) => at(Number(made.input.value)) === value || made.set(place(value));
    return { name, node: made.node, show };
  });
  const restore = () => app.change({ settings: app.plain.settings });
  const reset = el("button.quiet", { onclick: restore }, "all as the model says");
  const nodes = sliders.map(({ node }) => node);
  const side = el("div", nodes, reset, facts, curve, caption);
  const widthNow = widthOf(side, 300);
  root.append(title, el("div.two", el("div", legend, bars), side));

  const update = () => {
    const { trace, beside, state } = app;
    const { position: t, settings } = state;
    for (const { name, show } of sliders) show(settings[name]);
    const raw = probabilities(trace, t);
    const left = probabilities(trace, t, settings);
    const other = beside && probabilities(beside, t, settings);
    const second = other ?? (settings === app.plain.settings ? null : raw);
    const tokens = engine
      .largest(left, 14)
      .filter((id) => left[id] > 0)
      .map((id) => ({ id, p: left[id], second: second && second[id] }));
    const last = t === trace.shape.T - 1;
    title.textContent = `After ${last ? "the last token" : `position ${t}`}, ${quoted(trace.pieces[t])}`;
    legend.textContent =
      (second ? `Thin bar: ${other ? app.besideModel.name : "before the sliders"}. ` : "") +
      (app.frozen ? "" : "Click one to let the text go on with it from here.");
    const goOn = (id) => app.setIds([...app.written().slice(0, app.dropped + t + 1), id]);
    const more = (id) => ({
      title: `id ${id}, logit ${num(trace.logits[t * V + id])}`,
      onclick: app.frozen ? null : () => app.busy || goOn(id),
    });
    refill(bars, tokenBars(app, tokens, { follows: following(trace, t), more }));
    const n = left.reduce((sum, p) => sum + (p > 0), 0);
    const entropy = engine.entropy(left);
    refill(
      facts,
      fact("entropy", `${num(entropy)} nats`, { title: "of what is drawn from" }),
      fact("as unsure as among", `${num(Math.exp(entropy))} tokens`, { title: "e to the entropy" }),
      fact("tokens left", `${count(n)} of ${count(V)}`, { title: "the nucleus" }),
      fact("before the sliders", `${num(engine.entropy(raw))} nats`, {
        title: "the model's own entropy",
      }),
    );
    drawCurve(curve, widthNow(), raw, n);
  };
  return { update };
}

/** Probability by rank over the whole vocabulary, with the `n` tokens that are left filled. */
function drawCurve(canvas, width, raw, n) {
  const sorted = Float32Array.from(raw).sort().reverse();
  const V = sorted.length;
  const place = (rank) => Math.log(rank + 1) / Math.log(V + 1);
  const named = [1, 10, 100, 1000, 10000].filter((rank) => rank <= V);
  const places = named.map((rank) => [place(rank - 1), rank.toLocaleString("en-US")]);
  const power = (v) => (v ? `10⁻${"⁰¹²³⁴⁵⁶⁷⁸"[-v]}` : "1");
  const { context, x, y } = axes(canvas, [width, 130], [-8, 0], places, power);
  const ranks = [];
  for (let r = 0; r < V; r = Math.max(r + 1, Math.floor(r * 1.03))) ranks.push(r);
  const heightOf = (rank) => y(Math.max(-8, Math.log10(sorted[rank])));
  const fillUntil = (end, colour) => {
    context.fillStyle = colour;
    context.beginPath();
    context.moveTo(x(0), y(-8));
    for (const r of ranks.filter((r) => r < end)) context.lineTo(x(place(r)), heightOf(r));
    context.lineTo(x(place(end)), heightOf(end - 1));
    context.lineTo(x(place(end)), y(-8));
    context.fill();
  };
  fillUntil(V, paint.line);
  fillUntil(n, paint.this);
  canvas.setAttribute("aria-label", `Probability by rank; ${n} of ${V} tokens are left`);
}
