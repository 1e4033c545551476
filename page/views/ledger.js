// The pipeline as a ledger: one row a step, its numbers at the selected position.

function makeLedger(app, root) {
  const norms = makeNorms(app);
  const list = el("div.ledger");
  const total = el("p.note");
  root.append(norms.node, total, list);
  const { n_layers: L } = app.config();
  const numbers = Array.from({ length: L }, (_, i) => String(i));
  const layers = choices("Block", numbers, (layer) => app.change({ layer }));
  let [opened, questions] = [null, 0];
  let besides = new Map(); // the other model's vectors by their keys
  const noText = { T: 0, ...engine.shapeOf(app.config()) };
  const rows = pipelineSteps(app.config(), noText).map(makeRow); // their costs depend on the text
  list.append(...rows.map(({ node }) => node));

  const update = (names) => {
    if (names.has("trace")) showCosts();
    besides = vectorsBeside(); // before anything is filled
    rows.forEach(fill);
    layers.press(app.state.layer);
    norms.update();
    const changes = ["trace", "position", "layer", "head"].some((name) => names.has(name));
    return opened && changes ? explain(opened) : null;
  };

  /** Shapes, parameters and FLOPs, which depend on the number of tokens. */
  function showCosts() {
    const steps = pipelineSteps(app.config(), app.trace.shape);
    rows.forEach((row, i) => {
      const step = (row.step = steps[i]);
      if (step.block) return;
      refill(
        row.figures,
        el("span.mono", step.from && `(${step.from.join(", ")}) →`),
        el("span.mono", `(${step.to.join(", ")})`),
        el("span", step.params ? `${count(step.params)} params` : "no params"),
        el("span", step.flops > 0 && flops(step.flops)),
      );
    });
    const all = (what) => totalOf(steps, what, L);
    total.textContent =
      `${count(all("params"))} parameters. Reading these ` +
      `${count(app.trace.shape.T)} tokens takes ${flops(all("flops"))}, ` +
      "2 for each weight and token, and in attention 2 for each number of each visible pair.";
  }

  /** The vectors of the model beside, if it has the selected layer and head. */
  function vectorsBeside() {
    const { beside, state } = app;
    if (!beside || state.layer >= beside.shape.L || state.head >= beside.shape.H) return new Map();
    const steps = pipelineSteps(app.besideModel.config, beside.shape);
    return new Map(steps.flatMap(({ vectors }) => vectors).map((vector) => [vector.key, vector]));
  }

  /** The numbers of a vector at what is selected. */
  function valuesOf(vector, trace = app.trace) {
    const { layer, position, head } = app.state;
    return vector.values(trace, layer, position, head);
  }

  function makeRow(step) {
    if (step.block) {
      const name = el("span.name", `Decoder block × ${L}`);
      const shown = el("span.soft", "shown:");
      const node = el("div.blockhead", el("span.number", "4"), name, shown, layers.node);
      return { step, node, strips: [] };
    }
    const strips = step.vectors.map((_, n) => makeStrip((index) => explain({ row, n, index })));
    const [figures, live] = [el("div.figures"), el("span.live")];
    const panel = el("div.sum", { hidden: true });
    const named = strips.map(({ node }, n) =>
      el("div", el("span.label", step.vectors[n].name), node),
    );
    const [place, name] = step.link ?? [];
    const link = place && el("a", { href: `#${place}` }, ` ${name}`);
    const what = [el("span.number", step.number), el("span.name", step.name)];
    const node = el(
      "div.step",
      { class: step.inner && "inner", "data-step": step.number },
      el("div.what", what, el("code", step.formula)),
      el("div.strips", named, el("p.about", step.about, live, link)),
      figures,
      panel,
    );
    const row = { step, node, strips, panel, live, figures };
    return row;
  }

  function fill(row) {
    const { step, strips, live } = row;
    const { trace, beside, state } = app;
    const t = state.position;
    strips.forEach((strip, n) => {
      const vector = step.vectors[n];
      const values = valuesOf(vector);
      const other = !vector.sorted && besides.get(vector.key);
      const second = other ? valuesOf(other, beside) : null;
      strip.picked = opened?.row === row && opened.n === n ? opened.index : -1;
      strip.draw(values, {
        ...vector,
        label: vector.name,
        second: second?.length === values.length ? second : null,
        names: namer(vector, values),
      });
    });
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

  function namer({ name, key, sorted, groups }, values) {
    if (sorted) return (i) => quoted(app.piece(values.ids[i]));
    if (key === "attention") return (i) => `position ${i} ${quoted(app.trace.pieces[i])}`;
    if (!groups) return (i) => `${name}[${i}]`;
    return (i) => `${name}[head ${Math.floor(i / groups)}, ${i % groups}]`;
  }

  /** Open the sum of a cell, {row, n, index}: of number `index` of the row's vector n. */
  async function explain(cell) {
    const { index, row, n } = cell;
    if (opened && opened.row !== row) opened.row.panel.hidden = true;
    opened = cell;
    const asked = ++questions;
    const vector = row.step.vectors[n];
    const values = valuesOf(vector);
    if (index >= values.length) return close(cell);
    fill(row);
    const content = await explainCell(app, vector.key, values.ids ? values.ids[index] : index).then(
      (told) => showSum(told, values[index]),
      (error) => el("p", error.message),
    );
    if (opened !== cell || asked !== questions) return;
    const name = el("strong", namer(vector, values)(index));
    const shut = el("button.quiet", { onclick: () => close(cell) }, "close");
    refill(row.panel, el("div.sumhead", name, shut), content);
    row.panel.hidden = false;
  }

  /** Open a number of a vector, by the vector's key: the one that pick(values) chooses. */
  app.openCell = (key, pick) => {
    const of = ({ step }) => step.vectors.findIndex((vector) => vector.key === key);
    const row = rows.find((candidate) => of(candidate) >= 0);
    const n = of(row);
    return explain({ row, n, index: pick(valuesOf(row.step.vectors[n])) });
  };

  function close({ row }) {
    row.panel.hidden = true;
    opened = null;
    fill(row);
  }
  return { update };
}
