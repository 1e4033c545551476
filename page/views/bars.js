// Bars of probabilities, and the numbers of a trace that several views show in them.

/** The likeliest tokens after position t as the stream at a depth has them, [{id, p}]: depth 0 is
    the embedding, depth L what the model says in the end. */
function likeliest(trace, depth, t) {
  const { ids, p } = trace.lens[depth];
  const n = ids.length / trace.shape.T;
  return Array.from({ length: n }, (_, i) => ({ id: ids[t * n + i], p: p[t * n + i] }));
}

/** The probabilities after position t over the whole vocabulary, as sampling `settings` leave
    them. */
function probabilities(trace, t, settings = {}) {
  const { V } = trace.shape;
  return engine.filterProbabilities(trace.logits.subarray(t * V, (t + 1) * V), settings);
}

/** The id of the token that follows position t in the text, or −1 at its end. */
const following = (trace, t) => (t + 1 < trace.shape.T ? trace.ids[t + 1] : -1);

/** A line of a bar chart: name, bar, percentage; `second` is the probability beside it. */
function barRow(name, p, { second = null, hit = false, most = 1, onclick = null, title } = {}) {
  const bar = el("span.fill");
  bar.style.width = `${(100 * p) / most}%`;
  const other = el("span.fill.second");
  if (second !== null) other.style.width = `${(100 * second) / most}%`;
  return el(
    onclick ? "button" : "div",
    { class: hit ? "barrow hit" : "barrow", onclick, title, type: onclick ? "button" : null },
    el("span.name", name),
    el("span.track", bar, second !== null && other),
    el("span.value", percent(p), second !== null && el("small", percent(second))),
  );
}

/** A bar for each of the tokens, [{id, p, second}], as long as it is likely beside the likeliest or
    `most`; the one that `follows` is marked. `more(id)` gives further options of barRow. */
function tokenBars(app, tokens, { most, follows = -1, more = () => ({}) } = {}) {
  const longest = Math.max(...tokens.map(({ p, second }) => Math.max(p, second ?? 0)));
  return tokens.map(({ id, p, second }) => {
    const options = { most: most ?? longest, second, hit: id === follows, ...more(id) };
    return barRow(showPiece(app.piece(id)), p, options);
  });
}

/** A named figure of a list of such; `second` is that of the model beside. */
function fact(name, value, { second = null, title = null } = {}) {
  const other = second !== null && el("span.second", second);
  return el("div", { title }, el("dt", name), el("dd", value, other));
}

Object.assign(globalThis, { barRow, fact, following, likeliest, probabilities, tokenBars });
