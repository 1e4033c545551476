// The keyboard: arrows move the position everywhere, other keys what is selected inside a widget.

const WIDGETS = "#strip, .flow, .heads, .maps, .arcs, .film"; // where keys do not scroll the page

function wireKeys(app, tokens) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.target.matches("textarea, input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const { position, key, layer, head } = app.state;
    const everywhere = {
      ArrowLeft: { position: position - 1 },
      ArrowRight: { position: position + 1 },
    };
    const inside = {
      ArrowUp: { layer: layer - 1 },
      ArrowDown: { layer: layer + 1 },
      Home: { position: 0 },
      End: { position: Infinity },
      "[": { head: head - 1 },
      "]": { head: head + 1 },
      "{": { key: key - 1 },
      "}": { key: key + 1 },
    };
    const moves = event.target.closest(WIDGETS) ? { ...everywhere, ...inside } : everywhere;
    if (!moves[event.key] || !app.trace) return;
    app.change(moves[event.key]);
    if (event.target.matches(".token")) tokens.focus();
    event.preventDefault();
  });
}
