// The sum that made one number of a strip, from the weights and the numbers before it.

/** Explain cell `index` of a vector: {formula, lines, terms, bias, scale, total}. Where it is a sum,
    `terms` are {label, weight, input}, and the total is Σ weight · input + bias, times scale. */
async function explainCell(app, key, index) {
  const { trace } = app;
  const { layer, position: t, model, head, interventions } = app.state;
  const { C, H, K, D, Dv, T, hidden, V, L } = trace.shape;
  const config = app.config();
  const block = trace.blocks[layer];
  const name = `decoder_blocks.${layer}.`;
  const attention = `${name}attention.`;
  const scales = engine.scalesOf(trace.shape, interventions)[layer];
  const row = (values, width, at = t) => rowOf(values, width, at);
  const weights = async (tensor, line = null) =>
    (await app.client.ask({ type: "weights", model, tensor, row: line })).values;
  const before = layer ? trace.blocks[layer - 1].out : trace.embed;
  const split = (width) => [Math.floor(index / width), index % width]; // a head, a number of it
  const termsOf = (factors, inputs, label) =>
    Array.from(factors, (weight, j) => ({ label: label(j), weight, input: inputs[j] }));

  /** One row of a linear layer times its input. */
  async function linear(tensor, i, input, inputName, scale = 1) {
    const short = tensor.split(".").pop();
    const hasBias =
      (config.bias && short !== "final_linear") || (config.qkv_bias && /^w[qkv]$/.test(short));
    return {
      formula: `Σⱼ ${short}[${i}, j] · ${inputName}[j]` + (hasBias ? ` + bias[${i}]` : ""),
      terms: termsOf(await weights(`${tensor}.weight`, i), input, (j) => `${inputName}[${j}]`),
      bias: hasBias ? (await weights(`${tensor}.bias`))[i] : 0,
      scale,
    };
  }
  /** What a part adds to the residual stream x. */
  function added(x, part, partName) {
    const label = (j) => `${["x", partName][j]}[${index}]`;
    const inputs = [x, part].map((values) => row(values, C)[index]);
    return { formula: `${label(0)} + ${label(1)}`, terms: termsOf([1, 1], inputs, label) };
  }
  /** RMSNorm or LayerNorm of x: numbers in a row, no sum. */
  async function norm(tensor, x, i = index, kind = config.norm) {
    const w = (await weights(`${tensor}.weight`))[i];
    const centred = kind !== "rmsnorm";
    const mean = centred ? x.reduce((a, b) => a + b, 0) / x.length : 0;
    const b = centred ? (await weights(`${tensor}.bias`))[i] : 0;
    const square = x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length;
    const below = square + config.norm_eps;
    const lines = centred
      ? [
          `mean(x) = ${num(mean)}, var(x) + ε = ${num(square)} + ${num(config.norm_eps)}`,
          `(${num(x[i])} − ${num(mean)}) / √${num(below)} · ${num(w)} + ${num(b)}`,
        ]
      : [
          `mean(x²) + ε = ${num(square)} + ${num(config.norm_eps)}`,
          `${num(x[i])} / √${num(below)} · ${num(w)}`,
        ];
    const total = ((x[i] - mean) / Math.sqrt(below)) * w + b;
    return { formula: `x[${i}], weight[${i}]`, lines, total };
  }
  /** The rotation of one pair; the parts of a head that are not rotated pass. */
  function rotation(part) {
    const half = config.rope_dim / 2;
    const [h, d] = split(D);
    const offset = D - 2 * half;
    const heads = { q: H, k: K }[part];
    const x = (i) => row(block[`${part}_before`], heads * D)[h * D + i];
    if (d < offset) return { formula: "this part of a head is not rotated", total: x(d) };
    const j = (d - offset) % half;
    const frequency = engine.ropeFrequencies(config)[j];
    const angle = t * frequency;
    const [a, b] = [x(offset + j), x(offset + j + half)];
    const turned = `pair ${j} of head ${h}: turned by ${t} · ${num(frequency)} = ${num(angle)} radians`;
    const [cos, sin] = [`cos ${num(angle)}`, `sin ${num(angle)}`];
    if (d - offset < half) {
      const total = a * Math.cos(angle) - b * Math.sin(angle);
      return { formula: turned, lines: [`${num(a)} · ${cos} − ${num(b)} · ${sin}`], total };
    }
    const total = b * Math.cos(angle) + a * Math.sin(angle);
    return { formula: turned, lines: [`${num(b)} · ${cos} + ${num(a)} · ${sin}`], total };
  }
  /** A number of q or k before the rotation, normalised over its head if the model does; or of v. */
  async function projected(part) {
    const input = row(block.norm1, C);
    if (config.use_mla) return latentProjected(part, input);
    if (!config.qk_norm || part === "v")
      return linear(`${attention}w${part}`, index, input, "norm1");
    const [h, d] = split(D);
    const matrix = await weights(`${attention}w${part}.weight`);
    const x = matmul(matrix.subarray(h * D * C, (h + 1) * D * C), input);
    return norm(`${attention}${part}_norm`, x, d, "rmsnorm");
  }
  /** Latent attention: q from the stream or its latent, k and v from the normalised latent c. */
  async function latentProjected(part, input) {
    const [nope, R] = [config.qk_nope_head_dim, config.kv_lora_rank];
    const latent = async (tensor, normed, size) => {
      const x = matmul(await weights(`${attention}${tensor}.weight`), input).subarray(0, size);
      const weight = await weights(`${attention}${normed}.weight`);
      engine.rmsNorm(x, x, 0, size, weight, engine.LATENT_NORM_EPS);
      return x;
    };
    if (part === "q") {
      if (!config.q_lora_rank) return linear(`${attention}wq`, index, input, "norm1");
      const c = await latent("wq_a", "q_norm", config.q_lora_rank);
      return linear(`${attention}wq_b`, index, c, "norm(wq_a · x)");
    }
    const [h, d] = split(part === "k" ? D : Dv);
    if (part === "k" && d >= nope) return linear(`${attention}wkv_a`, R + d - nope, input, "norm1");
    const i = h * (nope + Dv) + (part === "k" ? d : nope + d);
    return linear(`${attention}wkv`, i, await latent("wkv_a", "kv_norm", R), "norm(c)");
  }
  /** What a head reads: the values of the positions it sees, weighted. */
  function weighted() {
    const [h, d] = split(Dv);
    const group = Math.floor((h * K) / H);
    const factors = row(block.attention, T, h * T + t).subarray(0, t + 1);
    const inputs = Array.from(factors, (_, at) => block.v[(at * K + group) * Dv + d]);
    return {
      formula: `Σ over positions: weight · v[${d}] in head ${h}`,
      terms: termsOf(factors, inputs, (at) => `${at} ${quoted(trace.pieces[at])}`),
      scale: scales.heads[h],
    };
  }
  function activation() {
    const up = row(block.up, hidden)[index];
    if (!block.gate) {
      const inner = num(Math.sqrt(2 / Math.PI) * (up + 0.044715 * up ** 3));
      const lines = [`½ · ${num(up)} · (1 + tanh ${inner})`];
      return { formula: `gelu(up[${index}])`, lines, total: engine.gelu(up) };
    }
    const gate = row(block.gate, hidden)[index];
    const lines = [`${num(gate)} / (1 + e^${num(-gate)}) · ${num(up)}`];
    const formula = `silu(gate[${index}]) · up[${index}]`;
    return { formula, lines, total: engine.silu(gate) * up };
  }
  function softmaxed() {
    const logits = row(trace.logits, V);
    const most = logits[engine.largest(logits, 1)[0]];
    const sum = logits.reduce((a, b) => a + Math.exp(b - most), 0);
    const x = logits[index];
    return {
      formula: `probability of ${quoted(app.piece(index))}`,
      lines: [`e^(${num(x)} − ${num(most)}) / ${num(sum)}, the sum over all ${count(V)} tokens`],
      total: Math.exp(x - most) / sum,
    };
  }
  async function embedded() {
    const id = trace.ids[t];
    const token = (await weights("embeddings.weight", id))[index];
    const formula = `embeddings[${id}, ${index}]`;
    if (config.position !== "learned")
      return { formula: `${formula}: looked up, not computed`, total: token };
    const place = (await weights("positions.weight", t))[index];
    return {
      formula: `${formula} + positions[${t}, ${index}]`,
      lines: [`${num(token)} + ${num(place)}`],
      total: token + place,
    };
  }
  function attended() {
    const group = Math.floor((head * K) / H);
    const [q, k] = [row(block.q, D, t * H + head), row(block.k, D, index * K + group)];
    return {
      formula: `the score q·k of positions ${t} and ${index}, before √D and softmax`,
      terms: termsOf(q, k, (j) => `q[${j}] k[${j}]`),
      score: true,
    };
  }

  const makers = {
    embed: embedded,
    attention: attended,
    heads: weighted,
    hidden: activation,
    softmax: softmaxed,
    norm1: () => norm(`${name}norm1`, row(before, C)),
    norm2: () => norm(`${name}norm2`, row(block.middle, C)),
    final: () => norm("norm", row(trace.blocks[L - 1].out, C)),
    q_before: () => projected("q"),
    k_before: () => projected("k"),
    v: () => projected("v"),
    q: () => rotation("q"),
    k: () => rotation("k"),
    attention_out: () =>
      linear(`${attention}wo`, index, row(block.heads, H * Dv), "heads", scales.attention),
    middle: () => added(before, block.attention_out, "attention_out"),
    gate: () => linear(`${name}ffwd.gate`, index, row(block.norm2, C), "norm2"),
    up: () => linear(`${name}ffwd.up`, index, row(block.norm2, C), "norm2"),
    ffwd_out: () =>
      linear(`${name}ffwd.down`, index, row(block.hidden, hidden), "hidden", scales.ffwd),
    out: () => added(block.middle, block.ffwd_out, "ffwd_out"),
    logits: () => linear("final_linear", index, row(trace.final, C), "final"),
  };
  const told = { lines: [], terms: [], bias: 0, scale: 1, ...(await makers[key]()) };
  const sum = told.terms.reduce((s, { weight, input }) => s + weight * input, told.bias);
  return { total: sum * told.scale, ...told };
}

/** A row-major matrix times a vector. */
function matmul(matrix, x) {
  const y = new Float32Array(matrix.length / x.length);
  for (let i = 0, n = 0; i < y.length; i++)
    for (let j = 0; j < x.length; j++, n++) y[i] += matrix[n] * x[j];
  return y;
}

/** A sum as a panel: formula, its largest terms, the rest, the total beside the number `shown`. */
function showSum({ formula, lines, terms, bias, scale, total, score }, shown) {
  const products = terms.map(({ weight, input }) => weight * input);
  const sizes = products.map(Math.abs);
  const top = engine.largest(sizes, 8);
  const rest = products.reduce((sum, x, i) => (top.includes(i) ? sum : sum + x), 0);
  const term = (label, value, product = "") => {
    const part = Math.min(1, Math.abs(value) / sizes[top[0]]);
    const fill = bar(part / 2, value < 0 ? "fill.minus" : "fill"); // from the middle
    const [name, told] = [el("span.name", label), el("span.value", num(value))];
    return el("div.term", name, el("span.mono", product), el("span.track", fill), told);
  };
  const difference = Math.abs(total - shown);
  const agrees = difference <= 1e-3 * Math.max(1, Math.abs(shown));
  const check = agrees ? " ✓" : `, which differs by ${num(difference)}`;
  return [
    [formula, ...lines].map((line) => el("p.mono", line)),
    terms.length > 0 &&
      el(
        "div.terms",
        top.map((i) => {
          const { label, weight, input } = terms[i];
          return term(label, products[i], `${num(weight)} × ${num(input)}`);
        }),
        terms.length > top.length && term(`the other ${count(terms.length - top.length)}`, rest),
        bias !== 0 && term("bias", bias),
      ),
    scale !== 1 && el("p.mono", `× ${num(scale)}, the intervention`),
    el(
      "p.mono.total",
      `= ${num(total, 4)}`,
      !score && el("span.soft", `   the strip has ${num(shown, 4)}${check}`),
    ),
  ];
}
