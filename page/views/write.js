// The model writes: token by token, from a seed; any token's alternatives can be taken instead.

/** The writing part of the section Next token. */
function makeWrite(app) {
  const number = (label, value, min, max) => {
    const input = el("input", { type: "number", value, min, max, "aria-label": label });
    return [el("label.number", label, input), input];
  };
  const [seedNode, seed] = number("seed", 1, 0, 999999);
  const [countNode, amount] = number("tokens", 60, 1, 1000);
  const start = el("button.primary", { onclick: () => begin([]) }, "Write");
  const stop = el("button", { disabled: true, onclick: () => finish() }, "Stop");
  const use = el("button", { disabled: true, onclick: keep }, "Put it into the text box");
  const note = el("span.soft", { role: "status" });
  const before = el("span.before");
  const words = el("span");
  const page = el(
    "div.written",
    { role: "group", "aria-label": "Written text", tabindex: 0 },
    before,
    words,
  );
  const options = el("div.alternatives");
  const node = el(
    "div.write",
    el("h3", "Let it write"),
    el(
      "p.note",
      "It goes on after the whole text, with the sliders above. The darker " +
        "a piece, the less likely it was; click one for what else it might have been.",
    ),
    el("div.row", start, stop, seedNode, countNode, use, note),
    page,
    options,
  );
  let [prompt, written, running] = [[], [], null];

  /** Write on after the tokens in `head`, which were chosen before. */
  async function begin(head) {
    if (running) finish();
    if (!head.length) prompt = app.ids.slice();
    written = head.slice();
    show();
    const ids = [...prompt, ...head.map((one) => one.token)];
    const { model, settings, interventions } = app.state;
    const question = app.client.ask(
      {
        type: "write",
        model,
        ids,
        settings,
        interventions,
        count: Math.max(1, Number(amount.value) - head.length),
        seed: Number(seed.value),
      },
      (part) => {
        if (running !== question) return;
        written.push(part);
        words.append(wordOf(part, written.length - 1));
      },
    );
    running = question;
    stop.disabled = false;
    note.textContent = "";
    const begun = performance.now();
    try {
      const { ended } = await question;
      if (running !== question) return;
      const rate = ((written.length - head.length) / (performance.now() - begun)) * 1000;
      note.textContent =
        `${num(rate, 2)} tokens/s` + (ended === "end of text" ? ", then it ended" : "");
    } catch (error) {
      note.textContent = error.message;
    }
    running = null;
    stop.disabled = true;
    use.disabled = !written.length;
  }

  function finish() {
    if (running) app.client.cancel(running.id);
    running = null;
    stop.disabled = true;
    use.disabled = !written.length;
  }

  function keep() {
    app.setIds([...prompt, ...written.map((one) => one.token)]);
  }

  function show() {
    before.textContent = app.decode(prompt);
    words.replaceChildren(...written.map(wordOf));
    options.replaceChildren();
  }

  function wordOf(one, i) {
    const p = one.alternatives.find((other) => other.id === one.token)?.p ?? 0;
    const word = el(
      "button",
      {
        class: one.taken ? "word taken" : "word",
        title: `${percent(p)}; click for alternatives`,
        onclick: () => showOptions(i),
      },
      one.piece.replace(/\\n/g, "⏎"),
    );
    word.style.setProperty("--sure", p.toFixed(3));
    return one.piece.includes("\\n") ? el("span", word, el("br")) : word;
  }

  /** The alternatives of a written token; one that is clicked is taken, and writing goes on. */
  function showOptions(i) {
    if (running) finish();
    const one = written[i];
    words.querySelectorAll(".word").forEach((word, n) => word.classList.toggle("on", n === i));
    options.replaceChildren(
      el("p", `Instead of ${quoted(one.piece)}, it might have written:`),
      el(
        "div.bars.columns",
        one.alternatives.map((other) =>
          barRow(showPiece(other.piece), other.p, {
            hit: other.id === one.token,
            most: one.alternatives[0].p,
            onclick: () =>
              begin([
                ...written.slice(0, i),
                { ...one, token: other.id, piece: other.piece, taken: true },
              ]),
          }),
        ),
      ),
    );
  }

  function update() {
    const frozen = app.frozen();
    start.disabled = frozen;
    if (frozen) note.textContent = "The page has no weights of this model: it cannot write here.";
  }
  return { node, update };
}

Object.assign(globalThis, { makeWrite });
