// Training: the run's snapshots on one slider, the loss curve, and how the heads' roles formed.

const MEASURES = [
  ["induction", "what followed the present token before"],
  ["previous", "the token before"],
  ["first", "the first token"],
  ["entropy", "entropy, in nats"],
];

/** Build the section. */
function makeTraining(app, root) {
  const collector = makeCollector(app, () => showCollected());
  const { models } = collector;
  if (models.length < 2)
    root.append(
      el(
        "p.missing",
        "This run kept no snapshots, so there is one state of the model and nothing to play. ",
        "Train with --snapshots=12 to keep twelve.",
      ),
    );
  const range = el("input", {
    type: "range",
    min: 0,
    max: models.length - 1,
    step: 1,
    "aria-label": "Snapshot",
  });
  const label = el("output.steplabel");
  const play = el("button.primary", { onclick: toggle }, "Play");
  const chart = makeLossChart(app, models);
  const film = el("div.film", { role: "group", "aria-label": "Snapshots" });
  const pick = choices(
    "Measure",
    ["induction", "previous token", "first token", "entropy"],
    (i) => {
      measure = i;
      showCurves();
    },
  );
  const curves = el("canvas.curves", { role: "img", "aria-label": "How roles form" });
  const caption = el("p.note");
  const widthNow = widthOf(root, 600);
  let [measure, timer, frames] = [1, null, []];
  range.addEventListener("input", () => go(Number(range.value)));
  root.append(
    (models.length > 1 && el("div.row.scrub", play, range, label)) || "",
    chart.node,
    el("h3", "The selected head, and what it wrote"),
    film,
    el("div.row", el("h3", "How roles form"), pick.node),
    curves,
    caption,
  );
  const coarse = models.find(({ model }) => model.rounding !== app.data.models[app.final].rounding);
  if (coarse) film.before(el("p.note", `Of the snapshots: ${coarse.model.rounding}`));
  if (models.length < 2)
    [curves.hidden, caption.hidden, pick.node.parentNode.hidden] = [true, true, true];

  const shown = () => models.findIndex(({ index }) => index === app.state.model);
  function go(i) {
    app.change({ model: models[i].index });
  }
  function toggle() {
    if (timer) return halt();
    if (shown() === models.length - 1 || shown() < 0) go(0);
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

  const update = (names) => {
    if (names.has("error")) return;
    const i = shown();
    if (i >= 0) range.value = i;
    label.textContent =
      i < 0 ? "another model is shown" : `step ${count(models[i].model.step ?? 0)}`;
    range.setAttribute("aria-valuetext", label.textContent);
    chart.draw();
    showCollected();
    if (view.visible) soon();
  };
  let waiting = 0;
  function soon() {
    clearTimeout(waiting);
    waiting = setTimeout(collector.collect, 250);
  }
  const view = { update, onVisible: (visible) => visible && app.trace && soon() };

  function showCollected() {
    if (!app.trace) return;
    if (!frames.length) {
      frames = models.map(({ model, index }) => {
        const [canvas, step, next, text] = [
          el("canvas"),
          el("b"),
          el("span.guess"),
          el("span.sample"),
        ];
        const node = el(
          "button.frame1",
          { onclick: () => app.change({ model: index }) },
          step,
          canvas,
          next,
          text,
        );
        step.textContent = `step ${count(model.step ?? 0)}`;
        return { node, canvas, next, text, index };
      });
      film.replaceChildren(...frames.map((frame) => frame.node));
    }
    const current = frames.find(({ index }) => index === app.state.model);
    if (current) reveal(film, current.node);
    const fresh = collector.text === JSON.stringify(app.ids);
    for (const { node, canvas, next, text, index } of frames) {
      node.setAttribute("aria-pressed", String(index === app.state.model));
      const result = collector.results.get(index);
      node.classList.toggle("stale", !result || !fresh);
      if (!result) continue;
      const { layer, head, position } = app.state;
      if (layer < result.shape.L && head < result.shape.H) drawHead(canvas, result, layer, head);
      const t = Math.min(position, result.top.length - 1);
      next.textContent =
        `${num(result.loss)} nats · then ${showPiece(app.piece(result.top[t].id))} ` +
        percent(result.top[t].p);
      text.textContent = result.text.replace(/\s*\n\s*/g, " ⏎ ");
      node.title = `after the text, greedily: ${result.text}`;
    }
    if (collector.error) caption.textContent = collector.error;
    showCurves();
  }

  function showCurves() {
    pick.press(measure);
    if (models.length < 2) return;
    const key = MEASURES[measure][0];
    const { layer, head } = app.state;
    const points = models
      .filter(({ index }) => collector.results.has(index))
      .map(({ model, index }) => ({
        step: model.step ?? 0,
        m: collector.results.get(index).measures,
      }));
    const [width, height] = [widthNow(), 190];
    const context = fit(curves, width, height);
    if (!points.length) return;
    const none = points.every(({ m }) => m[layer][head][key] === null);
    const most = key === "entropy" ? points[0].m[0][0].most : 1;
    const place = axes(context, width, height, models.at(-1).model.step ?? 1, 0, most);
    const lines = points[0].m.flatMap((row, l) => row.map((_, h) => [l, h]));
    for (const [l, h] of [...lines, [layer, head]]) {
      const on = l === layer && h === head;
      polyline(
        context,
        points
          .filter(({ m }) => m[l][h][key] !== null)
          .map(({ step, m }) => [place.x(step), place.y(m[l][h][key])]),
        on ? paint.this : paint.soft,
        on ? 3 : 1,
        on ? 1 : 0.45,
      );
    }
    const now = models[shown()]?.model.step;
    if (now !== undefined) cursor(context, place.x(now), height);
    caption.textContent = none
      ? "No token of this text appears twice, so induction cannot be measured: " +
        "repeat a phrase in the text."
      : `Mean weight on ${MEASURES[measure][1]}`.replace("Mean weight on entropy", "Mean entropy") +
        `, all heads; thick: layer ${layer}, head ${head}.`;
    curves.setAttribute("aria-label", caption.textContent);
  }
  return view;
}

Object.assign(globalThis, { makeTraining });
