// RoPE, drawn: how the positions of query and key come into their product.

/** One pair of numbers of q and of k, before and after the rotation. */
function makeRope(app) {
  const drawing = el("svg:svg.circle", { viewBox: "-110 -110 220 220", role: "img" });
  const text = el("div.ropetext");
  const onPair = (pair) => app.change({ pair });
  const pair = slider("pair", { min: 0, max: 1, step: 1, value: 0 }, String, onPair);
  const turning = el("div.two.narrow", drawing, el("div", pair.node, text));
  const still = el(
    "p",
    "This model does not rotate: it adds a learned vector for each position to the embedding " +
      "(step 3 of the pipeline).",
  );
  const heading = el("h3");
  const node = el("div.rope", heading, turning, still);

  function update() {
    const c = app.config();
    const turns = c.position === "rope";
    heading.textContent = turns ? "Position, as a rotation" : "Position, as a vector";
    [turning.hidden, still.hidden] = [!turns, turns];
    if (!turns) return;
    const { position: m, key: n } = app.state;
    const half = c.rope_dim / 2;
    const j = Math.min(app.state.pair, half - 1);
    pair.input.max = half - 1;
    pair.set(j);
    const at = app.trace.shape.D - 2 * half + j; // what is rotated is the last part of a head
    const { q, k, qBefore, kBefore } = headVectors(app);
    const pairOf = (x) => [x[at], x[at + half]];
    const [before, after] = [[qBefore, kBefore].map(pairOf), [q, k].map(pairOf)];
    const longest = Math.max(1e-9, ...[...before, ...after].map(([a, b]) => Math.hypot(a, b)));
    const frequency = engine.ropeFrequencies(c)[j];
    const axis = (x, y) => el("svg:line.axis", { x1: -x, y1: -y, x2: x, y2: y });
    refill(
      drawing,
      el("svg:circle.axis", { r: 98 }),
      axis(104, 0),
      axis(0, 104),
      swing(before[1], n * frequency, "k", 62),
      swing(before[0], m * frequency, "q", 78),
      arrow(before[1], "k.before", 3),
      arrow(before[0], "q.before", 3),
      arrow(after[1], "k", 5),
      arrow(after[0], "q", 5),
    );

    function arrow([a, b], kind, r) {
      const [x, y] = [(88 * a) / longest, (-88 * b) / longest];
      return [
        el(`svg:line.${kind}`, { x2: x, y2: y }),
        el(`svg:circle.${kind}`, { cx: x, cy: y, r }),
      ];
    }
    drawing.setAttribute(
      "aria-label",
      `Pair ${j}: q is turned by ${num(m * frequency)} radians, k by ${num(n * frequency)}`,
    );
    const degrees = (x) => `${num((x * 180) / Math.PI)}°`;
    const turned = (name, kind, t) =>
      el(
        "p.mono",
        el(`span.${kind}`, name),
        ` at position ${t}: turned by ${t} × ${degrees(frequency)} = ${degrees(t * frequency)}`,
      );
    const [[a, b], [c1, c2]] = after;
    refill(
      text,
      el(
        "p",
        `Pair ${j} is the numbers ${at} and ${at + half} of a head. From one position ` +
          `to the next it turns by ${num(frequency)} radians: a full turn takes ` +
          `${num((2 * Math.PI) / frequency)} positions.`,
      ),
      turned("q", "this", m),
      turned("k", "beside", n),
      el(
        "p",
        "Dashed: before; solid: after. The product of the two arrows depends on the " +
          `difference of the turns alone, so on how far apart the tokens are: ${m - n}. This ` +
          `pair adds ${num(a * c1 + b * c2)} to q · k.`,
      ),
    );
  }

  /** The way that the arrow (a, b) is turned, as a spiral where it goes around more than once. */
  function swing([a, b], angle, kind, radius) {
    const steps = Math.max(2, Math.min(400, Math.ceil(angle * 12)));
    const points = Array.from({ length: steps + 1 }, (_, i) => {
      const phi = Math.atan2(b, a) + (angle * i) / steps;
      const r = radius - Math.min(14, (angle / (2 * Math.PI)) * 3 * (1 - i / steps));
      return `${r * Math.cos(phi)},${-r * Math.sin(phi)}`;
    });
    return el(`svg:polyline.swing.${kind}`, { points: points.join(" ") });
  }
  return { node, update };
}
