// What each snapshot of the run makes of the text: read one after the other, kept until it changes.

/** Collects, for the present text, from every snapshot: loss, measures and maps of heads, the
    likeliest next token at each position, and a greedy continuation. `onPart` is called
    as they arrive. */
function makeCollector(app, onPart) {
  const models = app.data.models
    .map((model, index) => ({ ...model, index, step: model.step ?? 0 }))
    .filter(({ group }) => group === "run")
    .sort((a, b) => a.step - b.step);
  const collector = { models, results: new Map(), text: "" };
  let running = false;

  /** Read what has not been read; ends early when the text has changed, and begins anew. */
  collector.collect = async () => {
    if (running) return;
    running = true;
    try {
      for (;;) {
        const text = JSON.stringify(app.ids);
        if (collector.text !== text) collector.results.clear();
        collector.text = text;
        const next = models.find(({ index }) => !collector.results.has(index));
        if (!next) break;
        const result = await readSnapshot(app, next.index, app.ids.slice());
        if (text !== JSON.stringify(app.ids)) continue;
        collector.results.set(next.index, result);
        onPart();
      }
    } catch (error) {
      collector.error = error.message;
      onPart();
    }
    running = false;
  };
  return collector;
}

async function readSnapshot(app, model, ids) {
  const trace = await app.read(model, ids, []);
  const { L, T } = trace.shape;
  const result = {
    loss: app.scores(trace).mean,
    measures: measureHeads(trace),
    shape: trace.shape,
    mark: trace.mark, // for drawHead, as are the blocks
    blocks: trace.blocks.map(({ attention }) => ({ attention })),
    top: Array.from({ length: T }, (_, t) => likeliest(trace, L, t)[0]),
    text: "",
  };
  if (!app.frozen) {
    const tokens = [];
    const request = { type: "write", model, ids, count: 16, settings: { temperature: 0 } };
    await app.client.ask(request, (part) => tokens.push(part.token));
    result.text = app.tokenizer.decode(tokens);
  }
  return result;
}
