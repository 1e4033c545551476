// The logit lens: what each layer would predict at each position.

const LENS_WINDOW = 32; // positions shown at once

/** Build the section. */
function makeLens(app, root) {
  const table = el("div.lens", { role: "group", "aria-label": "Layer by position" });
  const scroll = el("div.lensbox", table);
  table.addEventListener("keydown", (event) => {
    const [right, down] = {
      ArrowRight: [1, 0],
      ArrowLeft: [-1, 0],
      ArrowDown: [0, 1],
      ArrowUp: [0, -1],
    }[event.key] ?? [0, 0];
    if (!right && !down) return;
    const { L } = app.trace.shape;
    chosen = Math.max(0, Math.min(L, (chosen ?? L) + down));
    app.change({ position: app.state.position + right });
    cells.layers[chosen][app.state.position - from].node.focus();
    event.preventDefault();
    event.stopPropagation();
  });
  const note = el("p.note");
  const detail = el("div.card.lensdetail");
  root.append(scroll, note, detail);
  let [cells, shape, from] = [[], "", 0];
  let chosen = null; // the layer that is explained; null: the last

  const update = () => {
    const { trace, state } = app;
    const { T, L } = trace.shape;
    const columns = Math.min(T, LENS_WINDOW);
    if (state.position < from || state.position >= from + columns || from + columns > T)
      from = Math.max(0, Math.min(T - columns, state.position - Math.floor(columns / 2)));
    if (shape !== `${columns} ${L}`) build(columns, L);
    shape = `${columns} ${L}`;
    fill(columns, L);
    showDetail();
    note.textContent =
      (T > columns ? `Positions ${from} to ${from + columns - 1} of ${T}. ` : "") +
      "Colour: the probability of the piece that is shown; underlined: the piece that really " +
      "follows. Small: " +
      (app.beside ? `${app.besideModel.name}. ` : "its probability. ");
  };

  function build(columns, L) {
    table.style.setProperty("--columns", columns);
    const names = [...Array(L + 1).keys()].map((l) => (l ? `after ${l - 1}` : "embedding"));
    const row = (name, make) => [
      el("span.rowname", name),
      ...Array.from({ length: columns }, (_, c) => make(c)),
    ];
    const plain = (kind) => (c) => {
      const node = el("span", {
        class: `word ${kind}`,
        onclick: () => app.change({ position: from + c }),
      });
      cells[kind].push(node);
      return node;
    };
    cells = { reads: [], follows: [], layers: [] };
    const layers = names.map((name, l) => {
      cells.layers[l] = [];
      return row(name, (c) => {
        const [piece, p] = [el("span"), el("small")];
        const node = el(
          "button.cell",
          {
            tabindex: -1,
            onclick: () => {
              chosen = l;
              app.change({ position: from + c });
            },
          },
          piece,
          p,
        );
        cells.layers[l].push({ node, piece, p });
        return node;
      });
    });
    table.replaceChildren(
      ...row("reads", plain("reads")),
      ...layers.flat(),
      ...row("follows", plain("follows")),
    );
  }

  function fill(columns, L) {
    const { trace, beside, state } = app;
    const write = (node, text) => node.textContent !== text && (node.textContent = text);
    for (let c = 0; c < columns; c++) {
      const t = from + c;
      const on = t === state.position;
      write(cells.reads[c], showPiece(trace.pieces[t]));
      write(cells.follows[c], t + 1 < trace.shape.T ? showPiece(trace.pieces[t + 1]) : "?");
      cells.reads[c].classList.toggle("on", on);
      cells.follows[c].classList.toggle("on", on);
      for (let l = 0; l <= L; l++) {
        const cell = cells.layers[l][c];
        const { node, piece, p } = cell;
        const lens = trace.lens[l];
        const [{ id, p: probability }] = likeliest(trace, l, t);
        const now = [id, probability, t, on && chosen, on, lens.rank[t], beside, paint.layouts];
        if (now.every((value, n) => value === cell.shown?.[n])) continue;
        cell.shown = now;
        write(piece, showPiece(app.piece(id)));
        // The other model may have another number of layers: its last stands beside the last.
        const m = beside && (l === L ? beside.shape.L : l < beside.shape.L ? l : -1);
        write(
          p,
          !beside
            ? percent(probability)
            : m < 0
              ? ""
              : showPiece(app.piece(likeliest(beside, m, t)[0].id)),
        );
        node.style.background = shade(paint.sequential, probability * 0.85);
        node.style.color = inkOn(paint.sequential, probability * 0.85);
        node.classList.toggle("on", on);
        node.classList.toggle("hit", lens.rank[t] === 0);
        node.title = `${l ? `after layer ${l - 1}` : "embedding"}, position ${t}`;
        node.tabIndex = on && l === Math.min(chosen ?? L, L) ? 0 : -1;
      }
    }
    const column = cells.reads[state.position - from];
    const [left, width] = [column.offsetLeft, scroll.clientWidth];
    if (left < scroll.scrollLeft + 90 || left + 90 > scroll.scrollLeft + width)
      scroll.scrollLeft = left - width / 2;
  }

  function showDetail() {
    const { trace, beside, state } = app;
    const { L, T, V } = trace.shape;
    const l = Math.min(chosen ?? L, L);
    const t = state.position;
    const top = (one, depth, name, kind) =>
      el(
        "div",
        el("p", { class: `legend ${kind}` }, name),
        el(
          "div",
          { class: kind === "beside" ? "bars besides" : "bars" },
          tokenBars(app, likeliest(one, depth, t), { follows: following(trace, t) }),
        ),
      );
    const m = beside && (l === L ? beside.shape.L : Math.min(l, beside.shape.L));
    detail.replaceChildren(
      el(
        "h3",
        `${l ? `After layer ${l - 1}` : "From the embedding alone"}, position ${t} ` +
          quoted(trace.pieces[t]),
      ),
      el(
        "div.two.three",
        top(trace, l, "the likeliest", "this"),
        beside ? top(beside, m, app.besideModel.name, "beside") : null,
        followers(),
      ),
    );

    /** The token that really follows, as each layer sees it coming. */
    function followers() {
      if (t + 1 === T) return el("p.note", "The text ends here: nothing follows yet.");
      const most = Math.max(...trace.lens.map((lens) => lens.follows[t]));
      return el(
        "div",
        el(
          "p.legend",
          `what follows, ${quoted(trace.pieces[t + 1])}: its rank of ${count(V)}, its probability`,
        ),
        el(
          "div.bars",
          trace.lens.map((lens, i) =>
            barRow(`${i ? `after ${i - 1}` : "embedding"} #${lens.rank[t] + 1}`, lens.follows[t], {
              most,
            }),
          ),
        ),
      );
    }
  }
  return { update };
}

Object.assign(globalThis, { makeLens });
