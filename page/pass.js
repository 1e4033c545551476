// One reading of a text: all blocks, and what the model would say after each of them.

const { Block, largest, linear, RECORDS, Rows } = engine;

const TOP = 5; // how many tokens the lens names

/** What a model has computed of one text under some interventions: also the cache of keys and
 *  values, for a text that begins alike is read from where it differs on. */
class Pass {
  constructor(model, interventions) {
    const { L, C, V } = model.shape;
    this.model = model;
    this.interventions = interventions;
    this.ids = []; // of the positions that are computed
    this.lensed = 0; // positions for which logits and lens are
    const scales = scalesOf(model.shape, interventions);
    this.embed = new Rows(C);
    this.blocks = scales.map((scale, layer) => new Block(model, layer, scale));
    this.final = new Rows(C);
    this.logits = new Rows(V);
    // By depth and position; `last` are the logits of the last position, whose follower is open.
    this.lens = Array.from({ length: L + 1 }, () => ({
      ids: [],
      p: [],
      rank: [],
      follows: [],
      last: new Float32Array(V),
    }));
  }

  /** Compute all blocks for the text; what the last text began with is known already. */
  read(ids) {
    const { weights, shape } = this.model;
    const { C, V } = shape;
    if (!ids.length) throw new Error("there are no tokens to read");
    if (ids.some((id) => !(id >= 0 && id < V))) throw new Error(`the model has ${V} tokens only`);
    let start = 0;
    while (start < ids.length && ids[start] === this.ids[start]) start++;
    const end = ids.length;
    this.lensed = Math.min(this.lensed, start);
    this.ids = Array.from(ids);
    this.embed.grow(end);
    for (let t = start; t < end; t++) {
      const row = this.embed.row(t),
        from = ids[t] * C;
      row.set(weights["embeddings.weight"].subarray(from, from + C));
      const positions = weights["positions.weight"];
      if (positions) for (let i = 0; i < C; i++) row[i] += positions[t * C + i];
    }
    let x = this.embed;
    for (const block of this.blocks) {
      block.read(x, start, end);
      x = block.out;
    }
  }

  /** Return the logits for the token after the text, (V). */
  nextLogits() {
    const last = this.ids.length - 1,
      { model } = this;
    if (this.lensed > last) return this.logits.row(last);
    const x = new Rows(model.shape.C),
      y = new Rows(model.shape.V);
    x.data = (this.blocks.at(-1)?.out ?? this.embed).row(last).slice();
    y.grow(1);
    model.norm("norm", x, x, 0, 1);
    linear(x, y, 0, 1, model.tensor("final_linear.weight"));
    return y.data;
  }

  /** Read the residual stream between all blocks as if it were the last: final norm and head. */
  readLens() {
    const { model } = this;
    const { C, V } = model.shape;
    const T = this.ids.length;
    // The logits of the position before are there, unless those of a later one took their place.
    const known = this.lensed && this.lens[0].ids.length === this.lensed;
    const start = known ? this.lensed : Math.max(0, this.lensed - 1);
    const streams = [this.embed, ...this.blocks.map((block) => block.out)];
    const [normed, scratch] = [new Rows(C), new Rows(V)]; // of an earlier layer
    streams.forEach((stream, depth) => {
      const last = depth === streams.length - 1;
      const [x, logits] = last ? [this.final, this.logits] : [normed, scratch];
      const lens = this.lens[depth];
      x.grow(T);
      logits.grow(T);
      model.norm("norm", stream, x, start, T);
      linear(x, logits, start, T, model.tensor("final_linear.weight"));
      for (const key of ["ids", "p", "rank", "follows"]) lens[key].length = start;
      if (known && start < T) this.follow(lens, start - 1, lens.last);
      for (let t = start; t < T; t++) {
        const row = logits.row(t);
        lens.ids[t] = largest(row, TOP);
        const sum = sumOfExp(row, row[lens.ids[t][0]]);
        lens.p[t] = lens.ids[t].map((id) => Math.exp(row[id] - row[lens.ids[t][0]]) / sum);
        this.follow(lens, t, row);
      }
      if (start < T) lens.last = logits.row(T - 1).slice();
    });
    this.lensed = T;
  }

  /** Write into a lens how likely the token was that follows position t, by the logits there. */
  follow(lens, t, row) {
    const next = row[this.ids[t + 1]]; // undefined after the text
    const most = row[lens.ids[t][0]];
    let above = 0;
    for (let i = 0; i < row.length; i++) if (row[i] > next) above++;
    const open = t + 1 === this.ids.length;
    lens.rank[t] = open ? -1 : above;
    lens.follows[t] = open ? 0 : Math.exp(next - most) / sumOfExp(row, most);
  }

  /** Return what Reading.take needs to have the trace of the text, if it has that of the first
   *  `start` positions: rows from there on, in arrays of their own, and the whole lens. */
  rows(start = 0) {
    const T = this.ids.length;
    const { H } = this.model.shape;
    const blocks = this.blocks.map((block) => {
      const cut = RECORDS.map((name) => [name, block[name].cut(start, T)]);
      const attention = new Float32Array((H * (T * (T + 1) - start * (start + 1))) / 2);
      let place = 0;
      for (const row of block.attention.slice(start)) {
        attention.set(row, place); // (H, t + 1)
        place += row.length;
      }
      return { ...Object.fromEntries(cut), attention };
    });
    return {
      start,
      blocks,
      ids: Int32Array.from(this.ids),
      interventions: this.interventions,
      embed: this.embed.cut(start, T),
      final: this.final.cut(start, T),
      logits: this.logits.cut(start, T),
      lens: this.lens.map(({ ids, p, rank, follows }) => ({
        ids: Int32Array.from(ids.flat()),
        p: Float32Array.from(p.flat()),
        rank: Int32Array.from(rank),
        follows: Float32Array.from(follows),
      })),
    };
  }
}

/** Return how much of its parts each layer hands on under interventions: [{attention, ffwd,
 *  heads: [H]}]. */
function scalesOf({ L, H }, interventions) {
  const scales = Array.from({ length: L }, () => ({
    attention: 1,
    ffwd: 1,
    heads: new Array(H).fill(1),
  }));
  for (const { layer, part, head, scale } of interventions) {
    if (part === "head") scales[layer].heads[head] *= scale;
    if (part === "attention" || part === "block") scales[layer].attention *= scale;
    if (part === "ffwd" || part === "block") scales[layer].ffwd *= scale;
  }
  return scales;
}

/** The sum of e^(x - most) over all x. */
function sumOfExp(row, most) {
  let sum = 0;
  for (let i = 0; i < row.length; i++) sum += Math.exp(row[i] - most);
  return sum;
}

Object.assign(engine, { Pass, scalesOf });
