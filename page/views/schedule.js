// When views are drawn: those on the screen at once, the others after them in short tasks.

const TASK = 12; // milliseconds that views off the screen are drawn for at a time

/** Give the app its views: add(root, view) takes one, whose `update(names)` draws what has changed;
    show(names) tells all what that is; `failures` are those that could not draw, and why. */
function makeSchedule(app) {
  app.views = [];
  app.failures = new Map(); // name of a view -> message
  let [scheduled, drawing] = [false, 0];

  app.add = (root, view) => {
    app.views.push(Object.assign(view, { root, pending: new Set(["theme"]), visible: false }));
    watcher.observe(root);
  };
  app.show = (names) => {
    // Where a text could not be read, the sections show the last one that was.
    const isTold = ({ root }) => !names.has("error") || !root.closest("section");
    for (const view of app.views.filter(isTold)) for (const name of names) view.pending.add(name);
    for (const view of app.views) if (view.visible) draw(view);
    schedule();
  };
  app.redraw = () => app.show(new Set(["theme"]));
  /** Whether all is drawn: for tests and for measuring. */
  app.settled = () =>
    !app.busy && !drawing && Boolean(app.trace) && app.views.every((view) => !view.pending.size);

  /** Draw a view. If it fails, now or in what it awaits, it is named, and the others go on. */
  async function draw(view) {
    if (!view.pending.size || (!app.trace && !view.pending.has("error"))) return;
    const names = view.pending;
    const name = view.root.closest("section")?.dataset.name ?? view.root.id;
    const before = app.failures.get(name);
    view.pending = new Set();
    drawing++;
    try {
      await view.update(names);
      if (!names.has("failure")) app.failures.delete(name);
    } catch (problem) {
      console.error(problem);
      app.failures.set(name, problem.message);
    }
    drawing--;
    if (before === app.failures.get(name)) return;
    app.views[0].pending.add("failure"); // the bar, which has the status line
    schedule();
  }

  function schedule() {
    if (scheduled) return;
    scheduled = true;
    setTimeout(() => {
      scheduled = false;
      const waiting = app.views.filter((view) => view.pending.size && app.trace);
      const begun = performance.now();
      while (waiting.length && performance.now() - begun < TASK) draw(waiting.shift());
      if (waiting.length) schedule();
    });
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const view = app.views.find((candidate) => candidate.root === target);
      view.visible = isIntersecting;
      if (isIntersecting) draw(view);
      view.onVisible?.(isIntersecting);
    }
  });
}
