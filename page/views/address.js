// The address is the state: what is read, selected, changed and shown, behind #s= as JSON.

const SETTLES = 300; // milliseconds that changes are gathered for, since browsers limit their number
const LONGEST = 100_000; // characters or tokens that an address may give
const PARTS = ["attention", "ffwd", "block", "head"];

const whole = (x, most) => Number.isInteger(x) && x >= 0 && x <= most;
const within = (x, low, high) => typeof x === "number" && x >= low && x <= high;
const sameKeys = (x, keys) =>
  x !== null && typeof x === "object" && String(Object.keys(x).sort()) === String(keys.sort());

/** What each key of an address may be in a page of this data. */
function allowed(data) {
  const first = data.models.find(({ group }) => group === "run").config;
  const frozen = data.models[0].format === "trace";
  const [L, H, V] = [first.n_layers, first.n_heads, first.vocab_size];
  const text = (x) => typeof x === "string" && x.length <= LONGEST;
  const some = (x, each, most) => Array.isArray(x) && x.length <= most && x.every(each);
  const changed = (x) =>
    sameKeys(x, ["layer", "part", "head", "scale"]) &&
    whole(x.layer, L - 1) &&
    PARTS.includes(x.part) &&
    (x.part === "head" ? whole(x.head, H - 1) : x.head === null) &&
    within(x.scale, 0, 2);
  return {
    text: (x) => text(x) && (!frozen || data.prompts.includes(x)),
    ids: (x) => !frozen && some(x, (id) => whole(id, V - 1), LONGEST) && x.length > 0,
    model: (x) => whole(x, data.models.length - 1) && data.models[x].group === "run",
    beside: (x) => x === "untouched" || whole(x, data.models.length - 1),
    interventions: (x) => !frozen && some(x, changed, L * (H + 3)),
    position: (x) => whole(x, LONGEST),
    key: (x) => whole(x, LONGEST),
    layer: (x) => whole(x, L - 1),
    head: (x) => whole(x, H - 1),
    pair: (x) => whole(x, first.rope_dim),
    settings: (x) =>
      sameKeys(x, ["temperature", "top_k", "top_p", "min_p"]) &&
      within(x.temperature, 0, 2) &&
      whole(x.top_k, V) &&
      within(x.top_p, 0.01, 1) &&
      within(x.min_p, 0, 1),
    view: (x) =>
      typeof x === "string" && /^\w+$/.test(x) && Boolean(document.querySelector(`section#${x}`)),
  };
}

/** The state that an address gives, {view, ...}; {} where it gives none, null where it is none of
    this page: one key that is unknown or impossible is enough. */
function readAddress(data, hash) {
  if (!hash.startsWith("#s=")) return {};
  const checks = allowed(data);
  try {
    const given = JSON.parse(decodeURIComponent(hash.slice(3)));
    if (!given || Array.isArray(given) || typeof given !== "object") return null;
    const known = Object.entries(given).every(
      ([key, value]) => Object.hasOwn(checks, key) && checks[key](value),
    );
    return known ? given : null;
  } catch {
    return null;
  }
}

/** Keep the address as the state is, and follow it where it is changed; returns a view without
    elements. `goal` is the section that the page goes to. */
function makeAddress(app, goal) {
  const { plain } = app;
  let [timer, here] = [0, ""];
  const first = document.querySelector("main section").id;

  function write() {
    const { state, trace } = app;
    if (!trace) return;
    const given = { text: state.text, position: state.position };
    if (state.ids) given.ids = state.ids;
    if (state.ids || state.text === plain.text) delete given.text;
    if (state.position === trace.shape.T - 1) delete given.position;
    for (const key of ["layer", "head", "key"]) given[key] = state[key];
    if (state.interventions.length) given.interventions = state.interventions;
    for (const key of ["model", "beside", "pair", "settings"])
      if (state[key] !== plain[key]) given[key] = state[key];
    const view = goal ?? document.querySelector("#nav [aria-current]").hash.slice(1);
    if (view !== first) given.view = view;
    here = `#s=${encodeURIComponent(JSON.stringify(given))}`;
    if (location.hash !== here) history.replaceState(null, "", here);
  }

  function soon() {
    clearTimeout(timer);
    timer = setTimeout(write, SETTLES);
  }

  window.addEventListener("scroll", soon, { passive: true });
  for (const name of ["wheel", "touchmove", "pointerdown", "keydown"])
    // the reader goes elsewhere
    window.addEventListener(name, () => (goal = undefined), { passive: true });
  window.addEventListener("hashchange", () => {
    if (location.hash === here) return;
    if (!location.hash.startsWith("#s=")) {
      const place = document.getElementById(location.hash.slice(1)); // of a link to a view
      goal = place?.closest("section")?.id;
      return write();
    }
    const told = readAddress(app.data, location.hash);
    const { view, ...given } = told ?? {};
    goal = view;
    const { text, ids, ...rest } = { ...plain, ...given };
    app.change({ ...rest, ...(given.ids ? { ids } : { text }) });
    app.refused = !told;
    document.getElementById(view ?? first).scrollIntoView();
  });
  return { update: soon };
}
