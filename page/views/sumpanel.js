// A sum, shown: its largest terms, the rest, the total beside the number that it explains.

/** A row-major matrix times a vector. */
function matmul(matrix, x) {
  const y = new Float32Array(matrix.length / x.length);
  for (let i = 0, n = 0; i < y.length; i++)
    for (let j = 0; j < x.length; j++, n++) y[i] += matrix[n] * x[j];
  return y;
}

/** The explanation as a panel: formula, the largest terms, the rest, the total and the check. */
function showSum(told) {
  const check = told.score ? null : Math.abs(told.total - told.shown);
  const rows = [];
  if (told.terms) {
    const sizes = told.terms.map((x) => Math.abs(x.weight * x.input));
    const top = engine.largest(sizes, 8);
    const kept = new Set(top);
    const rest = told.terms.reduce((s, x, i) => (kept.has(i) ? s : s + x.weight * x.input), 0);
    for (const i of top) {
      const { label, weight, input } = told.terms[i];
      rows.push(termRow(label, `${num(weight)} × ${num(input)}`, weight * input, sizes[top[0]]));
    }
    if (told.terms.length > top.length)
      rows.push(
        termRow(`the other ${count(told.terms.length - top.length)}`, "", rest, sizes[top[0]]),
      );
    if (told.bias) rows.push(termRow("bias", "", told.bias, sizes[top[0]]));
  }
  return [
    el("p.mono", told.formula),
    (told.lines ?? []).map((line) => el("p.mono", line)),
    rows.length > 0 && el("div.terms", rows),
    told.scale !== undefined &&
      told.scale !== 1 &&
      el("p.mono", `× ${num(told.scale)}, the intervention`),
    el(
      "p.mono.total",
      `= ${num(told.total, 4)}`,
      check !== null &&
        el(
          "span.soft",
          `   the strip has ${num(told.shown, 4)}` +
            (check <= 1e-3 * Math.max(1, Math.abs(told.shown))
              ? " ✓"
              : `, which differs by ${num(check)}`),
        ),
    ),
  ];
}

function termRow(label, product, value, most) {
  const fill = el("span", { class: value < 0 ? "fill minus" : "fill" });
  fill.style.width = `${50 * Math.min(1, Math.abs(value) / most)}%`;
  return el(
    "div.term",
    el("span.name", label),
    el("span.mono", product),
    el("span.track", fill),
    el("span.value", num(value)),
  );
}

Object.assign(globalThis, { matmul, showSum });
