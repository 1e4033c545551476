// The row of tokens in the bar: the colour of each says how well it was predicted.

const SURPRISED = 8; // nats at which the colour of surprise is full: 1 in 3,000
const surpriseShade = (nats) => Math.min(1, (nats ?? 0) / SURPRISED);

function makeTokenRow(app, root) {
  const shown = []; // what each token was last drawn from
  const update = (names) => {
    if (names.has("error")) return;
    const { trace, beside, state } = app;
    const scores = app.scores(trace);
    const other = beside && app.scores(beside);
    const nodes = fillUp(root, trace.shape.T, makeToken);
    nodes.forEach((node, i) => {
      const on = i === state.position;
      const seen = [scores.nats[i - 1], scores.rank[i - 1], other?.nats[i - 1]];
      const now = [trace.pieces[i], on, ...seen, paint.layouts];
      if (shown[i]?.every((value, n) => value === now[n]) && node.title) return;
      shown[i] = now;
      drawToken(node, i, scores, other);
      node.setAttribute("aria-selected", String(on));
      node.tabIndex = on ? 0 : -1;
    });
    // Measuring now would make the browser lay out what is written so far, and the rest again.
    requestAnimationFrame(() => reveal(root, root.children[app.state.position]));
  };

  function makeToken(i) {
    const onclick = () => app.change({ position: i });
    return el("button.token", { role: "option", onclick }, el("span.piece"), el("small"), el("i"));
  }

  function drawToken(node, i, { nats, p, rank }, other) {
    const [piece, share, bar] = node.children;
    piece.textContent = showPiece(app.trace.pieces[i]);
    share.textContent = i ? percent(p[i - 1]) : "first";
    tint(node, paint.surprisal, surpriseShade(nats[i - 1]));
    bar.style.background =
      other && i ? shade(paint.surprisal, surpriseShade(other.nats[i - 1])) : "transparent";
    node.title =
      `position ${i}, id ${app.trace.ids[i]}` +
      (i ? `, rank ${count(rank[i - 1] + 1)}, ${num(nats[i - 1])} nats` : "");
  }
  return { update, focus: () => root.children[app.state.position]?.focus() };
}

/** Scroll a row sideways until a child of it is in sight; the page itself does not move. */
function reveal(row, child) {
  if (!child) return;
  const left = child.offsetLeft - row.offsetLeft;
  const right = left + child.offsetWidth;
  if (left < row.scrollLeft + 8) row.scrollLeft = left - row.clientWidth / 3;
  else if (right > row.scrollLeft + row.clientWidth - 8)
    row.scrollLeft = right - (row.clientWidth * 2) / 3;
}
