// One cell of an attention map in numbers.

/** A head's vectors at the selected query and key: q, k, v and so on, and the group of k and v. */
function headVectors(app) {
  const { trace, state } = app;
  const { H, K, D, Dv } = trace.shape;
  const { layer, head, position, key } = state;
  const block = trace.blocks[layer];
  const group = Math.floor((head * K) / H);
  return {
    group,
    q: rowOf(block.q, D, position * H + head),
    k: rowOf(block.k, D, key * K + group),
    v: rowOf(block.v, Dv, key * K + group),
    qBefore: rowOf(block.q_before, D, position * H + head),
    kBefore: rowOf(block.k_before, D, key * K + group),
    keyAt: (t) => rowOf(block.k, D, t * K + group),
    read: rowOf(block.heads, Dv, position * H + head),
  };
}

const dotProduct = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);

/** The worked cell: q·k, √D, mask, softmax, times v. */
function makeWorked(app) {
  const names = ["q", "k", "q ⊙ k", "v", "weight · v", "sum"];
  const strips = names.map(() => makeStrip(() => {}));
  const named = strips.map(({ node }, i) => el("div.named", el("span.label", names[i]), node));
  const [title, ...lines] = [el("h3"), ...Array.from({ length: 5 }, () => el("p.mono"))];
  const part = (text, ...rest) => el("li", el("b", text), ...rest);
  const node = el(
    "div.worked",
    title,
    el(
      "ol",
      part("How well do they match? ", named.slice(0, 3), lines[0]),
      part("Divide by √D, so that wide heads are no louder. ", lines[1]),
      part("Mask. ", lines[2]),
      part("Softmax over what is left. ", lines[3]),
      part("Take so much of its value. ", named.slice(3), lines[4]),
    ),
  );

  function update() {
    const { trace, state } = app;
    const { T, H, K, D } = trace.shape;
    const { layer, head, position, key } = state;
    const { group, q, k, v, keyAt, read } = headVectors(app);
    const product = q.map((x, i) => x * k[i]);
    const score = dotProduct(q, k);
    const scores = Array.from(
      { length: position + 1 },
      (_, t) => dotProduct(q, keyAt(t)) / Math.sqrt(D),
    );
    const most = Math.max(...scores);
    const total = scores.reduce((s, x) => s + Math.exp(x - most), 0);
    const weight = attentionRow(trace, layer, head, position)[key];
    const both = Math.max(magnitude(q), magnitude(k));
    const values = Math.max(magnitude(v), magnitude(read));
    const vectors = [q, k, product, v, v.map((x) => x * weight), read];
    const scales = [both, both, magnitude(product), values, values, values];
    strips.forEach((strip, i) => strip.draw(vectors[i], { label: names[i], scale: scales[i] }));
    title.textContent =
      `One cell, worked: position ${position} ${quoted(trace.pieces[position])} reads ` +
      `${key} ${quoted(trace.pieces[key])}`;
    const largest = engine.largest(product.map(Math.abs), 3);
    const terms = largest.map((i) => `${num(q[i])} × ${num(k[i])}`).join(" + ");
    const told = [
      `q · k = ${terms} + … = ${num(score, 4)}` +
        (K < H ? `   (k and v of group ${group}, shared by ${H / K} heads)` : ""),
      `${num(score, 4)} / √${D} = ${num(scores[key], 4)}`,
      position === T - 1
        ? "this is the last position: nothing comes later, nothing is masked"
        : `positions ${position + 1} to ${T - 1} come later: their scores become −∞`,
      `e^(${num(scores[key], 4)} − ${num(most, 4)}) / ${num(total, 4)} = ` +
        `${num(Math.exp(scores[key] - most) / total)}   (the map has ${num(weight)}; ` +
        `the sum runs over ${position + 1} position${position ? "s" : ""})`,
      `${num(weight)} · v, and the same for all positions; the sum is what the head hands on`,
    ];
    lines.forEach((line, i) => (line.textContent = told[i]));
  }
  return { node, update };
}
