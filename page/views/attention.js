// Attention: a small map for each head, and all that is shown of the selected one.

/** Build the section. */
function makeAttention(app, root) {
  const grid = el("div.heads", { role: "group", "aria-label": "Heads" });
  const big = makeMap(app, "this");
  const other = makeMap(app, "beside");
  const title = el("h3");
  const leaders = el("ul.leaders");
  const measures = el("div.measures");
  const arcs = makeArcs(app);
  const worked = makeWorked(app);
  const rope = makeRope(app);
  root.append(
    el(
      "div.attention",
      el(
        "div",
        grid,
        el(
          "p.note",
          "One map for each head, a row for each layer. A head has a role if its weights are a " +
            "fifth of the way or more from looking everywhere alike to one place alone. The " +
            "strongest on this text:",
        ),
        leaders,
      ),
      el("div.mapbox", title, el("div.maps", big.node, other.node), measures),
    ),
    arcs.node,
    worked.node,
    rope.node,
  );
  big.onHover = (query, key) => arcs.show(query, key);
  let [thumbs, shape] = [[], ""];

  const update = (names) => {
    const { trace, beside, state } = app;
    const now = `${trace.shape.L} ${trace.shape.H}`;
    if (now !== shape) buildGrid();
    shape = now;
    const roles = measureHeads(trace);
    const redraw = ["trace", "theme"].some((name) => names.has(name));
    for (const { node, canvas, role, layer, head } of thumbs) {
      if (redraw) drawHead(canvas, trace, layer, head);
      const m = roles[layer][head];
      role.textContent = roleOf(m);
      node.setAttribute("aria-label", `${headName(layer, head)}, ${role.textContent}`);
      node.setAttribute("aria-pressed", String(layer === state.layer && head === state.head));
      const off = app.state.interventions.some(
        (x) =>
          x.layer === layer &&
          x.scale === 0 &&
          (x.part === "block" || x.part === "attention" || (x.part === "head" && x.head === head)),
      );
      node.classList.toggle("off", off);
    }
    title.textContent =
      `${headName(state.layer, state.head)}: ` + roleOf(roles[state.layer][state.head]);
    if (other.node.hidden === Boolean(beside)) paint.layouts++; // the first map gets another width
    other.node.hidden = !beside;
    big.draw(trace, app.state.interventions.length ? "changed" : app.modelName(state.model));
    const fits = beside && state.layer < beside.shape.L && state.head < beside.shape.H;
    if (beside) other.draw(fits ? beside : null, app.besideModel.name);
    if (redraw) showLeaders();
    showMeasures(roles[state.layer][state.head]);
    arcs.show(state.position, state.key);
    worked.update();
    rope.update();
  };

  function buildGrid() {
    const { L, H } = app.trace.shape;
    thumbs = [];
    grid.style.setProperty("--heads", H);
    const cells = [
      el("span.soft"),
      ...Array.from({ length: H }, (_, head) =>
        el("span.column", H > 6 ? String(head) : `head ${head}`),
      ),
    ];
    for (let layer = 0; layer < L; layer++) {
      cells.push(el("span.layer", L > 6 ? String(layer) : `layer ${layer}`));
      for (let head = 0; head < H; head++) {
        const [canvas, role] = [el("canvas"), el("small")];
        const node = el(
          "button.head",
          { onclick: () => app.change({ layer, head }) },
          canvas,
          role,
        );
        thumbs.push({ node, canvas, role, layer, head });
        cells.push(node);
      }
    }
    grid.classList.toggle("many", H > 6);
    grid.replaceChildren(...cells);
  }

  /** The strongest head of each role, or that the model has not learned it. */
  function showLeaders() {
    const found = strongest(app.trace);
    const rows = Object.entries(ROLES).map(([role, what]) => {
      const one = found[role];
      const choose = () => app.change({ layer: one.layer, head: one.head });
      return el(
        "li",
        el("b", `${NAMES[role]}: `),
        !one
          ? "no token of the text comes twice"
          : [
              app.trace.shape.T < SHORTEST
                ? "text too short, "
                : !one.learned && "not learned yet, ",
              el("button.quiet", { onclick: choose }, `layer ${one.layer}, head ${one.head}`),
              ` ${percent(one.value)} ${what}, by chance ${percent(one.chance)}`,
            ],
      );
    });
    refill(leaders, rows);
  }

  function showMeasures(m) {
    const bar = (name, value, most, text) => {
      const fill = el("span.fill");
      fill.style.width = `${(100 * (value ?? 0)) / (most || 1)}%`;
      return el("div.measure", el("span", name), el("span.track", fill), el("span.value", text));
    };
    const share = (role) =>
      m[role] === null
        ? "no token repeats"
        : `${percent(m[role])}, chance ${percent(m.chance[role])}`;
    measures.replaceChildren(
      bar("to the token before", m.previous, 1, share("previous")),
      bar("to the first token", m.first, 1, share("first")),
      bar("induction", m.induction, 1, share("induction")),
      bar("entropy", m.entropy, m.most, m.entropy === null ? "–" : `${num(m.entropy)} nats`),
    );
  }
  return { update };
}

Object.assign(globalThis, { makeAttention });
