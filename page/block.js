// A decoder block of any family, and all that it has computed of a text.

const { gelu, rmsNorm, Rows, silu, softmax } = engine;

const LATENT_NORM_EPS = 1e-6; // DeepSeek-V3's, whatever the norm_eps of its blocks
const RECORDS = `norm1 q_before k_before q k v heads attention_out middle norm2 gate up hidden
  ffwd_out out`.split(/\s+/);

/** Block `layer` of a model; `scales` say how much of attention, ffwd and each of the heads goes on,
 *  {attention, ffwd, heads: [H]}. It has Rows of each of RECORDS; attention[t] is (H, t + 1). */
class Block {
  constructor(model, layer, scales) {
    const { C, H, K, D, Dv, hidden } = model.shape;
    const widths = { q_before: H * D, q: H * D, k_before: K * D, k: K * D, v: K * Dv };
    Object.assign(widths, { heads: H * Dv, gate: hidden, up: hidden, hidden }); // all others C
    for (const record of RECORDS) this[record] = new Rows(widths[record] ?? C);
    Object.assign(this, { model, scales, name: `decoder_blocks.${layer}`, attention: [] });
  }

  /** Compute positions start to end; x is the residual stream before, (T, C). */
  read(x, start, end) {
    const { model, scales, name } = this;
    for (const record of RECORDS) this[record].grow(end);
    model.norm(`${name}.norm1`, x, this.norm1, start, end);
    if (model.config.use_mla) this.projectLatent(`${name}.attention`, start, end);
    else this.project(`${name}.attention`, start, end);
    this.rotate(this.q_before, this.q, start, end);
    this.rotate(this.k_before, this.k, start, end);
    this.attend(start, end);
    model.linear(`${name}.attention.wo`, this.heads, this.attention_out, start, end);
    add(x, this.attention_out, this.middle, scales.attention, start, end);
    model.norm(`${name}.norm2`, this.middle, this.norm2, start, end);
    model.linear(`${name}.ffwd.up`, this.norm2, this.up, start, end);
    const { up, hidden, gate } = this,
      from = start * up.width,
      to = end * up.width;
    if (model.config.mlp === "swiglu") {
      model.linear(`${name}.ffwd.gate`, this.norm2, gate, start, end);
      for (let i = from; i < to; i++) hidden.data[i] = silu(gate.data[i]) * up.data[i];
    } else {
      for (let i = from; i < to; i++) hidden.data[i] = gelu(up.data[i]);
    }
    model.linear(`${name}.ffwd.down`, hidden, this.ffwd_out, start, end);
    add(this.middle, this.ffwd_out, this.out, scales.ffwd, start, end);
  }

  /** Queries (T, H, D), keys (T, K, D) and values (T, K, D) of the normalised stream. */
  project(name, start, end) {
    const { model } = this,
      { D } = model.shape;
    model.linear(`${name}.wq`, this.norm1, this.q_before, start, end);
    model.linear(`${name}.wk`, this.norm1, this.k_before, start, end);
    model.linear(`${name}.wv`, this.norm1, this.v, start, end);
    if (!model.config.qk_norm) return;
    for (const part of ["q", "k"]) {
      const rows = this[`${part}_before`];
      const weight = model.weights[`${name}.${part}_norm.weight`];
      for (let i = start * rows.width; i < end * rows.width; i += D) {
        rmsNorm(rows.data, rows.data, i, D, weight, model.config.norm_eps);
      }
    }
  }

  /** The same for latent attention: keys and values come from one short vector a token. */
  projectLatent(name, start, end) {
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
      model.linear(`${name}.wq_a`, this.norm1, latent, start, end);
      norm(latent, model.weights[`${name}.q_norm.weight`]);
      model.linear(`${name}.wq_b`, latent, this.q_before, start, end);
    } else {
      model.linear(`${name}.wq`, this.norm1, this.q_before, start, end);
    }
    const both = rows(R + c.qk_rope_head_dim),
      latent = rows(R); // [latent; key to be rotated]
    model.linear(`${name}.wkv_a`, this.norm1, both, start, end);
    for (let t = start; t < end; t++) latent.row(t).set(both.row(t).subarray(0, R));
    norm(latent, model.weights[`${name}.kv_norm.weight`]);
    const expanded = rows(H * (still + Dv));
    model.linear(`${name}.wkv`, latent, expanded, start, end);
    for (let t = start; t < end; t++) {
      const shared = both.row(t).subarray(R),
        k = this.k_before.row(t),
        v = this.v.row(t);
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
  attend(start, end) {
    const { H, K, D, Dv } = this.model.shape,
      group = H / K,
      factor = D ** -0.5;
    const q = this.q.data,
      k = this.k.data,
      v = this.v.data,
      heads = this.heads.data;
    this.attention.length = start;
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
          heads[to + i] = sum * this.scales.heads[h];
        }
      }
      this.attention.push(weights);
    }
  }
}

/** sum = x + scale · part for rows start to end, where `part` then holds what was added. */
function add(x, part, sum, scale, start, end) {
  for (let i = start * x.width; i < end * x.width; i++) {
    part.data[i] *= scale;
    sum.data[i] = x.data[i] + part.data[i];
  }
}

Object.assign(engine, { Block, LATENT_NORM_EPS, RECORDS });
