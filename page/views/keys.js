// The keyboard: arrows move what is selected, single letters jump, where no control needs them itself.

const WIDGETS = "#strip, .flow, .heads, .maps, .arcs, .film"; // where ↑ ↓ Home End do not scroll

/** Wire the keys; a box in `legend` switches those of a single letter off, for who speaks or slips. */
function wireKeys(app, tokens, legend) {
  const letters = el("input", { type: "checkbox", checked: true });
  legend.append(el("label", letters, " keys of one letter"));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.target.matches("textarea, input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const { position, key, layer, head } = app.state;
    const inWidget = event.target.closest(WIDGETS);
    const arrows = {
      ArrowLeft: { position: position - 1 },
      ArrowRight: { position: position + 1 },
    };
    const inside = {
      ArrowUp: { layer: layer - 1 },
      ArrowDown: { layer: layer + 1 },
      Home: { position: 0 },
      End: { position: Infinity },
    };
    const single = {
      "[": { head: head - 1 },
      "]": { head: head + 1 },
      "{": { key: key - 1 },
      "}": { key: key + 1 },
    };
    const moves = { ...arrows, ...(inWidget && inside), ...(letters.checked && single) };
    if (event.key === "/" && letters.checked)
      document.getElementById(document.body.matches(".inside") ? "line" : "prompt").focus();
    else if (moves[event.key] && app.trace) {
      app.change(moves[event.key]);
      if (event.target.matches(".token")) tokens.focus();
    } else return;
    event.preventDefault();
  });
}

Object.assign(globalThis, { wireKeys });
