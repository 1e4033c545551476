// The whole transformer, for all families of model.py, and its trace: all that the page shows.
//
// It computes what model.py computes, from weights of the same names, and keeps what it computed.
//
// Shapes: T time, C n_embd, H heads, K key/value heads, D head dim, Dv width of a head's values,
// L layers, S max_seq_len, V vocab. An array of shape (T, C) is one typed array, row after row.
"use strict";

const { draw, filterProbabilities, largest, randomNumbers } = engine;
const { layerNorm, linear, rmsNorm, Rows, softmax } = engine;

const LATENT_NORM_EPS = 1e-6; // DeepSeek-V3's, whatever the norm_eps of its blocks
const TOP = 5; // how many tokens the lens names
const PARTS = new Set(["attention", "ffwd", "block"]); // what can be scaled, beside a head
const RECORDS = [
  "norm1",
  "q_before",
  "k_before",
  "q",
  "k",
  "v",
  "heads",
  "attention_out",
  "middle",
  "norm2",
  "gate",
  "up",
  "hidden",
  "ffwd_out",
  "out",
];

/** Return the rotary frequencies, (rope_dim / 2), rounded as model.py's 32-bit ones are. */
function ropeFrequencies(c) {
  const f = Math.fround;
  return Float32Array.from({ length: c.rope_dim / 2 }, (_, j) => {
    const frequency = f(1 / f(c.rope_theta ** f((2 * j) / c.rope_dim)));
    if (!c.rope_factor) return frequency;
    const low = c.rope_low_freq_factor,
      high = c.rope_high_freq_factor;
    const turns = (frequency * c.rope_original_seq_len) / (2 * Math.PI);
    const kept = Math.min(1, Math.max(0, (turns - low) / (high - low)));
    return frequency * (kept + (1 - kept) / c.rope_factor);
  });
}

class Model {
  /** `description` is an entry of the page's models, `weights` what unpack made of its tensors. */
  constructor(description, weights) {
    const c = description.config;
    this.description = description;
    this.config = c;
    this.weights = weights;
    this.frequencies = ropeFrequencies(c);
    this.passes = new Map(); // interventions -> Pass: of the text that was last read under them
    this.shape = {
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

  /** Return a tensor by its name in model.py; the final linear layer's may be the embeddings. */
  tensor(name) {
    const tied = name === "final_linear.weight" ? "embeddings.weight" : name;
    return this.weights[name] ?? this.weights[tied];
  }

  /** Apply one of the model's linear layers to rows start to end of x; into y. */
  linear(name, x, y, start, end) {
    linear(x, y, start, end, this.weights[`${name}.weight`], this.weights[`${name}.bias`]);
  }

  /** Apply one of the norms of the residual stream to rows start to end of x; into y. */
  norm(name, x, y, start, end) {
    const weight = this.weights[`${name}.weight`],
      bias = this.weights[`${name}.bias`];
    const C = x.width,
      eps = this.config.norm_eps;
    for (let t = start; t < end; t++) {
      if (bias) layerNorm(x.data, y.data, t * C, C, weight, bias, eps);
      else rmsNorm(x.data, y.data, t * C, C, weight, eps);
    }
  }

  /** Return the pass under these interventions, with what it still knows of another text. */
  pass(interventions = []) {
    const key = JSON.stringify(interventions);
    const pass = this.passes.get(key) ?? new Pass(this, interventions);
    this.passes.delete(key);
    this.passes.set(key, pass); // the newest is last
    if (this.passes.size > 2) this.passes.delete(this.passes.keys().next().value);
    return pass;
  }

  /** Return everything that the views show of a text; `pieces` and `model` are the caller's. */
  trace(ids, interventions = []) {
    return this.pass(interventions).trace(ids);
  }

  /** Continue a text: yield {token, alternatives: [{id, p}], ended}, `ended` a reason or null.
   *  When the context is full, its newer half is read again as a new beginning. */
  *write(ids, { count, seed = 0, settings = {}, interventions = [], endOfText = [] }) {
    const S = this.config.max_seq_len,
      random = randomNumbers(seed);
    let context = Array.from(ids).slice(-S);
    for (let n = 1; n <= count; n++) {
      const pass = this.pass(interventions);
      pass.read(context);
      const p = filterProbabilities(pass.nextLogits(), settings);
      const token = draw(p, random());
      const alternatives = largest(p, 20)
        .filter((id) => p[id] > 0)
        .map((id) => ({ id, p: p[id] }));
      const ended = endOfText.includes(token) ? "end of text" : n === count ? "count" : null;
      yield { token, alternatives, ended };
      if (ended) return;
      context.push(token);
      if (context.length > S) context = context.slice(-Math.max(1, Math.floor(S / 2)));
    }
  }
}

/** What a model has computed of one text under some interventions: also the cache of keys and
 *  values, for a text that begins alike is read from where it differs on. */
class Pass {
  constructor(model, interventions) {
    const { L, C, H, K, D, Dv, hidden, V } = model.shape;
    this.model = model;
    this.interventions = interventions;
    this.ids = []; // of the positions that are computed
    this.lensed = 0; // positions for which logits and lens are
    const widths = {
      q_before: H * D,
      q: H * D,
      k_before: K * D,
      k: K * D,
      v: K * Dv,
      heads: H * Dv,
      gate: hidden,
      up: hidden,
      hidden,
    }; // all others C
    this.embed = new Rows(C);
    this.blocks = Array.from({ length: L }, () => {
      const rows = RECORDS.map((name) => [name, new Rows(widths[name] ?? C)]);
      return { ...Object.fromEntries(rows), attention: [] }; // attention[t] is (H, t + 1)
    });
    this.final = new Rows(C);
    this.logits = new Rows(V);
    this.normed = new Rows(C); // of an earlier layer, for the lens, as are its logits:
    this.scratch = new Rows(V);
    this.lens = Array.from({ length: L + 1 }, () => ({ ids: [], p: [], rank: [], follows: [] }));
    this.scales = this.blocks.map(() => ({ attention: 1, ffwd: 1, heads: new Array(H).fill(1) }));
    for (const { layer, part, head, scale } of interventions) {
      const scales = this.scales[layer],
        isThere = part === "head" ? head < H : PARTS.has(part);
      if (!scales || !isThere || !Number.isFinite(scale)) {
        throw new Error("an intervention names no part of this model, or no scale");
      }
      if (part === "head") scales.heads[head] *= scale;
      if (part === "attention" || part === "block") scales.attention *= scale;
      if (part === "ffwd" || part === "block") scales.ffwd *= scale;
    }
  }

  /** Compute all blocks for the text; what the last text began with is known already. */
  read(ids) {
    const { config, weights, shape } = this.model,
      { C, V } = shape;
    if (!ids.length) throw new Error("there are no tokens to read");
    if (ids.length > config.max_seq_len) {
      throw new Error(`${ids.length} tokens do not fit the context of ${config.max_seq_len}`);
    }
    if (ids.some((id) => !(id >= 0 && id < V))) throw new Error(`the model has ${V} tokens only`);
    let start = 0;
    while (start < ids.length && ids[start] === this.ids[start]) start++;
    const end = ids.length;
    // The rank of the token that follows the last common one may be another.
    this.lensed = Math.min(this.lensed, start === end && end === this.ids.length ? end : start - 1);
    this.lensed = Math.max(0, this.lensed);
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
    this.blocks.forEach((block, layer) => {
      for (const name of RECORDS) block[name].grow(end);
      this.readBlock(layer, block, x, start, end);
      x = block.out;
    });
  }

  /** One decoder block, for positions start to end; x is the residual stream, (T, C). */
  readBlock(layer, block, x, start, end) {
    const { model } = this,
      name = `decoder_blocks.${layer}`,
      scales = this.scales[layer];
    model.norm(`${name}.norm1`, x, block.norm1, start, end);
    if (model.config.use_mla) this.projectLatent(`${name}.attention`, block, start, end);
    else this.project(`${name}.attention`, block, start, end);
    this.rotate(block.q_before, block.q, start, end);
    this.rotate(block.k_before, block.k, start, end);
    this.attend(block, scales.heads, start, end);
    model.linear(`${name}.attention.wo`, block.heads, block.attention_out, start, end);
    add(x, block.attention_out, block.middle, scales.attention, start, end);
    model.norm(`${name}.norm2`, block.middle, block.norm2, start, end);
    model.linear(`${name}.ffwd.up`, block.norm2, block.up, start, end);
    const { up, hidden, gate } = block,
      from = start * up.width,
      to = end * up.width;
    if (model.config.mlp === "swiglu") {
      model.linear(`${name}.ffwd.gate`, block.norm2, gate, start, end);
      for (let i = from; i < to; i++) {
        hidden.data[i] = (gate.data[i] / (1 + Math.exp(-gate.data[i]))) * up.data[i]; // silu · up
      }
    } else {
      for (let i = from; i < to; i++) {
        const u = up.data[i],
          inner = Math.sqrt(2 / Math.PI) * (u + 0.044715 * u ** 3);
        hidden.data[i] = 0.5 * u * (1 + Math.tanh(inner)); // gelu, GPT-2's formula
      }
    }
    model.linear(`${name}.ffwd.down`, hidden, block.ffwd_out, start, end);
    add(block.middle, block.ffwd_out, block.out, scales.ffwd, start, end);
  }

  /** Queries (T, H, D), keys (T, K, D) and values (T, K, D) of the normalised stream. */
  project(name, block, start, end) {
    const { model } = this,
      { D } = model.shape;
    model.linear(`${name}.wq`, block.norm1, block.q_before, start, end);
    model.linear(`${name}.wk`, block.norm1, block.k_before, start, end);
    model.linear(`${name}.wv`, block.norm1, block.v, start, end);
    if (!model.config.qk_norm) return;
    for (const [rows, norm] of [
      [block.q_before, "q_norm"],
      [block.k_before, "k_norm"],
    ]) {
      const weight = model.weights[`${name}.${norm}.weight`];
      for (let i = start * rows.width; i < end * rows.width; i += D) {
        rmsNorm(rows.data, rows.data, i, D, weight, model.config.norm_eps);
      }
    }
  }

  /** The same for latent attention: keys and values come from one short vector a token. */
  projectLatent(name, block, start, end) {
    const { model } = this,
      { H, D, Dv } = model.shape,
      c = model.config;
    const R = c.kv_lora_rank,
      still = c.qk_nope_head_dim; // the part of a head without position
    const rows = (width) => {
      const made = new Rows(width);
      made.grow(end);
      return made;
    };
    const norm = (x, weight) => {
      for (let t = start; t < end; t++) {
        rmsNorm(x.data, x.data, t * x.width, x.width, weight, LATENT_NORM_EPS);
      }
    };
    if (c.q_lora_rank) {
      const latent = rows(c.q_lora_rank);
      model.linear(`${name}.wq_a`, block.norm1, latent, start, end);
      norm(latent, model.weights[`${name}.q_norm.weight`]);
      model.linear(`${name}.wq_b`, latent, block.q_before, start, end);
    } else {
      model.linear(`${name}.wq`, block.norm1, block.q_before, start, end);
    }
    const both = rows(R + c.qk_rope_head_dim),
      latent = rows(R); // [latent; key to be rotated]
    model.linear(`${name}.wkv_a`, block.norm1, both, start, end);
    for (let t = start; t < end; t++) latent.row(t).set(both.row(t).subarray(0, R));
    norm(latent, model.weights[`${name}.kv_norm.weight`]);
    const expanded = rows(H * (still + Dv));
    model.linear(`${name}.wkv`, latent, expanded, start, end);
    for (let t = start; t < end; t++) {
      const shared = both.row(t).subarray(R),
        k = block.k_before.row(t),
        v = block.v.row(t);
      for (let h = 0; h < H; h++) {
        const from = h * (still + Dv),
          row = expanded.row(t);
        k.set(row.subarray(from, from + still), h * D);
        k.set(shared, h * D + still);
        v.set(row.subarray(from + still, from + still + Dv), h * Dv);
      }
    }
  }

  /** Turn the last rope_dim numbers of each head by their position; into y. Pair j is
   *  (x[j], x[j + rope_dim / 2]), the half-split layout. */
  rotate(x, y, start, end) {
    const { frequencies, shape } = this.model,
      half = frequencies.length,
      { D } = shape;
    y.data.set(x.data.subarray(start * x.width, end * x.width), start * x.width);
    for (let t = start; t < end; t++) {
      for (let j = 0; j < half; j++) {
        const angle = Math.fround(t * frequencies[j]),
          cos = Math.cos(angle),
          sin = Math.sin(angle);
        for (let i = t * x.width + D - 2 * half + j; i < (t + 1) * x.width; i += D) {
          const first = x.data[i],
            second = x.data[i + half];
          y.data[i] = first * cos - second * sin;
          y.data[i + half] = second * cos + first * sin;
        }
      }
    }
  }

  /** Causal attention: what each head reads, (T, H, Dv), from the values of earlier positions. */
  attend(block, scales, start, end) {
    const { H, K, D, Dv } = this.model.shape,
      group = H / K,
      factor = D ** -0.5;
    const q = block.q.data,
      k = block.k.data,
      v = block.v.data,
      heads = block.heads.data;
    block.attention.length = start;
    for (let t = start; t < end; t++) {
      const weights = new Float32Array(H * (t + 1));
      for (let h = 0; h < H; h++) {
        const row = weights.subarray(h * (t + 1), (h + 1) * (t + 1));
        const kv = Math.floor(h / group),
          fromQ = (t * H + h) * D,
          to = (t * H + h) * Dv;
        for (let s = 0; s <= t; s++) {
          const fromK = (s * K + kv) * D;
          let dot = 0;
          for (let i = 0; i < D; i++) dot += q[fromQ + i] * k[fromK + i];
          row[s] = dot * factor;
        }
        row.set(softmax(row));
        for (let i = 0; i < Dv; i++) {
          let sum = 0;
          for (let s = 0; s <= t; s++) sum += row[s] * v[(s * K + kv) * Dv + i];
          heads[to + i] = sum * scales[h];
        }
      }
      block.attention.push(weights);
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
    const { model } = this,
      { V } = model.shape,
      T = this.ids.length,
      start = this.lensed;
    const streams = [this.embed, ...this.blocks.map((block) => block.out)];
    this.final.grow(T);
    this.normed.grow(T);
    streams.forEach((stream, depth) => {
      const last = depth === streams.length - 1,
        x = last ? this.final : this.normed;
      const logits = last ? this.logits : this.scratch;
      const { ids, p, rank, follows } = this.lens[depth]; // by position
      logits.grow(T);
      model.norm("norm", stream, x, start, T);
      linear(x, logits, start, T, model.tensor("final_linear.weight"));
      for (let t = start; t < T; t++) {
        const row = logits.row(t),
          next = row[this.ids[t + 1]]; // undefined after the text
        let sum = 0,
          above = 0;
        ids[t] = largest(row, TOP);
        const most = row[ids[t][0]];
        for (let i = 0; i < V; i++) {
          sum += Math.exp(row[i] - most);
          if (row[i] > next) above++;
        }
        p[t] = ids[t].map((id) => Math.exp(row[id] - most) / sum);
        rank[t] = t + 1 < T ? above : -1;
        follows[t] = t + 1 < T ? Math.exp(next - most) / sum : 0;
      }
    });
    this.lensed = T;
  }

  /** Return the trace of a text, in arrays of its own. */
  trace(ids) {
    this.read(ids);
    this.readLens();
    const T = ids.length,
      { H, K } = this.model.shape,
      gated = this.model.config.mlp === "swiglu";
    const heads = { q_before: H, q: H, k_before: K, k: K, v: K };
    const blocks = this.blocks.map((block) => {
      const copy = RECORDS.map((name) => [
        name,
        heads[name] ? block[name].byHead(T, heads[name]) : block[name].copy(T),
      ]);
      const attention = new Float32Array(H * T * T);
      for (let t = 0; t < T; t++) {
        for (let h = 0; h < H; h++) {
          const row = block.attention[t].subarray(h * (t + 1), (h + 1) * (t + 1));
          attention.set(row, (h * T + t) * T);
        }
      }
      return { ...Object.fromEntries(copy), attention, ...(gated ? {} : { gate: null }) };
    });
    const lens = this.lens.map(({ ids, p, rank, follows }) => ({
      ids: Int32Array.from(ids.slice(0, T).flat()),
      p: Float32Array.from(p.slice(0, T).flat()),
      rank: Int32Array.from(rank.slice(0, T)),
      follows: Float32Array.from(follows.slice(0, T)),
    }));
    return {
      ids: Int32Array.from(ids),
      interventions: this.interventions,
      shape: { T, ...this.model.shape },
      embed: this.embed.copy(T),
      blocks,
      final: this.final.copy(T),
      logits: this.logits.copy(T),
      lens,
    };
  }
}

/** sum = x + scale · part for rows start to end, where `part` then holds what was added. */
function add(x, part, sum, scale, start, end) {
  for (let i = start * x.width; i < end * x.width; i++) {
    part.data[i] *= scale;
    sum.data[i] = x.data[i] + part.data[i];
  }
}

/** Return the trace that visualize.py made and packed, in the form of Pass.trace. */
function fromPacked(arrays, description) {
  const model = new Model(description, {}),
    trace = { blocks: [], lens: [], interventions: [] };
  for (const [path, array] of Object.entries(arrays)) {
    const keys = path.split("."),
      last = keys.pop();
    keys.reduce((holder, key) => (holder[key] ??= {}), trace)[last] = array;
  }
  const T = trace.ids.length,
    { V } = model.shape;
  trace.shape = { T, ...model.shape };
  trace.logits = trace.logits.map((x, i) => x + trace.logits_max[Math.floor(i / V)]);
  delete trace.logits_max;
  for (const block of trace.blocks) block.gate ??= null;
  return trace;
}

Object.assign(engine, { Model, fromPacked, ropeFrequencies });
