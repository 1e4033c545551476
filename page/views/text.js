// What became of the text: pieces, ids, how well each was predicted.

/** The section: pieces and ids as lists, how well the text was predicted, the selected token. */
function makeText(app, root) {
  const [pieces, ids, items] = [el("span"), el("span"), []];
  const lists = el(
    "div.walk",
    el("p.mono", { tabindex: 0 }, "[", pieces, "]"),
    el("p.arrow", { "aria-hidden": "true" }, "↓"),
    el("p.mono", { tabindex: 0 }, "[", ids, "]"),
  );
  const facts = el("dl.facts");
  const card = el("div.card.selected-token");
  const neighbours = makeNeighbours(app);
  root.append(el("div.two", el("div", lists, facts), card), neighbours.node);

  const update = (names) => {
    if (["trace", "theme"].some((name) => names.has(name))) showLists();
    else markSelected();
    showToken();
    neighbours.show(view.visible);
  };
  const view = { update, onVisible: neighbours.show };

  function showLists() {
    const { trace } = app;
    while (items.length < trace.shape.T) items.push(makeItem(items.length));
    while (items.length > trace.shape.T)
      for (const node of Object.values(items.pop())) node.parentNode.remove();
    items.forEach(({ piece, id }, i) => {
      if (piece.textContent !== `"${trace.pieces[i]}"`) piece.textContent = `"${trace.pieces[i]}"`;
      if (id.textContent !== String(trace.ids[i])) id.textContent = trace.ids[i];
    });
    markSelected();
    facts.replaceChildren(...showFacts());
  }

  function makeItem(i) {
    const [piece, id] = [pieces, ids].map((list) => {
      const item = el("span.item", { onclick: () => app.change({ position: i }) });
      list.append(el("span", i ? ", " : "", item));
      return item;
    });
    return { piece, id };
  }

  function markSelected() {
    items.forEach(({ piece, id }, i) => {
      for (const node of [piece, id]) node.classList.toggle("on", i === app.state.position);
    });
  }

  function showFacts() {
    const { trace, beside } = app;
    const { mean } = app.scores(trace);
    const other = beside ? app.scores(beside).mean : null;
    const bytes = new TextEncoder().encode(app.state.text).length;
    const both = (name, f, title) =>
      fact(name, f(mean), { second: other === null ? null : f(other), title });
    return [
      fact("tokens", count(trace.shape.T), { title: "what the model reads" }),
      fact("bytes per token", num(bytes / Math.max(1, trace.shape.T)), { title: "in UTF-8" }),
      both("nats per token", (x) => num(x), "mean surprise, the loss on this text"),
      both(
        "perplexity",
        (x) => num(Math.exp(x)),
        "as unsure as if choosing among so many tokens alike",
      ),
    ];
  }

  function showToken() {
    const { trace, state } = app;
    const [i, L] = [state.position, trace.shape.L];
    const scores = app.scores(trace);
    const whole = wholeCharacter(trace.ids, i);
    const rows = [
      ["token id", String(trace.ids[i])],
      ["position", `${i} of ${trace.shape.T}`],
    ];
    if (i)
      rows.push(
        ["probability", percent(scores.p[i - 1])],
        ["rank", `${count(scores.rank[i - 1] + 1)} of ${count(trace.shape.V)}`],
        ["surprise", `${num(scores.nats[i - 1])} nats`],
      );
    const expected = i ? tokenBars(app, likeliest(trace, L, i - 1), { follows: trace.ids[i] }) : [];
    refill(
      card,
      el("p.big", showPiece(trace.pieces[i])),
      whole &&
        el(
          "p.note",
          `Bytes of ${whole.character}, which the tokenizer has no ` +
            `token for: tokens ${whole.from} to ${whole.to} are this character.`,
        ),
      el(
        "dl.pairs",
        rows.map(([name, value]) => [el("dt", name), el("dd", value)]),
      ),
      i
        ? el("h3", "what was expected here")
        : el("p.note", "The first token: there was nothing to predict it from."),
      el("div.bars", expected),
    );
  }
  /** The character that token i is a part of, and from which token to which, or null. */
  function wholeCharacter(ids, i) {
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    for (let from = i; from > i - 4 && from >= 0; from--)
      for (let to = Math.max(i, from + 1); to < from + 4 && to < ids.length; to++)
        try {
          const bytes = Array.from(ids.slice(from, to + 1)).flatMap((id) => [...app.bytes(id)]);
          const character = decoder.decode(Uint8Array.from(bytes));
          if ([...character].length === 1) return { character, from, to };
        } catch {
          // not a whole character: try another range
        }
    return null;
  }
  return view;
}

Object.assign(globalThis, { makeText });
