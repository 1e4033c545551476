// Bars of probabilities, and the numbers of a trace that several views show in them.

/** Row i of rows of numbers. */
const rowOf = (values, width, i) => values.subarray(i * width, (i + 1) * width);

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
  return engine.filterProbabilities(rowOf(trace.logits, trace.shape.V, t), settings);
}

/** The id of the token that follows position t in the text, or −1 at its end. */
const following = (trace, t) => (t + 1 < trace.shape.T ? trace.ids[t + 1] : -1);

function bar(part, kind = "fill") {
  const node = el(`span.${kind}`);
  node.style.width = `${Math.max(0, 100 * part)}%`;
  return node;
}

/** A line of a bar chart: a name, a bar as long as p is beside `most`, and `value`, or else p in per
    cent; `second` is the probability beside it. `kind` is its class. */
function barRow(name, p, options = {}) {
  const { kind = "barrow", value = percent(p), most = 1, second = null } = options;
  const { hit = false, onclick = null, title } = options;
  const both = second !== null;
  return el(
    `${onclick ? "button" : "div"}.${kind}`,
    { class: hit && "hit", onclick, title },
    el("span.name", name),
    el("span.track", bar(p / most), both && bar(second / most, "fill.second")),
    el("span.value", value, both && el("small", percent(second))),
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
