// The stops of the guided tour from attention on, to what the reader does alone.

const played = (app) => app.data.models.filter(({ group }) => group === "run").length > 1;
const nats = (x) => `${num(x)} nats`;

/** The token that the last stop asks for: " queen" where the model has it, else the second
    likeliest word after the text that the tour began with. */
function wish(app) {
  const { trace } = app;
  const queen = app.tokenizer.encode(" queen").at(-1);
  const second = likeliest(trace, trace.shape.L, trace.shape.T - 1)[1];
  return (app.wish ??= /^.?queen$/.test(app.piece(queen)) ? queen : second.id);
}

const LATER_STOPS = [
  {
    section: "attention",
    target: ".maps",
    title: "Attention looks back",
    enter: (app) => app.change(bestHead(app.trace, app.state.position)),
    tell({ trace, state }) {
      const { layer, head, position } = state;
      const row = attentionRow(trace, layer, head, position);
      const named = (key) => `${quoted(trace.pieces[key])} (${percent(row[key])})`;
      const best = engine.largest(row, 3).map(named);
      return (
        `In layer ${layer}, head ${head}, ${quoted(trace.pieces[position])} takes most from ` +
        `${best.join(", ")}. It can see itself and what came before, never what comes later: the ` +
        "upper triangle is empty. A row of the map is a position; below it are arcs in the text."
      );
    },
  },
  {
    section: "attention",
    target: ".leaders",
    title: "Heads have roles",
    tell: ({ trace }) =>
      trace.shape.T < SHORTEST
        ? "With so few tokens, nothing can be said of what a head does. In a longer text, with a " +
          "phrase that comes twice, a head that reads what followed the earlier occurrence can " +
          "copy it. That is called induction."
        : "Training gives some heads a role: they look at the token before, at the first one, or " +
          "at what followed the same token earlier, so that they can copy it, which is called " +
          "induction. The list names the strongest head of each role, and says whether it has " +
          "learned it or looks there by chance.",
  },
  {
    section: "lens",
    target: ".lensbox",
    title: "A guess, refined",
    tell(app) {
      const { trace, state } = app;
      const said = (depth) => naming(app, likeliest(trace, depth, state.position)[0]);
      return (
        `After the last block come a final norm and one linear layer, from ${trace.shape.C} ` +
        `numbers to ${count(trace.shape.V)} scores. Applied early, they show the guess at each ` +
        `depth: from the embedding ${said(0)}, after layer 0 ${said(1)}, at the end ` +
        `${said(trace.shape.L)}.`
      );
    },
  },
  {
    section: "next",
    target: ".bars",
    title: "Scores become a choice",
    enter: ({ change, state }) => change({ settings: { ...state.settings, temperature: 0.5 } }),
    tell(app) {
      const { trace, state } = app;
      const [first] = likeliest(trace, trace.shape.L, state.position);
      const sharper = probabilities(trace, state.position, state.settings)[first.id];
      return (
        `Softmax makes probabilities of the scores, and sampling draws one. The temperature is ` +
        `${state.settings.temperature} now: ${quoted(app.piece(first.id))} has ` +
        `${percent(sharper)} instead of ${percent(first.p)}. Top-k, top-p and min-p cut off the ` +
        "unlikely ones; the sliders beside the bars are yours."
      );
    },
  },
  {
    section: "interventions",
    target: ".board",
    title: "Taken apart",
    serves: runs,
    enter: (app) =>
      app.change({ interventions: [{ layer: 0, part: "block", head: null, scale: 0 }] }),
    tell(app) {
      const { trace, beside, state } = app;
      if (!beside || !state.interventions.length)
        return "Any part can be switched off, and all views show the changed model beside the whole one.";
      return (
        "Block 0 is switched off. The loss on your text rises from " +
        `${nats(app.scores(beside).mean)} per token to ${nats(app.scores(trace).mean)}: that is ` +
        "what the block was for. Switch on and off what you like; “Switch each off in turn” " +
        "measures all of them."
      );
    },
  },
  {
    section: "training",
    target: "figure",
    title: "How it learned",
    enter: () => press(".scrub .primary:not(.on)"),
    leave: () => press(".scrub .primary.on"),
    tell(app) {
      const { mean } = app.scores(app.trace);
      const { V } = app.trace.shape;
      return (
        (played(app) ? "The run is played. " : "") +
        "Each step of training compared the probabilities with what really " +
        "followed, and moved all weights a little to where that is likelier. On your text, " +
        `${app.modelName(app.state.model)} loses ${nats(mean)} per token; guessing evenly would ` +
        `lose ln ${count(V)} = ${num(Math.log(V))}.`
      );
    },
  },
  {
    section: "opening",
    target: ".chips",
    title: "Now you",
    enter: (app) => app.change({ position: Infinity }),
    tell(app) {
      if (app.frozen)
        return (
          "That was the whole pipeline. What you saw was computed when the page was made, for the " +
          "given texts alone: its last lines say with which --max_mb the model itself runs in it, " +
          "to be typed to and taken apart."
        );
      const { trace } = app;
      const id = wish(app);
      const p = probabilities(trace, trace.shape.T - 1);
      const rank = p.reduce((n, x) => n + (x > p[id]), 1);
      if (rank === 1)
        return (
          `You did it: ${quoted(app.piece(id))} is what it expects most, with ${percent(p[id])}. ` +
          "The sections below show how it came to that. Send the address, and others see it too."
        );
      return (
        `A task: write so that the model wants to say ${quoted(app.piece(id))} next. Now that has ` +
        `${percent(p[id])}, rank ${count(rank)} of ${count(trace.shape.V)}. It is done when it is ` +
        "the first of the chips."
      );
    },
  },
];
