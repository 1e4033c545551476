// The text in large type: a text box, and behind its letters a tint for each token.

/** Wire the text box and its tints. `onPlace(i)` is told in which token the caret is put, null at
    the end; update() shows the trace; append(text, nats) writes on, ahead of the trace. */
function makeSheet(app, node, onPlace) {
  const box = node.querySelector("textarea");
  const tints = node.querySelector(".tints");
  const ghost = el("span.ghost");
  const cursor = el("i.cursor", "\u200b");
  let parts = []; // {text, nats, unread} of each token

  /** The tints of the tokens that the box still begins with, then what was typed since. */
  function paintTokens(chosen = null) {
    const spans = [];
    let at = 0;
    for (const part of parts) {
      if (!box.value.startsWith(part.text, at)) break;
      if (part.text) spans.push(makeTint(part, part === parts[chosen]));
      at += part.text.length;
    }
    refill(tints, spans, box.value.slice(at), cursor, ghost);
    node.classList.toggle("long", box.value.length > 420);
  }

  function makeTint({ text, nats, unread }, on) {
    const kind = unread ? "unread" : on ? "tint on" : "tint";
    const span = el("span", { class: kind }, text);
    span.style.setProperty("--surprise", surpriseShade(nats).toFixed(3));
    return span;
  }

  function update(chosen, guess) {
    const { nats } = app.scores(app.trace);
    parts = app.tokenizer.texts(app.all).map((text, i) => {
      const t = i - app.dropped;
      return { text, nats: nats[t - 1], unread: t < 0 };
    });
    box.readOnly = app.frozen;
    if (box.value !== app.state.text) box.value = app.state.text;
    ghost.textContent = guess;
    paintTokens(chosen === null ? null : chosen + app.dropped);
    if (chosen === null) node.scrollTop = node.scrollHeight;
  }

  function append(text, nats) {
    box.value += text;
    ghost.textContent = "";
    tints.insertBefore(makeTint({ text, nats }, false), cursor);
    node.scrollTop = node.scrollHeight;
  }

  /** The token before the caret, or null where the caret is at the end, or where nothing is read. */
  function tokenAt(offset) {
    if (offset >= box.value.length) return null;
    let end = 0;
    const i = parts.findIndex(({ text }) => (end += text.length) >= Math.max(1, offset));
    return i < app.dropped ? null : i - app.dropped;
  }

  const place = () => {
    if (box.selectionStart === box.selectionEnd) onPlace(tokenAt(box.selectionStart));
  };
  box.addEventListener("input", () => {
    ghost.textContent = "";
    paintTokens();
  });
  box.addEventListener("click", place);
  box.value = app.state.text;
  paintTokens();
  box.addEventListener("keyup", (event) => {
    if (/^(Arrow|Home|End|Page)/.test(event.key)) place();
  });
  return { box, update, append };
}
