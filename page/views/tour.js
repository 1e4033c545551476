// The guided tour: a card beside what it speaks of, on this model's own numbers.

const STOPS = [];
const RESTORED = "model beside interventions settings position key layer head".split(" ");

function makeTour(app, root) {
  STOPS.push(...[...FIRST_STOPS, ...LATER_STOPS].filter(({ serves }) => serves?.(app) ?? true));
  let [at, begun, from] = [-1, null, null]; // the stop; the state and the button it began with
  const [title, text, where] = [el("h3"), el("p"), el("span.soft")];
  const back = el("button", { onclick: () => go(at - 1) }, "Back");
  const next = el("button.primary", { onclick: () => go(at + 1) }, "Next");
  const close = el("button.quiet", { "aria-label": "End the tour", onclick: end }, "✕");
  root.append(el("div.tourhead", title, close), text, el("div.row", where, back, next));
  root.addEventListener("keydown", (event) => event.key === "Escape" && end());

  const place = () => {
    const { section, target } = STOPS[at];
    return document.querySelector(`#${section} ${target}`) ?? document.getElementById(section);
  };

  /** Put back what the last stop changed, but a text that the reader wrote. */
  async function restore() {
    const { state } = app;
    await STOPS[at]?.leave?.(app);
    const wrote = STOPS[at]?.writes && state.text !== begun.text;
    if (!wrote) Object.assign(begun, { text: state.text, ids: state.ids });
    const patch = Object.fromEntries(
      RESTORED.filter((key) => begun[key] !== state[key]).map((key) => [key, begun[key]]),
    );
    if (wrote) Object.assign(patch, begun.ids ? { ids: begun.ids } : { text: begun.text });
    if (Object.keys(patch).length) app.change(patch);
  }

  /** What the bar takes of the window, where it stays in it. */
  function barHeight() {
    const bar = document.getElementById("bar");
    return getComputedStyle(bar.parentNode).position === "sticky" ? bar.offsetHeight : 0;
  }

  async function go(i) {
    next.disabled = true; // until the stop is there
    await restore();
    if (i >= STOPS.length) return end();
    at = i;
    const stop = STOPS[at];
    show();
    await until(() => !app.busy);
    next.disabled = false;
    if (STOPS[at] !== stop) return;
    stop.enter?.(app);
    show();
    const bar = barHeight();
    const top = place().getBoundingClientRect().top + window.scrollY;
    window.scrollTo({ top: top - bar - 24, behavior: app.calm ? "auto" : "smooth" });
    next.focus({ preventScroll: true });
  }

  async function end() {
    await restore();
    next.disabled = false;
    at = -1;
    show();
    from?.focus({ preventScroll: true });
  }

  function show() {
    document.querySelector(".toured")?.classList.remove("toured");
    root.hidden = at < 0;
    if (at < 0) return;
    place().classList.add("toured");
    watcher.disconnect();
    watcher.observe(place());
    title.textContent = STOPS[at].title;
    text.textContent = STOPS[at].tell(app);
    where.textContent = `${at + 1} of ${STOPS.length}`;
    back.disabled = at === 0;
    next.textContent = at === STOPS.length - 1 ? "End" : "Next";
    settle();
  }

  /** Put the card where it covers least of its target: right, below, above or left of it. */
  function settle() {
    if (at < 0) return;
    const target = place().getBoundingClientRect();
    const [w, h, gap] = [root.offsetWidth, root.offsetHeight, 14];
    const [right, bottom] = [window.innerWidth - w - gap, window.innerHeight - h - gap];
    const low = barHeight() + gap;
    const spots = [
      [target.right + gap, target.top],
      [target.left, target.bottom + gap],
      [target.left, target.top - h - gap],
      [target.left - w - gap, target.top],
    ].map(([x, y]) => {
      const [left, top] = [
        Math.max(gap, Math.min(right, x)),
        Math.max(Math.min(low, bottom), Math.min(bottom, y)),
      ];
      const across = Math.min(left + w, target.right) - Math.max(left, target.left);
      const down = Math.min(top + h, target.bottom) - Math.max(top, target.top);
      return { left, top, covers: Math.max(0, across) * Math.max(0, down) };
    });
    const best = spots.reduce((a, b) => (b.covers < a.covers ? b : a));
    [root.style.left, root.style.top] = [`${best.left}px`, `${best.top}px`];
  }
  const watcher = new ResizeObserver(settle);
  window.addEventListener("scroll", settle, { passive: true });
  window.addEventListener("resize", settle);

  function start() {
    from = document.activeElement;
    begun = { ...app.state };
    go(0);
  }
  return { start, update: () => app.trace && at >= 0 && show() };
}
