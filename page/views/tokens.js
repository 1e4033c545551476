// The row of tokens in the bar: the colour of each says how well it was predicted.

const SURPRISED = 8; // nats at which the colour of surprise is full: 1 in 3,000

/** The row of tokens: one selects the position everywhere. */
function makeTokenRow(app, root) {
  const chips = [];
  const update = (names) => {
    if (names.has("error")) return;
    const { trace, beside } = app;
    const { T } = trace.shape;
    const scores = app.scores(trace);
    const other = beside && app.scores(beside);
    while (chips.length < T) chips.push(makeChip(chips.length));
    while (chips.length > T) chips.pop().node.remove();
    chips.forEach((chip, i) => fillChip(chip, i, scores, other));
    // Measuring now would make the browser lay out what is written so far, and the rest again.
    requestAnimationFrame(() => {
      const chip = chips[app.state.position];
      if (chip) reveal(root, chip.node);
    });
  };

  function makeChip(i) {
    const [piece, p] = [el("span.piece"), el("small")];
    const bar = el("i");
    const node = el(
      "button.token",
      { role: "option", onclick: () => app.change({ position: i }) },
      piece,
      p,
      bar,
    );
    root.append(node);
    return { node, piece, p, bar };
  }

  function fillChip(chip, i, scores, other) {
    const { node, piece, p, bar } = chip;
    const text = app.trace.pieces[i];
    const selected = i === app.state.position;
    const now = [
      text,
      selected,
      scores.p[i - 1],
      scores.rank[i - 1],
      other?.p[i - 1],
      paint.layouts,
    ];
    if (now.every((value, n) => value === chip.shown?.[n])) return;
    chip.shown = now;
    piece.textContent = showPiece(text);
    p.textContent = i ? percent(scores.p[i - 1]) : "first";
    const t = i ? Math.min(1, scores.nats[i - 1] / SURPRISED) : 0;
    node.style.background = shade(paint.surprisal, t);
    node.style.color = inkOn(paint.surprisal, t);
    bar.style.background =
      other && i
        ? shade(paint.surprisal, Math.min(1, other.nats[i - 1] / SURPRISED))
        : "transparent";
    node.setAttribute("aria-selected", String(selected));
    node.tabIndex = selected ? 0 : -1;
    node.title =
      `position ${i}, id ${app.trace.ids[i]}` +
      (i ? `, rank ${count(scores.rank[i - 1] + 1)}, ${num(scores.nats[i - 1])} nats` : "");
  }
  return { update, focus: () => chips[app.state.position]?.node.focus() };
}

/** Scroll a row sideways until a child of it is in sight; the page itself does not move. */
function reveal(row, child) {
  const [left, right] = [
    child.offsetLeft - row.offsetLeft,
    child.offsetLeft - row.offsetLeft + child.offsetWidth,
  ];
  if (left < row.scrollLeft + 8) row.scrollLeft = left - row.clientWidth / 3;
  else if (right > row.scrollLeft + row.clientWidth - 8)
    row.scrollLeft = right - (row.clientWidth * 2) / 3;
}

Object.assign(globalThis, { makeTokenRow, reveal, SURPRISED });
