// Training: the run's snapshots on one slider, the loss curve, and how the heads' roles formed.

function makeTraining(app, root) {
  const collector = makeCollector(app, () => showCollected());
  const { models } = collector;
  const single = models.length < 2;
  const range = el("input", {
    type: "range",
    min: 0,
    max: models.length - 1,
    step: 1,
    "aria-label": "Snapshot",
    oninput: () => go(Number(range.value)),
  });
  const label = el("output.steplabel");
  const play = el("button.primary", { onclick: toggle }, "Play");
  const chart = makeLossChart(app, models);
  const frames = models.map(makeFrame);
  const film = el("div.film", { role: "group", "aria-label": "Snapshots" });
  film.append(...frames.map(({ node }) => node));
  const measures = [...Object.keys(ROLES), "entropy"];
  let [measure, timer, waiting] = [1, null, 0];
  const names = measures.map((key) => NAMES[key] ?? key);
  const pick = choices("Measure", names, (i) => {
    measure = i;
    showCurves();
  });
  const curves = el("canvas.curves", { role: "img", "aria-label": "How roles form" });
  const caption = el("p.note");
  const widthNow = widthOf(root, 600);
  const coarse = models.find(({ rounding }) => rounding !== app.data.models[app.final].rounding);
  refill(
    root,
    single
      ? el(
          "p.missing",
          "This page has no snapshots of the run, so there is one state of the model and nothing " +
            "to play. Training with --snapshots=12 keeps twelve.",
        )
      : el("div.row.scrub", play, range, label),
    chart.node,
    el("h3", "The selected head, and what the model wrote"),
    coarse && el("p.note", `Of the snapshots: ${coarse.rounding}`),
    film,
    !single && [el("div.row", el("h3", "How roles form"), pick.node), curves, caption],
  );

  const shown = () => models.findIndex(({ index }) => index === app.state.model);
  const go = (i) => app.change({ model: models[i].index });
  function toggle() {
    if (timer) return halt();
    if (shown() === models.length - 1) go(0);
    play.textContent = "Pause";
    play.classList.add("on");
    timer = setInterval(() => (shown() >= models.length - 1 ? halt() : go(shown() + 1)), 700);
  }
  function halt() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    play.classList.remove("on");
  }

  const update = () => {
    range.value = shown();
    label.textContent = `step ${count(models[shown()].step)}`;
    range.setAttribute("aria-valuetext", label.textContent);
    chart.draw();
    showCollected();
    if (view.visible) soon();
  };
  function soon() {
    clearTimeout(waiting);
    waiting = setTimeout(collector.collect, 250);
  }
  const view = { update, onVisible: (visible) => visible && app.trace && soon() };

  function makeFrame({ step, index }) {
    const [canvas, next, text] = [el("canvas"), el("span.guess"), el("span.sample")];
    const onclick = () => app.change({ model: index });
    const name = el("b", `step ${count(step)}`);
    return { node: el("button.frame1", { onclick }, name, canvas, next, text), canvas, next, text };
  }

  function showCollected() {
    const { layer, head, position, model } = app.state;
    const fresh = collector.text === JSON.stringify(app.ids);
    frames.forEach(({ node, canvas, next, text }, i) => {
      const { index } = models[i];
      setPressed(node, index === model);
      if (index === model) reveal(film, node);
      const result = collector.results.get(index);
      node.classList.toggle("stale", !result || !fresh);
      if (!result) return;
      drawHead(canvas, result, layer, head);
      const { id, p } = result.top[Math.min(position, result.top.length - 1)];
      next.textContent = `${num(result.loss)} nats · then ${showPiece(app.piece(id))} ${percent(p)}`;
      text.textContent = result.text.replace(/\s*\n\s*/g, " ⏎ ");
      node.title = `after the text, greedily: ${result.text}`;
    });
    if (!single) showCurves();
    if (collector.error) caption.textContent = collector.error;
  }

  function showCurves() {
    pick.press(measure);
    const key = measures[measure];
    const { layer, head } = app.state;
    const points = models
      .filter(({ index }) => collector.results.has(index))
      .map(({ step, index }) => ({ step, m: collector.results.get(index).measures }));
    if (!points.length) return void fit(curves, widthNow(), 190);
    const most = key === "entropy" ? points[0].m[0][0].most : 1;
    const now = models[shown()].step;
    const place = axesOverSteps(curves, [widthNow(), 190], [0, most], models.at(-1).step, now);
    const lines = points[0].m.flatMap((row, l) => row.map((_, h) => [l, h]));
    for (const [l, h] of [...lines, [layer, head]]) {
      const on = l === layer && h === head;
      const known = points.filter(({ m }) => m[l][h][key] !== null);
      polyline(
        place.context,
        known.map(({ step, m }) => [place.x(step), place.y(m[l][h][key])]),
        on ? paint.this : paint.soft,
        on ? { width: 3 } : { width: 1, alpha: 0.45 },
      );
    }
    const none = points.every(({ m }) => m[layer][head][key] === null);
    const mean = key === "entropy" ? "Mean entropy, in nats" : `Mean weight ${ROLES[key]}`;
    caption.textContent = none
      ? "No token of this text appears twice, so induction cannot be measured: repeat a phrase in " +
        "the text."
      : `${mean}, all heads; thick: layer ${layer}, head ${head}.`;
    curves.setAttribute("aria-label", caption.textContent);
  }
  return view;
}
