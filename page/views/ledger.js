// The pipeline as a ledger: one row a step, its numbers at the selected position.

/** Build the section. */
function makeLedger(app, root) {
  const norms = makeNorms(app);
  const list = el("div.ledger");
  const total = el("p.note");
  root.append(norms.node, total, list);
  let [shapeKey, rows, opened, besides, questions] = ["", [], null, new Map(), 0];

  const update = (names) => {
    const steps = pipelineSteps(app.config(), app.trace.shape);
    const key = JSON.stringify(app.config());
    if (key !== shapeKey) build(steps);
    shapeKey = key;
    if (names.has("trace") || names.has("theme")) showCosts(steps);
    besides = vectorsBeside(); // before anything is filled
    rows.forEach(fill);
    layers.press(app.state.layer);
    norms.update();
    const changes = ["trace", "position", "layer", "head"].some((name) => names.has(name));
    return opened && changes ? explain(opened) : null;
  };

  let layers = null;
  function build(steps) {
    const config = app.config();
    layers = choices(
      "Block",
      Array.from({ length: config.n_layers }, (_, i) => String(i)),
      (layer) => app.change({ layer }),
    );
    rows = steps.map(makeRow);
    opened = null;
    list.replaceChildren(...rows.map((row) => row.node));
  }

  /** Shapes, parameters and FLOPs, which depend on the number of tokens. */
  function showCosts(steps) {
    rows.forEach((row, i) => {
      const step = (row.step = steps[i]);
      if (step.block) return;
      refill(
        row.figures,
        el("span.mono", step.from ? `(${step.from.join(", ")}) →` : ""),
        el("span.mono", `(${step.to.join(", ")})`),
        el("span", step.params ? `${count(step.params)} params` : "no params"),
        el("span", step.flops ? flops(step.flops) : ""),
      );
    });
    const all = (what) => totalOf(steps, what, app.trace.shape.L);
    total.textContent =
      `${count(all("params"))} parameters. Reading these ` +
      `${count(app.trace.shape.T)} tokens takes ${flops(all("flops"))}, ` +
      "2 for each weight and token, and in attention 2 for each number of each visible pair.";
  }

  /** The other model's vectors by what they are, if it has the selected layer and head. */
  function vectorsBeside() {
    const { beside, state } = app;
    if (!beside || state.layer >= beside.shape.L || state.head >= beside.shape.H) return new Map();
    const steps = pipelineSteps(app.besideModel.config, beside.shape);
    return new Map(
      steps.flatMap((step) => step.vectors ?? []).map((vector) => [vector.key, vector]),
    );
  }

  function makeRow(step) {
    if (step.block) {
      const node = el(
        "div.blockhead",
        el("span.number", "4"),
        el("span.name", `Decoder block × ${app.config().n_layers}`),
        el("span.soft", "shown:"),
        layers.node,
      );
      return { step, node, strips: [] };
    }
    const strips = (step.vectors ?? []).map((_, n) =>
      makeStrip((index) => explain({ row, n, strip: strips[n], index })),
    );
    const figures = el("div.figures");
    const panel = el("div.sum", { hidden: true });
    const live = el("span.live");
    const node = el(
      "div",
      { class: step.inner ? "step inner" : "step", "data-step": step.number },
      el(
        "div.what",
        el("span.number", step.number),
        el("span.name", step.name),
        el("code", step.formula),
      ),
      el(
        "div.strips",
        strips.map((strip, n) => el("div", el("span.label", step.vectors[n].name), strip.node)),
        el(
          "p.about",
          step.about ?? "",
          live,
          step.link && el("a", { href: `#${step.link[0]}` }, ` ${step.link[1]}`),
        ),
      ),
      figures,
      panel,
    );
    const row = { step, node, strips, panel, live, figures };
    return row;
  }

  function fill({ step, strips, live }) {
    const { trace, beside, state } = app;
    const { layer, position: t, head } = state;
    for (const [n, strip] of strips.entries()) {
      const vector = step.vectors[n];
      const values = vector.values(trace, layer, t, head);
      const other = vector.sorted ? null : besides.get(vector.key);
      const second = other?.values(beside, layer, t, head) ?? null;
      strip.picked = opened?.strip === strip ? opened.index : -1;
      strip.ids = values.ids;
      strip.draw(values, {
        label: vector.name,
        groups: vector.groups,
        positive: vector.positive,
        scale: vector.scale,
        second: second?.length === values.length ? second : null,
        names: namer(vector, values, trace),
      });
    }
    if (step.number === "1")
      live.textContent = `. Here ${quoted(trace.pieces[t])} → ${trace.ids[t]}`;
    if (step.loss) {
      const p = trace.lens[trace.shape.L].follows[t];
      live.textContent =
        t === trace.shape.T - 1
          ? "The text ends here: nothing follows yet."
          : `${quoted(trace.pieces[t + 1])} follows: −ln ${num(p)} = ${num(-Math.log(p))} nats. ` +
            "Training lowers the mean of this by gradient descent.";
    }
  }

  function namer(vector, values, trace) {
    if (vector.sorted) return (i) => quoted(app.piece(values.ids[i] ?? 0));
    if (vector.key === "attention") return (i) => `position ${i} ${quoted(trace.pieces[i] ?? "")}`;
    const g = vector.groups;
    return (i) =>
      g ? `${vector.name}[head ${Math.floor(i / g)}, ${i % g}]` : `${vector.name}[${i}]`;
  }

  async function explain(cell) {
    if (opened && opened !== cell && opened.row !== cell.row) opened.row.panel.hidden = true;
    opened = cell;
    const asked = ++questions;
    const { index, row } = cell;
    const vector = row.step.vectors[cell.n];
    const { layer, position, head } = app.state;
    const values = vector.values(app.trace, layer, position, head);
    if (index >= values.length) return close(cell);
    fill(row);
    let content;
    try {
      const told = await explainCell(app, vector.key, values.ids ? values.ids[index] : index);
      if (opened !== cell || asked !== questions) return;
      content = showSum(told, values[index]);
    } catch (error) {
      content = [el("p", error.message)];
    }
    const name = namer(vector, values, app.trace)(index);
    row.panel.replaceChildren(
      el(
        "div.sumhead",
        el("strong", name),
        el("button.quiet", { onclick: () => close(cell) }, "close"),
      ),
      ...content.flat().filter(Boolean),
    );
    row.panel.hidden = false;
  }

  /** Open a number of a vector, by the vector's key: the one that pick(values) chooses. */
  app.openCell = (key, pick) => {
    const { layer, position, head } = app.state;
    const of = ({ step }) => step.vectors?.findIndex((vector) => vector.key === key) ?? -1;
    const row = rows.find((candidate) => of(candidate) >= 0);
    const n = of(row);
    const values = row.step.vectors[n].values(app.trace, layer, position, head);
    return explain({ row, n, strip: row.strips[n], index: pick(values) });
  };

  function close(cell) {
    cell.row.panel.hidden = true;
    opened = null;
    fill(cell.row);
  }
  return { update };
}

Object.assign(globalThis, { makeLedger });
