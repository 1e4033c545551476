// What became of the text: pieces, ids, how well each was predicted.

function makeText(app, root) {
  const [pieces, ids] = [el("span"), el("span")];
  const list = (items) => el("p.mono", { tabindex: 0 }, "[", items, "]");
  const arrow = el("p.arrow", { "aria-hidden": "true" }, "↓");
  const facts = el("dl.facts");
  const card = el("div.card.selected-token");
  const neighbours = makeNeighbours(app);
  const lists = el("div.walk", list(pieces), arrow, list(ids));
  root.append(el("div.two", el("div", lists, facts), card), neighbours.node);

  const update = (names) => {
    const { trace, state } = app;
    showList(pieces, (i) => `"${trace.pieces[i]}"`);
    showList(ids, (i) => String(trace.ids[i]));
    if (names.has("trace")) showFacts();
    showToken(state.position);
    neighbours.show(view.visible);
  };
  const view = { update, onVisible: neighbours.show };

  function showList(node, textOf) {
    const make = (i) =>
      el("span", i ? ", " : "", el("span.item", { onclick: () => app.change({ position: i }) }));
    fillUp(node, app.trace.shape.T, make).forEach(({ lastChild: item }, i) => {
      write(item, textOf(i));
      item.classList.toggle("on", i === app.state.position);
    });
  }

  function showFacts() {
    const { trace, beside } = app;
    const { T } = trace.shape;
    const bytes = new TextEncoder().encode(app.state.text).length;
    const both = (name, f, title) => {
      const second = beside && f(app.scores(beside).mean);
      return fact(name, f(app.scores(trace).mean), { second, title });
    };
    const alike = "as unsure as if choosing among so many tokens alike";
    refill(
      facts,
      fact("tokens", count(T), { title: "what the model reads" }),
      fact("bytes per token", num(bytes / app.all.length), { title: "in UTF-8" }),
      both("nats per token", (x) => num(x), "mean surprise, the loss on this text"),
      both("perplexity", (x) => num(Math.exp(x)), alike),
    );
  }

  function showToken(i) {
    const { trace } = app;
    const { T, L, V } = trace.shape;
    const { p, rank, nats } = app.scores(trace);
    const whole = wholeCharacter(trace.ids, i);
    const rows = [
      ["token id", String(trace.ids[i])],
      ["position", `${i} of ${T}`],
    ];
    if (i)
      rows.push(
        ["probability", percent(p[i - 1])],
        ["rank", `${count(rank[i - 1] + 1)} of ${count(V)}`],
        ["surprise", `${num(nats[i - 1])} nats`],
      );
    const bars = () => tokenBars(app, likeliest(trace, L, i - 1), { follows: trace.ids[i] });
    const expected = i
      ? [el("h3", "what was expected here"), el("div.bars", bars())]
      : el("p.note", "The first token: there was nothing to predict it from.");
    refill(
      card,
      el("p.big", showPiece(trace.pieces[i])),
      whole &&
        el(
          "p.note",
          `Bytes of ${whole.character}, which the tokenizer has no token for: tokens ` +
            `${whole.from} to ${whole.to} are this character.`,
        ),
      el(
        "dl.pairs",
        rows.map(([name, value]) => [el("dt", name), el("dd", value)]),
      ),
      expected,
    );
  }

  /** The character that token i is a part of, and from which token to which, or null. */
  function wholeCharacter(ids, i) {
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    const bytesOf = (id) => app.tokenizer.bytes(id);
    for (let from = i; from > i - 4 && from >= 0; from--)
      for (let to = Math.max(i, from + 1); to < from + 4 && to < ids.length; to++)
        try {
          const bytes = Array.from(ids.slice(from, to + 1)).flatMap((id) => [...bytesOf(id)]);
          const character = decoder.decode(Uint8Array.from(bytes));
          if ([...character].length === 1) return { character, from, to };
        } catch {
          // not a whole character: try another range
        }
    return null;
  }
  return view;
}
