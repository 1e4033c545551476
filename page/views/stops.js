// The stops of the guided tour, in the order of the page: from a text into the stream.

/** What a stop does, by what a reader could do: {section, target, title, tell(app)}, and where it
    has them serves(app), whether this page can show it, and enter(app), what it presses, opens or
    switches off; afterwards the tour puts back what it was given. A stop that `writes` changes the
    text itself. */
const press = (selector) => document.querySelector(selector)?.click();
const runs = (app) => !app.frozen;
const naming = (app, { id, p }) => `${quoted(app.piece(id))} (${percent(p)})`;
const loudest = (values) => engine.largest(values.map(Math.abs), 1)[0];
/** The token at the selected position, in quotes. */
const selected = ({ trace, state }) => quoted(trace.pieces[state.position]);

const FIRST_STOPS = [
  {
    section: "opening",
    target: ".chips",
    title: "It guesses what comes next",
    enter: (app) => app.change({ position: Infinity }),
    tell(app) {
      const { trace } = app;
      const { nats, p } = app.scores(trace);
      const [first, second] = likeliest(trace, trace.shape.L, trace.shape.T - 1);
      const [least] = engine.largest(nats, 1);
      const surprise = `It was least prepared for ${quoted(trace.pieces[least + 1])}: ${percent(p[least])}. `;
      return (
        `This is all that a language model does. It has read ${count(trace.shape.T)} tokens and ` +
        `expects ${naming(app, first)} or ${naming(app, second)}. ${nats.length ? surprise : ""}` +
        (app.frozen ? "" : "Type, or click a chip, and it guesses anew.")
      );
    },
  },
  {
    section: "opening",
    target: ".chips",
    title: "Guessing again and again is writing",
    serves: runs,
    writes: true,
    enter: () => press("#opening .row .primary"),
    async leave() {
      press("#opening .writing .primary");
      await until(() => !document.querySelector("#opening .writing"));
    },
    tell: ({ data, final }) =>
      "It draws one of the chips, puts it behind the text, reads all of it again, and so on: that " +
      `is how ${runOf(data.title)} writes, with ${count(data.models[final].n_params)} numbers and ` +
      "nothing else. Click any word afterwards for what it might have been.",
  },
  {
    section: "glance",
    target: ".flow",
    title: "One token, followed",
    enter: () => press(".follow .primary"),
    tell: (app) =>
      `A frame follows ${selected(app)} from left to right through ${app.trace.shape.L} blocks. ` +
      `Each adds what its ${app.trace.shape.H} attention heads and its feed-forward network ` +
      "compute; what it would say changes below. " +
      (app.frozen
        ? "These numbers were computed when the page was made."
        : `All ${count(app.data.models[app.final].n_params)} weights are in this page, which computes it.`),
  },
  {
    section: "text",
    target: ".walk",
    title: "Text becomes numbers",
    tell({ trace }) {
      const { T, V } = trace.shape;
      const few = trace.pieces.slice(0, 4).map((piece, i) => `“${piece}” is ${trace.ids[i]}`);
      return (
        `The tokenizer knows ${count(V)} pieces. It cut the text into ${count(T)} of them: ` +
        `${few.join(", ")}${T > 4 ? " and so on" : ""}. From here on the model sees only these ` +
        "numbers."
      );
    },
  },
  {
    section: "ledger",
    target: ".norms",
    title: "A stream with additions",
    tell({ trace, config }) {
      const { L, C } = trace.shape;
      const kind = config().norm === "rmsnorm" ? "RMSNorm" : "LayerNorm";
      return (
        `Each position has a stream of ${C} numbers. ${L} decoder blocks read it, normalised ` +
        `(${kind}), and add to it, first attention, then a feed-forward network: the bars are how ` +
        "much. Because parts only add, the gradient finds its way through any number of blocks."
      );
    },
  },
  {
    section: "ledger",
    target: '[data-step="2"]',
    title: "Each number becomes a vector",
    enter: (app) => runs(app) && app.openCell("embed", loudest),
    tell(app) {
      const { shape, ids } = app.trace;
      const id = ids[app.state.position];
      return (
        `Token ${id}, ${selected(app)}, selects row ${id} of the embedding matrix: ${shape.C} ` +
        "numbers, learned in training. Blue is below zero, orange above. " +
        (app.frozen ? "" : "Its loudest number is opened; every other one can be, too.")
      );
    },
  },
  {
    section: "ledger",
    target: '[data-step="3"]',
    title: "Order matters",
    tell(app) {
      const t = app.state.position;
      return (
        "“Dog bites man” is not “man bites dog”. This model " +
        (app.config().position === "rope"
          ? `turns the queries and keys of position ${t} by ${t} times an angle, pair by pair ` +
            "(RoPE). The product of two of them then depends on how far apart they are."
          : `adds a learned vector for position ${t} to that of ${selected(app)}.`)
      );
    },
  },
  {
    section: "ledger",
    target: '[data-step="4.9"]',
    title: "Each position thinks alone",
    enter: (app) => runs(app) && app.openCell("hidden", loudest),
    tell({ trace, state, config, frozen }) {
      const { hidden, C } = trace.shape;
      const from = state.position * hidden;
      const values = trace.blocks[state.layer].hidden.subarray(from, from + hidden);
      const i = loudest(values);
      const kind = config().mlp === "swiglu" ? "SwiGLU" : "GELU";
      return (
        `The feed-forward network widens ${C} numbers to ${hidden}, bends them (${kind}) and comes ` +
        `back. Here, neuron ${i} of layer ${state.layer} answers loudest: ${num(values[i])}. ` +
        (frozen ? "" : "The sum behind it is opened.")
      );
    },
  },
];
