// Parts switched off or scaled, and what that changes.

function makeInterventions(app, root) {
  const board = el("div.board");
  const result = el("div.result");
  const scale = slider(
    "strength of the selected part",
    { min: 0, max: 2, step: 0.05, value: 1 },
    (v) => (v ? `× ${v.toFixed(2)}` : "off"),
    (v) => setScale(picked, v),
  );
  const restore = () => app.change({ interventions: [] });
  const reset = el("button.quiet", { onclick: restore }, "all parts as trained");
  const measure = el("button", { onclick: measureAll }, "Switch each off in turn, and measure");
  const note = el("p.note");
  root.append(
    el("div.two.board2", el("div", board, note, scale.node, el("div.row", measure, reset)), result),
  );
  const buttons = []; // {part, node, effect}
  let [picked, effects] = [null, null];

  const same = (a, b) => a.layer === b.layer && a.part === b.part && a.head === b.head;
  const scaleOf = (part) => app.state.interventions.find((x) => same(x, part))?.scale ?? 1;

  function setScale(part, value) {
    if (!part) return;
    const others = app.state.interventions.filter((x) => !same(x, part));
    app.change({ interventions: value === 1 ? others : [...others, { ...part, scale: value }] });
  }

  function fillBoard({ n_layers: L, n_heads: H }) {
    board.style.setProperty("--heads", H);
    const make = (name, layer, part, head = null) => {
      const [effect, one] = [el("small"), { layer, part, head }];
      const onclick = () => {
        picked = one;
        setScale(one, scaleOf(one) === 1 ? 0 : 1);
      };
      const node = el("button.part", { onclick }, name, effect);
      buttons.push({ part: one, node, effect });
      return node;
    };
    const rows = Array.from({ length: L }, (_, layer) => {
      const block = make(`block ${layer}`, layer, "block");
      const heads = Array.from({ length: H }, (_, i) => make(`head ${i}`, layer, "head", i));
      const rest = [make("attention", layer, "attention"), make("ffwd", layer, "ffwd")];
      return el("div.boardrow", block, el("div.boardheads", heads), rest);
    });
    refill(board, rows);
  }

  const update = () => {
    const { state, frozen } = app;
    if (effects && effects.text !== key()) effects = null;
    measure.disabled = frozen;
    reset.disabled = !state.interventions.length;
    note.textContent = frozen
      ? "The page has no weights of this model: nothing can be switched off."
      : effects
        ? "Numbers: by how many nats per token the loss on this text rises without that part."
        : "Click a part to switch it off, again to switch it on; the slider scales the last one.";
    buttons.forEach(({ part, node, effect }, i) => {
      const value = scaleOf(part);
      const scaled = value !== 1 && value !== 0;
      const rise = effects?.rises[i];
      node.disabled = frozen;
      setPressed(node, value === 0);
      node.classList.toggle("scaled", scaled);
      node.classList.toggle("picked", picked !== null && same(part, picked));
      effect.textContent = effects ? `${rise < 0 ? "−" : "+"}${num(Math.abs(rise), 2)}` : "";
      if (scaled) effect.textContent = `× ${value.toFixed(2)}`;
      node.removeAttribute("style");
      // The root: the first block is worth so much that beside it nothing else would be seen.
      if (effects && value === 1)
        tint(node, paint.sequential, 0.7 * weightShade(Math.max(0, rise) / effects.most));
    });
    scale.input.disabled = frozen || !picked;
    scale.set(picked ? scaleOf(picked) : 1);
    return showResult();
  };

  fillBoard(app.config());
  const key = () => JSON.stringify([app.state.model, app.ids]);

  /** The loss on this text without each part in turn, next to that of the whole model. */
  async function measureAll() {
    measure.disabled = true;
    const now = key();
    const { model } = app.state;
    const ids = app.ids.slice();
    const whole = app.scores(await app.traceOf(model, ids, [])).mean;
    const rises = [];
    for (const { part } of buttons) {
      if (key() !== now) return;
      const interventions = [{ ...part, scale: 0 }];
      const start = ids.length; // of its trace the lens alone
      const { rows } = await app.client.ask({ type: "trace", model, ids, interventions, start });
      rises.push(app.scores(rows).mean - whole);
      note.textContent = `${rises.length} of ${buttons.length} measured`;
    }
    effects = { text: now, rises, most: Math.max(1e-9, ...rises) };
    update();
  }

  async function showResult() {
    const { state, trace } = app;
    if (!state.interventions.length)
      return void refill(result, el("p.note", "Nothing is switched off."));
    const whole = await app.traceOf(state.model, app.ids, []);
    if (trace !== app.trace) return;
    const t = state.position;
    const [p, q] = [probabilities(whole, t), probabilities(trace, t)];
    const ids = new Set([...engine.largest(p, 6), ...engine.largest(q, 6)]);
    const tokens = [...ids].map((id) => ({ id, p: q[id], second: p[id] }));
    tokens.sort((a, b) => b.second - a.second);
    const lost = (x, i) => (x > 0 ? x * Math.log(x / Math.max(q[i], 1e-30)) : 0);
    const divergence = p.reduce((sum, x, i) => sum + lost(x, i), 0);
    const [before, after] = [app.scores(whole).mean, app.scores(trace).mean];
    refill(
      result,
      el("h3", `What follows ${quoted(trace.pieces[t])}`),
      el("p.legend", el("b.this", "changed"), " above, ", el("b.beside", "untouched"), " below"),
      el("div.bars.wide", tokenBars(app, tokens, { follows: following(trace, t) })),
      el(
        "dl.facts",
        fact("loss on this text", `${num(before)} → ${num(after)} nats per token`),
        fact("KL(untouched ‖ changed) here", `${num(divergence)} nats`),
      ),
    );
  }
  return { update };
}
