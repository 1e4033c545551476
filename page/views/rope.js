// RoPE, drawn: how the positions of query and key come into their product.

/** RoPE, drawn: one pair of numbers of q and of k, before and after the rotation. */
function makeRope(app) {
  const drawing = el("svg:svg.circle", { viewBox: "-110 -110 220 220", role: "img" });
  const text = el("div.ropetext");
  const pair = slider("pair", { min: 0, max: 1, step: 1, value: 0 }, String, (value) =>
    app.change({ pair: value }),
  );
  const heading = el("h3");
  const node = el("div.rope", heading, el("div.two.narrow", drawing, el("div", pair.node, text)));

  function update() {
    const c = app.config();
    const { position: m, key: n } = app.state;
    const turns = c.position === "rope";
    heading.textContent = turns ? "Position, as a rotation" : "Position, as a vector";
    drawing.parentNode.classList.toggle("narrow", turns);
    if (!turns) {
      drawing.replaceChildren();
      drawing.style.display = "none";
      pair.node.hidden = true;
      text.replaceChildren(
        el(
          "p",
          "This model does not rotate: it adds a learned vector for " +
            "each position to the embedding (step 3 of the pipeline).",
        ),
      );
      return;
    }
    drawing.style.display = "";
    pair.node.hidden = false;
    const width = c.rope_dim;
    pair.input.max = width / 2 - 1;
    const j = Math.min(app.state.pair, width / 2 - 1);
    pair.set(j);
    const h = headVectors(app);
    const at = app.trace.shape.D - width + j; // what is rotated is the last part of a head
    const two = (x) => [x[at], x[at + width / 2]];
    const vectors = { q: [two(h.qBefore), two(h.q)], k: [two(h.kBefore), two(h.k)] };
    const scale =
      88 /
      Math.max(
        1e-9,
        ...Object.values(vectors)
          .flat()
          .map(([a, b]) => Math.hypot(a, b)),
      );
    const frequency = engine.ropeFrequencies(c)[j];
    const arrow = ([a, b], kind, dashed) => [
      el("svg:line", {
        x1: 0,
        y1: 0,
        x2: a * scale,
        y2: -b * scale,
        class: `${kind}${dashed ? " before" : ""}`,
      }),
      el("svg:circle", {
        cx: a * scale,
        cy: -b * scale,
        r: dashed ? 3 : 5,
        class: `${kind}${dashed ? " before" : ""}`,
      }),
    ];
    const swing = ([a, b], angle, kind, radius) => {
      const from = Math.atan2(b, a);
      const steps = Math.max(2, Math.min(400, Math.ceil(Math.abs(angle) * 12)));
      const points = Array.from({ length: steps + 1 }, (_, i) => {
        const phi = from + (angle * i) / steps;
        const r = radius - Math.min(14, (Math.abs(angle) / (2 * Math.PI)) * 3 * (1 - i / steps));
        return `${r * Math.cos(phi)},${-r * Math.sin(phi)}`;
      });
      return el("svg:polyline", { points: points.join(" "), class: `swing ${kind}` });
    };
    drawing.replaceChildren(
      el("svg:circle.axis", { cx: 0, cy: 0, r: 98 }),
      el("svg:line.axis", { x1: -104, y1: 0, x2: 104, y2: 0 }),
      el("svg:line.axis", { x1: 0, y1: -104, x2: 0, y2: 104 }),
      swing(vectors.k[0], n * frequency, "k", 62),
      swing(vectors.q[0], m * frequency, "q", 78),
      ...arrow(vectors.k[0], "k", true),
      ...arrow(vectors.q[0], "q", true),
      ...arrow(vectors.k[1], "k"),
      ...arrow(vectors.q[1], "q"),
    );
    drawing.setAttribute(
      "aria-label",
      `Pair ${j}: q is turned by ${num(m * frequency)} radians, ` + `k by ${num(n * frequency)}`,
    );
    const degrees = (x) => `${num((x * 180) / Math.PI)}°`;
    const part = vectors.q[1][0] * vectors.k[1][0] + vectors.q[1][1] * vectors.k[1][1];
    text.replaceChildren(
      el(
        "p",
        `Pair ${j} is the numbers ${at} and ${at + width / 2} of a head. From one position ` +
          `to the next it turns by ${num(frequency)} radians: a full turn takes ` +
          `${num((2 * Math.PI) / frequency)} positions.`,
      ),
      el(
        "p.mono",
        el("span.this", "q"),
        ` at position ${m}: turned by ` +
          `${m} × ${degrees(frequency)} = ${degrees(m * frequency)}`,
      ),
      el(
        "p.mono",
        el("span.beside", "k"),
        ` at position ${n}: turned by ` +
          `${n} × ${degrees(frequency)} = ${degrees(n * frequency)}`,
      ),
      el(
        "p",
        "Dashed: before; solid: after. The product of the two arrows depends on the " +
          `difference of the turns alone, so on how far apart the tokens are: ${m - n}. This ` +
          `pair adds ${num(part)} to q · k.`,
      ),
    );
  }
  return { node, update };
}

Object.assign(globalThis, { makeRope });
