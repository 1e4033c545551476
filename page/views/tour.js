// The guided tour: from raw text to the training loop, on this model's own numbers.

/** The stops, in the order of the pipeline: {section, target, title, tell(app)}. */
const STOPS = [
  {
    section: "glance",
    target: ".flowbox",
    title: "This is your model",
    tell: ({ trace, data, final }) => {
      const { L, H, T } = trace.shape;
      return (
        `All ${count(data.models[final].n_params)} weights of it are in this page, and it has just ` +
        `read your ${count(T)} tokens. They go in at the left. Each of the ${L} blocks adds what ` +
        `its ${H} attention heads and its feed-forward network compute, and at the right come ` +
        "the probabilities of the next token. Now step by step."
      );
    },
  },
  {
    section: "text",
    target: ".walk",
    title: "Text becomes numbers",
    tell: ({ trace }) => {
      const { T, V } = trace.shape;
      const few = trace.pieces.slice(0, 4).map((piece, i) => `“${piece}” is ${trace.ids[i]}`);
      return (
        `The tokenizer knows ${count(V)} pieces. It cut your text into ${count(T)} of them: ` +
        `${few.join(", ")}${T > 4 ? " and so on" : ""}. From here on the model sees only these ` +
        "numbers. Type in the box and watch them change."
      );
    },
  },
  {
    section: "ledger",
    target: '[data-step="2"]',
    title: "Each number becomes a vector",
    tell: ({ trace, state }) => {
      const { C } = trace.shape;
      const t = state.position;
      return (
        `Token ${trace.ids[t]}, ${quoted(trace.pieces[t])}, selects row ${trace.ids[t]} of the ` +
        `embedding matrix: ${C} numbers, learned in training. Blue is below zero, orange above. ` +
        "Click a cell to see where it comes from. This vector is the start of the residual " +
        "stream, which every later step reads and adds to."
      );
    },
  },
  {
    section: "ledger",
    target: '[data-step="3"]',
    title: "Order matters",
    tell: ({ trace, state, config }) =>
      config().position === "rope"
        ? "“Dog bites man” is not “man bites dog”. This model turns the queries and keys of " +
          `position ${state.position} by ${state.position} times an angle, pair by pair (RoPE). ` +
          "The product of two of them then depends on how far apart they are."
        : `“Dog bites man” is not “man bites dog”. This model adds a learned vector for position ` +
          `${state.position} to that of ${quoted(trace.pieces[state.position])}.`,
  },
  {
    section: "ledger",
    target: ".norms",
    title: "A stream with additions",
    tell: ({ trace, config }) => {
      const { L, C } = trace.shape;
      const kind = config().norm === "rmsnorm" ? "RMSNorm" : "LayerNorm";
      return (
        `${L} decoder blocks follow. Each takes the stream, normalises it (${kind}), lets ` +
        "attention read it, adds the result, and does the same with a feed-forward network. The " +
        `shape never changes: ${C} numbers for each position. Because parts only add, the ` +
        "gradient finds its way through any number of blocks."
      );
    },
  },
  {
    section: "attention",
    target: ".mapbox",
    title: "Attention looks back",
    tell: ({ trace, state }) => {
      const { T } = trace.shape;
      const { layer, head, position: t } = state;
      const row = trace.blocks[layer].attention.subarray(
        (head * T + t) * T,
        (head * T + t) * T + t + 1,
      );
      const best = engine
        .largest(row, Math.min(3, t + 1))
        .map((key) => `${quoted(trace.pieces[key])} (${percent(row[key])})`);
      return (
        `In layer ${layer}, head ${head}, ${quoted(trace.pieces[t])} takes most from ` +
        `${best.join(", ")}. It can see itself and what came before, never what comes later: the ` +
        "upper triangle is empty. Move over the map to see each row as arcs in the text."
      );
    },
  },
  {
    section: "attention",
    target: ".heads",
    title: "Heads have roles",
    tell: ({ trace }) => {
      const counts = new Map();
      for (const role of measureHeads(trace).flat().map(roleOf))
        counts.set(role, (counts.get(role) ?? 0) + 1);
      const list = [...counts].map(([role, n]) => `${n} × ${role}`).join(", ");
      if (trace.shape.T < SHORTEST)
        return (
          "With so few tokens, nothing can be said of what a head " +
          "does. Write a longer text, with a phrase in it that comes twice: a head that finds " +
          "the earlier occurrence and reads what followed it can copy. That is called induction."
        );
      return (
        `Of ${trace.shape.L * trace.shape.H} heads, on this text: ${list}. A head that looks at ` +
        "the token before and one that looks for earlier occurrences together can copy: that is " +
        "called induction. Repeat a phrase in the text, and look for it."
      );
    },
  },
  {
    section: "ledger",
    target: '[data-step="4.9"]',
    title: "Each position thinks alone",
    tell: ({ trace, state, config }) => {
      const { hidden, C } = trace.shape;
      const values = trace.blocks[state.layer].hidden.subarray(
        state.position * hidden,
        (state.position + 1) * hidden,
      );
      const i = engine.largest(values.map(Math.abs), 1)[0];
      return (
        `The feed-forward network widens ${C} numbers to ${hidden}, bends them ` +
        `(${config().mlp === "swiglu" ? "SwiGLU" : "GELU"}) and comes back. Here, neuron ${i} of ` +
        `layer ${state.layer} answers loudest: ${num(values[i])}. Click it for the sum behind it.`
      );
    },
  },
  {
    section: "lens",
    target: ".lensbox",
    title: "A guess, refined",
    tell: ({ trace, state, piece }) => {
      const { L } = trace.shape;
      const t = state.position;
      const said = (depth) => {
        const [{ id, p }] = likeliest(trace, depth, t);
        return `${quoted(piece(id))} (${percent(p)})`;
      };
      return (
        `After the last block come a final norm and one linear layer, from ${trace.shape.C} ` +
        `numbers to ${count(trace.shape.V)} scores. Applied early, they show the guess at each ` +
        `depth: from the embedding ${said(0)}, after layer 0 ${said(1)}, at the end ${said(L)}.`
      );
    },
  },
  {
    section: "next",
    target: ".bars",
    title: "Scores become a choice",
    tell: ({ trace, state, piece }) => {
      const t = state.position;
      const three = likeliest(trace, trace.shape.L, t).slice(0, 3);
      const top = three.map(({ id, p }) => `${quoted(piece(id))} ${num(p, 2)}`);
      return (
        `Softmax makes probabilities of the scores. After position ${t}: ${top.join(", ")}. ` +
        "Sampling draws one; temperature, top-k, top-p and min-p say from which. Then that token " +
        "joins the text and everything runs again. Press Write."
      );
    },
  },
  {
    section: "training",
    target: "figure",
    title: "How it learned",
    tell: (app) => {
      const { nats, mean } = app.scores(app.trace);
      const even = Math.log(app.trace.shape.V);
      return (
        "Training compares each position's probabilities with the token that really followed. " +
        `On your text the model loses ${nats.length ? num(mean) : "–"} nats per token; guessing ` +
        `evenly would lose ln ${count(app.trace.shape.V)} = ${num(even)}. Backpropagation turns ` +
        "that into a gradient, the optimizer takes a step, and again. Play the snapshots to see " +
        "it happen."
      );
    },
  },
  {
    section: "interventions",
    target: ".board",
    title: "Now take it apart",
    tell: () =>
      "Switch off a head or a whole block and see what breaks, or let the page measure every " +
      "part in turn. And the model's size: Compare sets another one beside it. That was the " +
      "whole pipeline; everything you saw was computed in this page, from the weights in it.",
  },
];

/** Build the tour's card; returns {start, update}. */
function makeTour(app, root) {
  let at = -1;
  const [title, text, where] = [el("h3"), el("p"), el("span", { class: "soft" })];
  const back = el("button", { type: "button", onclick: () => go(at - 1) }, "Back");
  const next = el(
    "button",
    { type: "button", class: "primary", onclick: () => go(at + 1) },
    "Next",
  );
  const close = el(
    "button",
    { type: "button", class: "quiet", "aria-label": "End the tour", onclick: end },
    "✕",
  );
  root.append(
    el("div", { class: "tourhead" }, title, close),
    text,
    el("div", { class: "row" }, where, back, next),
  );
  root.addEventListener("keydown", (event) => event.key === "Escape" && end());

  function mark() {
    document.querySelector(".toured")?.classList.remove("toured");
    if (at < 0) return null;
    const { section, target } = STOPS[at];
    const place =
      document.querySelector(`#${section} ${target}`) ?? document.getElementById(section);
    place.classList.add("toured");
    return place;
  }

  function go(i) {
    if (i >= STOPS.length) return end();
    at = Math.max(0, i);
    root.hidden = false;
    update();
    const place = mark();
    const bar = document.getElementById("bar").getBoundingClientRect().height;
    const top = place.getBoundingClientRect().top + window.scrollY;
    window.scrollTo({ top: top - bar - 60, behavior: app.calm ? "auto" : "smooth" });
    next.focus({ preventScroll: true });
  }

  function end() {
    at = -1;
    mark();
    root.hidden = true;
  }

  function update() {
    if (at < 0 || !app.trace) return;
    title.textContent = STOPS[at].title;
    text.textContent = STOPS[at].tell(app);
    where.textContent = `${at + 1} of ${STOPS.length}`;
    back.disabled = at === 0;
    next.textContent = at === STOPS.length - 1 ? "End" : "Next";
  }
  return { start: () => go(0), update };
}

Object.assign(globalThis, { makeTour, STOPS });
