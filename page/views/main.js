// Begins everything: reads the page's data, starts the worker, builds the views, wires the keys.

/** The bar: the text box, the prompts that came with the page, the line that says what is shown. */
function makeBar(app) {
  const [prompt, line] = ["prompt", "line"].map((id) => document.getElementById(id));
  const status = document.getElementById("status");
  const examples = document.getElementById("examples");
  // What is typed while the model still reads replaces what waits: see retrace() in state.js.
  for (const box of [prompt, line]) box.addEventListener("input", () => app.setText(box.value));
  const buttons = app.data.prompts.map((text) => {
    const onclick = () => app.setText(text);
    return el("button.example", { title: text, onclick }, text.trim() || "(empty)");
  });
  if (buttons.length > 1) examples.append(...buttons);

  /** What is to be known of what is shown, sentence by sentence; false where one does not hold. */
  function sentences() {
    const { state, frozen, dropped, besideModel } = app;
    const changed = state.interventions.length;
    return [
      frozen &&
        "This model is too large for the page: it shows what was computed for the given texts, " +
          "and the text cannot be edited.",
      dropped > 0 &&
        `The context holds ${count(app.config().max_seq_len)} tokens: the first ${count(dropped)} ` +
          "are not read.",
      !state.text &&
        !frozen &&
        "Nothing is written: the model reads the token that begins a document.",
      /[^\s] $/.test(state.text) &&
        !frozen &&
        "The text ends with a blank: most words bring their own, so leave it out.",
      changed > 0 && (changed > 1 ? `${changed} parts are changed.` : "A part is changed."),
      besideModel && `The thin bars beside are ${besideModel.name}.`,
      state.model !== app.final && `Shown: ${app.modelName(state.model)}.`,
    ];
  }

  const update = () => {
    const { state, failures } = app;
    line.readOnly = app.frozen;
    if (line.value !== state.text) line.value = state.text; // the large one is sheet.js's
    line.scrollTop = line.scrollHeight;
    const told = [
      app.refused && "The address names no state of this page: it begins anew.",
      ...(app.error() ? [`Not read: ${app.error()}`] : sentences()),
      ...Array.from(failures, ([name, message]) => `${name} cannot be shown: ${message}.`),
    ];
    status.textContent = told.filter(Boolean).join(" ");
    status.classList.toggle("bad", Boolean(app.error() || failures.size));
  };
  return { update };
}

/** The rail: whose model this is, the list of views, what brings all back to the beginning. */
function makeRail(app, tour) {
  const { data } = app;
  const about = document.getElementById("about");
  const nav = document.getElementById("nav");
  const model = data.models[app.final];
  const c = model.config;
  refill(
    about,
    el("h1", runOf(data.title), model.step !== null && el("small", app.modelName(app.final))),
    el(
      "p",
      `${model.family}, ${count(model.n_params)} parameters: ${c.n_layers} layers, ` +
        `${c.n_heads} heads, ${c.n_embd} wide, ${count(c.vocab_size)} tokens`,
    ),
    el("button.primary", { onclick: tour.start }, "Take the tour"),
  );
  const opening = document.getElementById("opening");
  const links = [...document.querySelectorAll("main section")].map((section) => {
    const link = el("a", { href: `#${section.id}` }, section.dataset.name);
    return { link, section };
  });
  nav.append(...links.map(({ link }) => link));
  const mark = () => {
    const { top, bottom } = document.getElementById("bar").getBoundingClientRect();
    document.body.classList.toggle("inside", opening.getBoundingClientRect().bottom < 40);
    const line = bottom - top + 60;
    const now =
      links.findLast(({ section }) => section.getBoundingClientRect().top <= line) ?? links[0];
    for (const one of links) one.link.ariaCurrent = one === now ? "true" : null;
  };
  window.addEventListener("scroll", mark, { passive: true });
  mark();

  const onclick = () => app.change({ model: app.final, beside: null, interventions: [] });
  const back = el("button.quiet", { onclick, hidden: true }, "back to the model as trained");
  document.getElementById("controls").append(back);
  const update = () => {
    mark();
    const { model: shown, beside, interventions } = app.state;
    back.hidden = shown === app.final && beside === null && !interventions.length;
  };
  return { update };
}

/** Scroll to a section when those above it have their height. */
async function goTo(app, section) {
  history.scrollRestoration = "manual";
  await until(app.settled);
  section.scrollIntoView({ behavior: "instant" });
}

async function main() {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const blobs = [];
  for (let i = 0, node; (node = document.getElementById(`blob-${i}`)); i++)
    blobs.push(node.textContent);
  document.title = `${runOf(data.title)}, seen by plainllama`;
  paint.read();
  const source = (id) => document.getElementById(id).textContent;
  const client = makeClient(source("engine.js"), source("worker.js"));
  const tokenizer = await engine.loadTokenizer(data.tokenizer, blobs);
  if (!data.chat) document.getElementById("chat").remove(); // before the address is read
  const address = readAddress(data, location.hash);
  const { view, ...given } = address ?? {};
  const app = makeApp(data, client, tokenizer, given);
  app.refused = !address;
  window.app = app; // for a look from the console, and for tests
  app.calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const body = (id) => document.querySelector(`#${id} .body`);
  const tour = makeTour(app, document.getElementById("tour"));
  const tokens = makeTokenRow(app, document.getElementById("strip"));
  const bar = document.getElementById("bar");
  app.add(bar, makeBar(app));
  app.add(document.getElementById("strip"), tokens);
  app.add(document.querySelector(".rail"), makeRail(app, tour));
  app.add(document.getElementById("tour"), tour);
  const toChat = data.chat && (await makeChat(app, body("chat"), blobs));
  app.add(body("opening"), makeOpening(app, body("opening")));
  app.add(body("glance"), makeFlow(app, body("glance")));
  app.add(body("text"), makeText(app, body("text")));
  app.add(body("ledger"), makeLedger(app, body("ledger")));
  app.add(body("attention"), makeAttention(app, body("attention")));
  app.add(body("lens"), makeLens(app, body("lens")));
  app.add(body("next"), makeNext(app, body("next")));
  app.add(body("interventions"), makeInterventions(app, body("interventions")));
  app.add(body("training"), makeTraining(app, body("training")));
  app.add(body("weights"), makeMatrix(app, body("weights")));
  app.add(body("compare"), makeCompare(app, body("compare")));
  const foot = document.getElementById("foot");
  app.add(foot, makeFoot(app, foot));
  app.add(document.getElementById("nav"), makeAddress(app, view));
  for (const section of document.querySelectorAll("main section")) makePicture(app, section);
  wireKeys(app, tokens);

  const restyle = () => {
    paint.read();
    app.redraw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) restyle(); // a phone's bars change the height alone
    width = window.innerWidth;
  });
  const measureBar = () =>
    document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`);
  new ResizeObserver(measureBar).observe(bar);
  await app.client.ask({ type: "load", data, blobs });
  await app.retrace();
  if (view) goTo(app, document.getElementById(view));
  else toChat?.();
}

main().catch((error) => {
  document.getElementById("status").textContent = `The page could not begin: ${error.message}`;
});
