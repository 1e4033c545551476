// The chat: what is said, and in each answer what every token of it might have been instead.

const MOST_SHOWN = 6; // of what a token might have been

/** Return the function that puts the caret into the box. */
async function makeChat(app, root, blobs) {
  const { frames, as_text, ends: endOfText } = app.data.chat;
  const tokenizer = await engine.loadTokenizer(app.data.tokenizer, blobs, as_text);
  const conversation = new engine.Conversation(app.data.chat, tokenizer);
  const system = el("input", { type: "text", placeholder: "What it is told before you speak" });
  const told = el("label.system", "System", system);
  const turns = el("div");
  const talk = el("div.talk", { role: "group", tabindex: 0 }, turns);
  const box = el("textarea", { rows: 1, "aria-label": "Your message", autocomplete: "off" });
  const sending = el("button.primary", { onclick: send }, "Send");
  const stopping = el("button.primary", { onclick: stop }, "Stop");
  const again = el("button.quiet", { onclick: () => answer(exchanges.at(-1)) }, "Again");
  const fresh = el("button.quiet", { onclick: begin }, "New");
  const inside = el("button.quiet", { onclick: lookInside }, "Look inside");
  const note = el("span.soft", { role: "status" });
  const heard = el("p.hidden", { role: "status" }); // a whole answer, to be read aloud
  const cut = el("p.cut", "The context is full: the model reads from here on.");
  const instead = el("div.instead");
  const ask = (text) => {
    box.value = text;
    send();
  };
  const examples = app.data.prompts.map((text) =>
    el("button.quiet", { onclick: () => ask(text) }, text),
  );
  const first = el("div.starters", "For example:", examples);
  first.hidden = !frames; // texts that a model without a template goes on with are long
  root.append(told, talk, el("div.say", box, sending, stopping));
  root.append(el("div.row", again, fresh, inside, note), heard, first);
  talk.ariaLabel = "Turns";
  told.hidden = !frames?.["begin system"]; // which the template does not write
  box.placeholder = frames ? "Say something" : "Begin a text: the model goes on with it";
  sending.title = "With the sliders of Next token; at a temperature of 0.8 while none is moved";
  const exchanges = []; // {question, prompt, parts: [{token, p, alternatives, ends}], node, words}
  let [running, seed, chosen] = [null, 0, null]; // {question, exchange}; {exchange, i}

  const idsOf = (parts) => parts.map(({ token }) => token);
  const textsOf = (parts) => conversation.texts(idsOf(parts.filter(({ ends }) => !ends)));

  /** The messages up to the question of an exchange. */
  function messagesOf(exchange) {
    const earlier = exchanges.slice(0, exchanges.indexOf(exchange)).flatMap((one) => [
      { role: "user", content: one.question },
      { role: "assistant", content: conversation.said(textsOf(one.parts).join("")) },
    ]);
    const first = system.value ? [{ role: "system", content: system.value }] : [];
    return [...first, ...earlier, { role: "user", content: exchange.question }];
  }

  function begin() {
    exchanges.length = 0;
    [chosen, note.textContent, first.hidden] = [null, "", !frames];
    refill(turns);
    showButtons();
    toBox();
  }

  function send() {
    if (running || !box.value.trim()) return;
    exchanges.push({ question: box.value });
    if (answer(exchanges.at(-1))) box.value = "";
    else exchanges.pop(); // the message stays in the box
    toBox();
  }

  /** Let the model answer, after the parts in `head`, which were chosen; false where it cannot. */
  function answer(exchange, head = []) {
    try {
      exchange.prompt = conversation.fit(messagesOf(exchange), app.config().max_seq_len);
    } catch (problem) {
      note.textContent = `Not sent: ${problem.message}.`;
      return false;
    }
    [exchange.parts, chosen, first.hidden] = [head, null, true];
    if (!exchange.node) turns.append((exchange.node = el("div")));
    exchange.words = el("div.turn.answer", { role: "group", dir: "auto" });
    const asked = el("p.turn.asked", { dir: "auto" }, exchange.question);
    refill(exchange.node, asked, exchange.words);
    head.forEach((_, i) => showWord(exchange, i));
    for (const old of [cut, instead]) old.remove();
    talk.querySelector(".word.on")?.classList.remove("on");
    if (exchange.prompt.leftOut) exchanges[exchange.prompt.leftOut].node.before(cut);
    talk.scrollTop = 0; // its end
    if (head.at(-1)?.ends || head.length >= exchange.prompt.room) finish(exchange, "");
    else stream(exchange);
    return true;
  }

  /** Show the tokens of an answer as they come. */
  async function stream(exchange) {
    const { prompt, parts } = exchange;
    const { model, interventions } = app.state;
    const [ids, count] = [[...prompt.ids, ...idsOf(parts)], prompt.room - parts.length];
    const request = { model, interventions, endOfText, ids, count, seed: ++seed };
    const message = { type: "write", ...request, settings: app.settings() };
    const question = app.client.ask(message, (part) => {
      if (running?.question !== question) return;
      parts.push({ ...part, ends: endOfText.includes(part.token) });
      showWord(exchange, parts.length - 1);
    });
    running = { question, exchange };
    note.textContent = "";
    showButtons();
    const { ended } = await question.catch((problem) => ({ ended: problem.message }));
    const reasons = { "end of text": "", count: `Cut after ${parts.length} tokens.` };
    if (running?.question === question) finish(exchange, reasons[ended] ?? ended);
  }

  function stop() {
    app.client.cancel(running.question.id);
    finish(running.exchange, "Stopped.");
  }

  function finish({ parts, words }, why) {
    running = null;
    note.textContent = why;
    heard.textContent = textsOf(parts).join("");
    words.ariaLabel = `Answer: ${heard.textContent}`;
    showButtons();
    toBox();
  }

  function showButtons() {
    sending.hidden = Boolean(running);
    stopping.hidden = !running;
    for (const one of [again, fresh, inside]) one.disabled = Boolean(running) || !exchanges.length;
  }

  /** Let the next key be typed into the box, unless the reader is elsewhere or has a phone. */
  function toBox() {
    const left = [document.body, again, fresh, sending, stopping].includes(document.activeElement);
    if (left && matchMedia("(hover: hover)").matches) box.focus({ preventScroll: true });
  }

  function showWord({ parts, words }, i) {
    const { token, p, ends, taken } = parts[i];
    const text = ends ? "■" : textsOf(parts.slice(0, i + 1)).at(-1);
    const kind = `word${ends ? " end" : ""}${taken ? " taken" : ""}`;
    const word = el("span", { class: kind, role: "button", tabindex: i ? -1 : 0 }, text);
    word.ariaLabel = `${app.piece(token)}: ${percent(p)}`;
    word.style.setProperty("--sure", p.toFixed(3));
    words.append(word);
  }

  /** Show what a token might have been; of the last answer, one that is clicked is taken. */
  function choose(word) {
    const exchange = exchanges.find(({ words }) => words === word.parentNode);
    const i = [...exchange.words.children].indexOf(word);
    const { parts } = exchange;
    const isLast = exchange === exchanges.at(-1) && !running;
    const take = (token) => {
      const { p } = parts[i].alternatives.find(({ id }) => id === token);
      const taken = { ...parts[i], token, p, ends: endOfText.includes(token), taken: true };
      answer(exchange, [...parts.slice(0, i), taken]);
    };
    const bars = tokenBars(app, parts[i].alternatives.slice(0, MOST_SHOWN), {
      follows: parts[i].token,
      more: (id) => ({ onclick: isLast ? () => take(id) : null }),
    });
    const title = `Instead of ${quoted(app.piece(parts[i].token))}, it might have said:`;
    refill(instead, el("p.note", title), el("div.bars", bars));
    talk.querySelector(".word.on")?.classList.remove("on");
    word.classList.add("on");
    exchange.node.append(instead);
    instead.scrollIntoView({ block: "nearest" });
    chosen = { exchange, i };
  }

  /** Put the conversation into all other views, at the token that was chosen. */
  async function lookInside() {
    const { exchange, i } = chosen ?? { exchange: exchanges.at(-1), i: Infinity };
    app.setIds([...exchange.prompt.ids, ...idsOf(exchange.parts)]);
    document.getElementById("opening").scrollIntoView();
    await until(() => !app.busy);
    app.change({ position: exchange.prompt.ids.length + i - app.dropped });
  }

  talk.addEventListener("click", ({ target }) => {
    if (target.matches(".word")) choose(target);
  });
  root.addEventListener("keydown", (event) => {
    const { key, target } = event;
    const inWord = target.matches(".word");
    if (key === "Escape" && running) stop();
    else if (target === box && key === "Enter" && !event.shiftKey && !event.isComposing) send();
    else if (inWord && ["Enter", " "].includes(key)) choose(target);
    else if (inWord && key === "ArrowLeft") target.previousElementSibling?.focus();
    else if (inWord && key === "ArrowRight") target.nextElementSibling?.focus();
    else return;
    event.preventDefault();
  });
  showButtons();
  return toBox;
}
