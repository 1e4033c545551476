// The whole transformer, for all families of model.py.
//
// It computes what model.py computes, from weights of the same names, and keeps what it computed.
//
// Shapes: T time, C n_embd, H heads, K key/value heads, D head dim, Dv width of a head's values,
// L layers, S max_seq_len, V vocab. An array of shape (T, C) is one typed array, row after row.

const { draw, filterProbabilities, largest, randomNumbers } = engine;
const { layerNorm, linear, Pass, rmsNorm, shapeOf } = engine;

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
    this.shape = shapeOf(c);
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

  /** Return what of a text's trace is new from position `start` on: see Reading. */
  rows(ids, interventions = [], start = 0) {
    const pass = this.pass(interventions);
    pass.read(ids);
    pass.readLens();
    return pass.rows(start);
  }

  /** Continue a text: yield {token, p, alternatives: [{id, p}], ended}, `ended` a reason or
   *  null. When the context is full, its newer half is read again as a new beginning. */
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
      yield { token, p: p[token], alternatives, ended };
      if (ended) return;
      context.push(token);
      if (context.length > S) context = context.slice(-Math.max(1, Math.floor(S / 2)));
    }
  }
}

Object.assign(engine, { Model, ropeFrequencies });
