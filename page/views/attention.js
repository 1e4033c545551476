// Attention: a small map for each head, and all that is shown of the selected one.

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
  const note =
    "One map for each head, a row for each layer. A head has a role if its weights are a fifth of " +
    "the way or more from looking everywhere alike to one place alone. The strongest on this text:";
  root.append(
    el(
      "div.attention",
      el("div", grid, el("p.note", note), leaders),
      el("div.mapbox", title, el("div.maps", big.node, other.node), measures),
    ),
    arcs.node,
    worked.node,
    rope.node,
  );
  big.onHover = (query, key) => arcs.show(query, key);
  const thumbs = makeGrid(app.config());

  const update = (names) => {
    const { trace, beside, state } = app;
    const roles = measureHeads(trace);
    const redraw = names.has("trace") || names.has("theme");
    const off = engine
      .scalesOf(trace.shape, state.interventions)
      .map(({ attention, heads }) => heads.map((scale) => scale * attention === 0));
    for (const { node, canvas, role, layer, head } of thumbs) {
      if (redraw) drawHead(canvas, trace, layer, head);
      role.textContent = roleOf(roles[layer][head]);
      node.setAttribute("aria-label", `${headName(layer, head)}, ${role.textContent}`);
      setPressed(node, layer === state.layer && head === state.head);
      node.classList.toggle("off", off[layer][head]);
    }
    const { layer, head } = state;
    title.textContent = `${headName(layer, head)}: ${roleOf(roles[layer][head])}`;
    if (other.node.hidden === Boolean(beside)) measureAnew(); // the first map gets another width
    other.node.hidden = !beside;
    big.draw(trace, state.interventions.length ? "changed" : app.modelName(state.model));
    const fits = beside && layer < beside.shape.L && head < beside.shape.H;
    if (beside) other.draw(fits ? beside : null, app.besideModel.name);
    if (redraw) showLeaders();
    showMeasures(roles[layer][head]);
    arcs.show(state.position, state.key);
    worked.update();
    rope.update();
  };

  /** Fill the grid; return its heads, [{node, canvas, role, layer, head}]. */
  function makeGrid({ n_layers: L, n_heads: H }) {
    const makeHead = (layer, head) => {
      const [canvas, role] = [el("canvas"), el("small")];
      const onclick = () => app.change({ layer, head });
      return { node: el("button.head", { onclick }, canvas, role), canvas, role, layer, head };
    };
    const [layers, heads] = [L, H].map((n) => [...Array(n).keys()]);
    const made = layers.flatMap((layer) => heads.map((head) => makeHead(layer, head)));
    grid.style.setProperty("--heads", H);
    grid.classList.toggle("many", H > 6);
    refill(
      grid,
      el("span.soft"),
      heads.map((head) => el("span.column", H > 6 ? String(head) : `head ${head}`)),
      layers.map((layer) => [
        el("span.layer", L > 6 ? String(layer) : `layer ${layer}`),
        made.slice(layer * H, (layer + 1) * H).map(({ node }) => node),
      ]),
    );
    return made;
  }

  /** The strongest head of each role, or that the model has not learned it. */
  function showLeaders() {
    const found = strongest(app.trace);
    const told = ({ layer, head, value, chance, learned }, what) => {
      const onclick = () => app.change({ layer, head });
      return [
        app.trace.shape.T < SHORTEST ? "text too short, " : !learned && "not learned yet, ",
        el("button.quiet", { onclick }, `layer ${layer}, head ${head}`),
        ` ${percent(value)} ${what}, by chance ${percent(chance)}`,
      ];
    };
    const rows = Object.entries(ROLES).map(([role, what]) => {
      const best = found[role] ? told(found[role], what) : "no token of the text comes twice";
      return el("li", el("b", `${NAMES[role]}: `), best);
    });
    refill(leaders, rows);
  }

  function showMeasures(m) {
    const line = (name, part, value) => barRow(name, part, { kind: "measure", value });
    const share = (role, name) => {
      const chance = () => `${percent(m[role])}, chance ${percent(m.chance[role])}`;
      return line(name, m[role], m[role] === null ? "no token repeats" : chance());
    };
    refill(
      measures,
      share("previous", "to the token before"),
      share("first", "to the first token"),
      share("induction", "induction"),
      line("entropy", m.entropy / (m.most || 1), `${num(m.entropy ?? NaN)} nats`),
    );
  }
  return { update };
}
