// One cell of an attention map in numbers, and the rotation that puts positions into it.

/** A head's vectors at the selected query and key: q, k, v and so on, and the group of k and v. */
function headVectors(app) {
  const { trace, state } = app;
  const { T, H, K, D, Dv } = trace.shape;
  const { layer, head, position, key } = state;
  const block = trace.blocks[layer];
  const group = Math.floor((head * K) / H);
  const cut = (values, h, t, width) =>
    values.subarray((h * T + t) * width, (h * T + t + 1) * width);
  return {
    group,
    q: cut(block.q, head, position, D),
    k: cut(block.k, group, key, D),
    v: cut(block.v, group, key, Dv),
    qBefore: cut(block.q_before, head, position, D),
    kBefore: cut(block.k_before, group, key, D),
    weights: block.attention.subarray((head * T + position) * T, (head * T + position + 1) * T),
    keyAt: (t) => cut(block.k, group, t, D),
    read: block.heads.subarray((position * H + head) * Dv, (position * H + head + 1) * Dv),
  };
}

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);

/** The worked cell: q·k, √D, mask, softmax, times v. */
function makeWorked(app) {
  const strips = ["q", "k", "q ⊙ k", "v", "weight · v", "sum"].map((name) => ({
    name,
    strip: makeStrip(() => {}),
  }));
  const line = () => el("p.mono");
  const [lines, title] = [[line(), line(), line(), line(), line(), line()], el("h3")];
  const [q, k, qk, v, wv, sum] = strips.map(({ name, strip }) =>
    el("div.named", el("span.label", name), strip.node),
  );
  const part = (text, ...rest) => el("li", el("b", text), ...rest);
  const node = el(
    "div.worked",
    title,
    el(
      "ol",
      part("How well do they match? ", q, k, qk, lines[0]),
      part("Divide by √D, so that wide heads are no louder. ", lines[1]),
      part("Mask. ", lines[2]),
      part("Softmax over what is left. ", lines[3]),
      part("Take so much of its value. ", v, wv, sum, lines[4]),
    ),
  );

  function update() {
    const { trace, state } = app;
    const { T, D } = trace.shape;
    const { position, key } = state;
    const h = headVectors(app);
    const product = h.q.map((x, i) => x * h.k[i]);
    const score = dot(h.q, h.k);
    const scores = Array.from(
      { length: position + 1 },
      (_, t) => dot(h.q, h.keyAt(t)) / Math.sqrt(D),
    );
    const most = Math.max(...scores);
    const total = scores.reduce((s, x) => s + Math.exp(x - most), 0);
    const weight = h.weights[key];
    const taken = h.v.map((x) => x * weight);
    const both = Math.max(magnitude(h.q), magnitude(h.k));
    const values = Math.max(magnitude(h.v), magnitude(h.read));
    const vectors = [h.q, h.k, product, h.v, taken, h.read];
    const scales = [both, both, magnitude(product), values, values, values];
    strips.forEach(({ name, strip }, i) =>
      strip.draw(vectors[i], { label: name, scale: scales[i] }),
    );
    const [query, read] = [quoted(trace.pieces[position]), quoted(trace.pieces[key])];
    title.textContent = `One cell, worked: position ${position} ${query} reads ${key} ${read}`;
    const terms = engine
      .largest(product.map(Math.abs), 3)
      .map((i) => `${num(h.q[i])} × ${num(h.k[i])}`);
    lines[0].textContent =
      `q · k = ${terms.join(" + ")} + … = ${num(score, 4)}` +
      (h.group !== state.head && trace.shape.K < trace.shape.H
        ? `   (k and v of group ${h.group}, shared by ${trace.shape.H / trace.shape.K} heads)`
        : "");
    lines[1].textContent = `${num(score, 4)} / √${D} = ${num(scores[key], 4)}`;
    lines[2].textContent =
      position === T - 1
        ? "this is the last position: nothing comes later, nothing is masked"
        : `positions ${position + 1} to ${T - 1} come later: their scores become −∞`;
    lines[3].textContent =
      `e^(${num(scores[key], 4)} − ${num(most, 4)}) / ${num(total, 4)} = ` +
      `${num(Math.exp(scores[key] - most) / total)}   (the map has ${num(weight)}; ` +
      `the sum runs over ${position + 1} position${position ? "s" : ""})`;
    lines[4].textContent =
      `${num(weight)} · v, and the same for all positions; the sum is what the ` + "head hands on";
  }
  return { node, update };
}

Object.assign(globalThis, { headVectors, makeWorked });
