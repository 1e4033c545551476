// Follow one token: a frame goes through the layers and tells what each of them does to it.

const JOURNEY = 4000; // milliseconds from the embedding to the next token

/** The button, what is told, the frame, and the stations that flow.js puts below its columns: what the model
    would say there, and how long the residual stream is. `flow` holds the columns. */
function makeFollow(app, flow) {
  const button = el("button.primary", { onclick: start, hidden: true });
  const told = el("p.told", { role: "status" });
  const arcs = makeArcs(app);
  const frame = el("i.runner", { hidden: true });
  const node = el("div.follow", button, told, arcs.node);
  const stations = []; // the embedding's, then those of the blocks
  let [timer, at] = [0, 0]; // of the next stop; the stop that is told

  /** What is below the column of a layer, or of the embedding, -1. */
  function station(layer) {
    const [guess, p, bar] = [el("span.name"), el("small"), el("i")];
    const onclick = () => {
      clearTimeout(timer);
      show(layer + 1);
    };
    const node = el("button.station", { onclick }, guess, p, el("span.norm", bar));
    stations[layer + 1] = { node, guess, p, bar };
    return node;
  }

  const update = () => {
    clearTimeout(timer);
    const { trace, state } = app;
    const { L } = trace.shape;
    const stops = stations.map((_, depth) => stopOf(trace, state.position, depth));
    const longest = Math.max(...stops.map((stop) => stop.norm));
    stations.forEach((one, depth) => {
      const { id, p, norm } = stops[depth];
      one.guess.textContent = showPiece(app.piece(id));
      one.p.textContent = percent(p);
      one.bar.style.width = `${(100 * norm) / longest}%`;
      one.node.title = `would say ${quoted(app.piece(id))}, ${percent(p)}; length ${num(norm)}`;
    });
    button.hidden = false;
    button.textContent = `Follow ${quoted(trace.pieces[state.position])} through the layers`;
    reveal(L + 1);
    frame.hidden = true;
    arcs.node.hidden = true;
    told.textContent =
      "Below each picture: what the model would say if it ended there, and how long the stream is.";
  };

  /** Show the stations up to a stop, L + 1 being the next token. */
  function reveal(stop) {
    at = stop;
    stations.forEach(({ node }, depth) => {
      node.classList.toggle("ahead", depth > stop);
      node.classList.toggle("on", depth === stop);
    });
    for (const loud of flow.querySelectorAll(".loud")) loud.classList.remove("loud");
  }

  function show(stop) {
    const { trace, state } = app;
    const t = state.position;
    const depth = Math.min(stop, trace.shape.L);
    const { id, p, norm } = stopOf(trace, t, depth);
    const { head, key, weight } = depth ? loudestHead(trace, t, depth - 1) : {};
    const saying = `${quoted(app.piece(id))} (${percent(p)})`;
    reveal(stop);
    moveFrame(stop);
    arcs.node.hidden = false;
    arcs.node.classList.toggle("unseen", depth === 0); // keeps its place
    if (depth) {
      arcs.show(t, key, depth - 1, head);
      const column = stations[depth].node.parentNode;
      column.querySelectorAll(".flowheads button")[head]?.classList.add("loud");
    }
    if (stop === 0)
      told.textContent =
        `${quoted(trace.pieces[t])} begins as row ${count(trace.ids[t])} of the embeddings, ` +
        `${num(norm)} long. Read as it is, it would say ${saying}.`;
    else if (stop === depth)
      told.textContent =
        `Block ${stop - 1}: head ${head}, whose output is the longest, takes ${percent(weight)} ` +
        `from ${quoted(trace.pieces[key])}. The stream is ${num(norm)} long now, and says ${saying}.`;
    else told.textContent = `The next token: most likely ${saying}.`;
  }

  function start() {
    clearTimeout(timer);
    const stops = app.trace.shape.L + 2;
    if (app.calm) return show((at + 1) % stops);
    show(1); // which makes room for the arcs
    node.scrollIntoView({ block: "nearest", behavior: "smooth" });
    const goOn = (stop) => {
      show(stop);
      if (stop + 1 < stops) timer = setTimeout(goOn, JOURNEY / stops, stop + 1);
    };
    goOn(0);
  }

  /** Put the frame around the column of a stop; the style sheet moves it there. */
  function moveFrame(stop) {
    const column = stations[stop]?.node.parentNode ?? flow.querySelector(".flownext");
    frame.hidden = false;
    frame.style.left = `${column.offsetLeft}px`;
    frame.style.width = `${column.offsetWidth}px`;
    const behavior = app.calm ? "instant" : "smooth";
    if (stations[stop]) flow.parentNode.scrollTo({ left: column.offsetLeft - 40, behavior }); // a phone
  }
  return { node, frame, station, update };
}

/** What position t is at a depth, 0 the embedding: what the lens reads there, and the length. */
function stopOf(trace, t, depth) {
  const stream = depth ? trace.blocks[depth - 1].out : trace.embed;
  return { ...likeliest(trace, depth, t)[0], norm: lengthOf(stream, trace.shape.C, t) };
}

/** The head of a block whose output at position t is the longest, and what it reads most of. */
function loudestHead(trace, t, layer) {
  const { H, Dv } = trace.shape;
  const { heads } = trace.blocks[layer];
  const outputs = Array.from({ length: H }, (_, head) => lengthOf(heads, Dv, t * H + head));
  const head = engine.largest(outputs, 1)[0];
  const weights = attentionRow(trace, layer, head, t);
  const key = engine.largest(weights, 1)[0];
  return { head, key, weight: weights[key] };
}
