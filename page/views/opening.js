// The first view: the text, what the model expects next, and letting it write.

const WRITTEN = 60; // tokens that the model writes at a time
const PACE = 40; // milliseconds a token, so that one can read along
const CHIPS = 5;

/** `root` is the body of the section, below the text box. */
function makeOpening(app, root) {
  const whose = document.getElementById("whose");
  const what = el("p.expects");
  const keyboard = el("span.keyboard", " (Tab takes the first)");
  let shown = []; // the tokens of the chips
  const chips = Array.from({ length: CHIPS }, (_, i) =>
    el("button.chip", { onclick: () => take(shown[i].id) }, el("span.name"), el("small")),
  );
  const rest = el("span.rest");
  const row = el("div.chips", { role: "group", "aria-label": "Likeliest tokens" }, chips, rest);
  const write = el("button.primary", {
    title: "With the sliders of Next token; at a temperature of 0.8 while none is moved",
    onclick: toggleWriting,
  });
  const undo = el("button.quiet", { onclick: takeBack }, "Undo");
  const note = el("span.soft", { role: "status" });
  const actions = el("div.row", write, undo, note, document.getElementById("examples"));
  root.append(what, row, actions);
  const sheet = makeSheet(app, root.parentNode.querySelector(".sheet"), choose);
  const past = []; // what was read before each token that was taken, and before each writing
  let replaced = null; // the token that a chip would take the place of; null: it goes to the end
  let lastClicked = false; // whether the last token was clicked: then that one may be replaced
  let [writing, seed, typed] = [null, 0, false];

  const update = () => {
    const { trace, state } = app;
    if (writing && state.text !== writing.text) stop({ keep: false });
    if (writing) return;
    const last = trace.shape.T - 1;
    replaced = state.position < last || lastClicked ? state.position : null;
    const at = replaced === null ? last : replaced - 1;
    const tokens = at < 0 ? [] : likeliest(trace, trace.shape.L, at);
    showChips(tokens, trace.ids[replaced ?? -1]);
    const ahead = replaced === null && state.text && !app.frozen;
    const guess = ahead ? app.tokenizer.texts([...app.all, tokens[0].id]).at(-1) : "";
    sheet.update(replaced, guess.replaceAll("\n", "⏎"));
    root.classList.remove("writing", "waiting");
    showWhose();
    showWords();
  };

  function showWhose() {
    const { n_params, step } = app.data.models[app.state.model];
    refill(
      whose,
      el("b", runOf(app.data.title)),
      `, a language model of ${count(n_params)} parameters` +
        (step === null ? "" : ` after ${count(step)} steps of training`) +
        (app.frozen ? ", has read this: " : ", reads along as you type: ") +
        "the stronger a word's colour, the less it expected it, and below is what it expects next.",
    );
  }

  function showWords() {
    const { trace } = app;
    const { p, rank } = app.scores(trace);
    refill(what, "It expects next", !app.frozen && keyboard);
    if (replaced !== null)
      what.textContent = replaced
        ? `Instead of ${quoted(trace.pieces[replaced])} (${percent(p[replaced - 1])}, ` +
          `rank ${count(rank[replaced - 1] + 1)}), it might have been`
        : `Nothing came before ${quoted(trace.pieces[0])} to expect it from`;
    write.hidden = app.frozen;
    write.textContent = "Let it write";
    undo.style.visibility = past.length ? "visible" : "hidden";
  }

  /** Show tokens {id, p} as chips that are as wide as they are likely; `taken` is the one in the text. */
  function showChips(tokens, taken) {
    shown = tokens;
    chips.forEach((node, i) => {
      node.hidden = !tokens[i];
      if (!tokens[i]) return;
      const { id, p } = tokens[i];
      const [name, share] = node.children;
      name.textContent = showPiece(app.piece(id));
      share.textContent = percent(p);
      node.style.flexGrow = 100 * p; // from 1 on in sum, so that they fill the row
      node.disabled = app.frozen;
      node.title = app.piece(id);
      node.classList.toggle("hit", id === taken);
    });
    const left = 1 - tokens.reduce((sum, token) => sum + token.p, 0);
    rest.hidden = !tokens.length || left < 0.001;
    rest.style.flexGrow = 100 * left;
    refill(rest, el("span", "all others"), el("small", percent(left)));
  }

  /** Put a token at the end, or in place of the one that it replaces. */
  function take(id) {
    if (writing) return stop({ keep: true });
    if (app.busy || app.frozen) return;
    remember();
    const ids = app.written();
    ids[replaced === null ? ids.length : app.dropped + replaced] = id;
    app.change({ ids, position: replaced ?? Infinity });
  }

  function remember() {
    past.push({ text: app.state.text, ids: app.state.ids });
    note.textContent = "";
  }

  function takeBack() {
    stop({ keep: false });
    const { text, ids } = past.pop() ?? app.state;
    if (ids) app.setIds(ids);
    else app.setText(text);
  }

  function choose(i) {
    lastClicked = i === app.trace?.shape.T - 1;
    if (app.trace && !writing && !app.busy) app.change({ position: i ?? Infinity });
  }

  function toggleWriting() {
    if (writing) stop({ keep: true });
    else letWrite();
  }

  function stop({ keep }) {
    if (!writing) return;
    app.client.cancel(writing.question.id);
    writing.keep = keep; // what is written already
    writing = null;
  }

  /** Stream what the model writes into the text box; then all views read it. */
  async function letWrite() {
    if (app.busy) return;
    remember();
    const { text, model, interventions } = app.state;
    const [ids, arrived, decoder] = [app.written(), [], new TextDecoder()];
    const settings = app.settings();
    const request = { model, settings, interventions, ids: app.ids, count: WRITTEN, seed: ++seed };
    const question = app.client.ask({ type: "write", ...request }, (part) => arrived.push(part));
    const mine = { text, question, keep: true };
    writing = mine;
    let ended = null;
    question.then(
      (answer) => (ended = answer.ended),
      (error) => (ended = error.message),
    );
    root.classList.add("writing");
    write.textContent = "Stop";
    what.textContent = "It chooses among";
    while (writing === mine && (ended === null || arrived.length)) {
      const part = arrived.shift();
      if (part && !app.data.tokenizer.end_of_text.includes(part.token)) show(part);
      await new Promise((resume) => setTimeout(resume, app.calm ? 0 : PACE));
    }
    if (writing === mine) writing = null;
    if (ended === "end of text") note.textContent = "Here it ended the text.";
    if (mine.keep) app.setIds(ids);

    function show({ token, p, alternatives }) {
      ids.push(token);
      sheet.append(decoder.decode(app.tokenizer.bytes(token), { stream: true }), -Math.log(p));
      showChips(alternatives.slice(0, CHIPS), token);
    }
  }

  // Tab takes the likeliest token once something was typed or clicked here; after Escape, and for
  // those who only pass, it moves on as everywhere.
  const { box } = sheet;
  box.addEventListener("focus", () => (typed = false));
  box.addEventListener("pointerdown", () => setTimeout(() => (typed = true)));
  box.addEventListener("input", () => {
    typed = true;
    lastClicked = false;
    past.length = 0;
    stop({ keep: false });
  });
  box.addEventListener("keydown", (event) => {
    const plain = !event.shiftKey && !event.altKey && !event.ctrlKey && !event.metaKey;
    if (event.key === "Tab" && plain && typed && replaced === null && !app.frozen)
      take(shown[0].id);
    else if (event.key === "z" && (event.ctrlKey || event.metaKey) && app.state.ids) takeBack();
    else return;
    event.preventDefault();
  });
  root.classList.add("waiting"); // for the model
  showWhose();
  return { update };
}
