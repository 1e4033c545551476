// The neighbours of a token: whose embeddings point nearly the same way, and what it is made of.

const NEAREST = 8;

/** What is known of the selected token apart from this text; `show(visible)` asks for it once it
    can be seen, for it takes a pass over the whole vocabulary. */
function makeNeighbours(app) {
  const title = el("h3", "Neighbours");
  const [now, before, made] = [el("div"), el("div"), el("div")]; // now, before training, merges
  const node = el("div.neighbours", title, el("div.two.three", now, before, made));
  const answers = new Map(); // what was asked -> a promise of the answer
  let shown = "";

  function show(visible) {
    if (!visible || !app.trace) return;
    const { trace, state } = app;
    const id = trace.ids[state.position];
    const wanted = `${state.model} ${id}`;
    if (wanted === shown) return;
    shown = wanted;
    title.textContent = `What else is known of ${quoted(app.piece(id))}`;
    refill(made, showMerges(id));
    if (app.frozen) {
      const note = "Its neighbours cannot be found: the weights of this model are not in the page.";
      return refill(now, el("p.note", note));
    }
    const first = app.data.models.findIndex((model) => model.snapshot);
    for (const column of [now, before]) refill(column);
    fill(now, state.model, id, wanted);
    if (first >= 0 && first !== state.model) fill(before, first, id, wanted);
  }

  async function fill(column, model, id, wanted) {
    const key = `${model} ${id}`;
    if (!answers.has(key))
      answers.set(key, app.client.ask({ type: "nearest", model, token: id, count: NEAREST }));
    const { ids, cosines } = await answers.get(key);
    if (wanted !== shown) return;
    const { step } = app.data.models[model];
    const at = step === null ? "" : step ? `, step ${count(step)}` : ", before training";
    const rows = ids.map((other, i) => {
      const title = `the cosine of the angle between both is ${num(cosines[i])}`;
      const name = showPiece(app.piece(other));
      return barRow(name, cosines[i], { kind: "near", value: cosines[i].toFixed(2), title });
    });
    refill(column, el("h4", `nearest embeddings${at}`), rows);
  }

  function showMerges(id) {
    const steps = app.tokenizer.merges(id);
    const line = ({ left, right, rank }) => {
      const name = el("span.name", `${showPiece(left)} + ${showPiece(right)}`);
      return el("li", name, el("small", `merge ${count(rank + 1)}`));
    };
    return [
      el("h4", "how its pieces were joined"),
      steps
        ? el("ol.merges", steps.map(line))
        : el("p.note", "No merge made it: it is a piece from the beginning."),
    ];
  }
  return { node, show };
}
