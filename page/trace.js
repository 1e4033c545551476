// The trace of a text: all that the views show, put together of what a Pass has computed.
//
// {ids, interventions, shape: {T, L, C, ...}, embed (T, C), blocks, final (T, C), logits (T, V),
// lens}; a block has (T, width) of each of RECORDS, q, k and v as (T, heads, D), and attention
// (H, T, T); lens[depth], from the embedding to the last block, has the likeliest ids and their p,
// (T, 5), and of the token that follows in the text its rank from 0 and how likely it was, (T). The
// first `start` positions are those of the trace whose mark is `before`.

const { RECORDS, Rows } = engine;

/** What a model has made of the last text: a text that begins alike needs the rows that are new.
 *  Traces that were made before stay as they are. */
class Reading {
  constructor(config) {
    this.shape = shapeOf(config);
    this.gated = config.mlp === "swiglu";
    this.ids = []; // of the text that was asked for last
    this.filled = 0; // positions there are rows of
    this.rows = new Map(); // name -> Rows
    this.attention = Array.from({ length: config.n_layers }, () => []); // [layer][t] is (H, t + 1)
  }

  /** Note a text that is asked for; return from which position on its rows are needed. */
  expect(ids) {
    let start = 0;
    while (start < ids.length && ids[start] === this.ids[start]) start++;
    this.ids = ids;
    return start;
  }

  /** Return the trace of a text by what Pass.rows told of it. */
  take({ start, ids, interventions, blocks, lens, ...streams }) {
    const { shape } = this;
    const T = ids.length;
    const at = (name, values) => this.add(name, values, start, T);
    const trace = { ids, interventions, lens, start, shape: { T, ...shape } };
    Object.assign(trace, { before: this.mark, mark: {} });
    for (const [name, values] of Object.entries(streams)) trace[name] = at(name, values);
    trace.blocks = blocks.map((block, layer) => {
      const rows = this.attention[layer].slice(0, start);
      for (let t = start, from = 0; t < T; t++) {
        rows.push(block.attention.subarray(from, (from += shape.H * (t + 1))));
      }
      this.attention[layer] = rows;
      let attention = null; // made when it is first read
      const whole = {
        get attention() {
          return (attention ??= square(rows, T, shape.H));
        },
      };
      for (const name of RECORDS) whole[name] = at(`${layer}.${name}`, block[name]);
      if (!this.gated) whole.gate = null;
      return whole;
    });
    this.filled = T;
    this.mark = trace.mark;
    return trace;
  }

  /** Put rows from `start` on behind those before it; return all. What an earlier trace has of
   *  later rows is left to it. */
  add(name, values, start, T) {
    const width = values.length / (T - start) || this.rows.get(name).width;
    const known = this.rows.get(name) ?? new Rows(width);
    const rows = start < this.filled ? new Rows(width) : known;
    if (rows !== known) {
      rows.grow(T);
      rows.data.set(known.data.subarray(0, start * width));
    }
    rows.grow(T);
    rows.data.set(values, start * width);
    this.rows.set(name, rows);
    return rows.data.subarray(0, T * width);
  }
}

/** Return attention (H, T, T) of rows (H, t + 1): nothing of what comes later. */
function square(rows, T, H) {
  const whole = new Float32Array(H * T * T);
  rows.forEach((row, t) => {
    for (let h = 0; h < H; h++) {
      whole.set(row.subarray(h * (t + 1), (h + 1) * (t + 1)), (h * T + t) * T);
    }
  });
  return whole;
}

/** Return the trace that visualize.py made and packed. */
function fromPacked(arrays, description) {
  const trace = { blocks: [], lens: [], interventions: [] };
  for (const [path, array] of Object.entries(arrays)) {
    const keys = path.split(".");
    const last = keys.pop();
    keys.reduce((holder, key) => (holder[key] ??= {}), trace)[last] = array;
  }
  const T = trace.ids.length;
  trace.shape = { T, ...shapeOf(description.config) };
  const { V } = trace.shape;
  trace.logits = trace.logits.map((x, i) => x + trace.logits_max[Math.floor(i / V)]);
  delete trace.logits_max;
  for (const block of trace.blocks) block.gate ??= null;
  return trace;
}

/** Return the sizes of a model that shapes are written with. */
function shapeOf(c) {
  return {
    L: c.n_layers,
    C: c.n_embd,
    H: c.n_heads,
    K: c.use_mla ? c.n_heads : c.n_kv_heads,
    D: c.head_dim,
    Dv: c.use_mla ? c.v_head_dim : c.head_dim,
    hidden: c.hidden_dim,
    V: c.vocab_size,
  };
}

Object.assign(engine, { fromPacked, Reading, shapeOf });
