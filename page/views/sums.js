// The sum that made one number of a strip, from the weights and the numbers before it.

/** Explain cell `index` of a vector: {title, formula, lines, terms, bias, scale, total, shown}.
    `terms` are {label, weight, input}; the total is Σ weight · input + bias, times scale. */
async function explainCell(app, key, index, shown) {
  const { trace } = app;
  const { layer, position: t, model } = app.state;
  const { C, H, K, D, Dv, T, hidden, V } = trace.shape;
  const config = app.config();
  const block = trace.blocks[layer];
  const name = `decoder_blocks.${layer}.`;
  const row = (values, width, at = t) => values.subarray(at * width, (at + 1) * width);
  const cell = (values, width, i = index) => values[t * width + i];
  const weights = async (tensor, line = null) =>
    (await app.client.ask({ type: "weights", model, tensor, row: line })).values;
  const hasBias = (tensor) =>
    (config.bias && tensor !== "final_linear") || (config.qkv_bias && /\.w[qkv]$/.test(tensor));
  const biasOf = async (tensor, i) => (hasBias(tensor) ? (await weights(`${tensor}.bias`))[i] : 0);
  const before = layer ? trace.blocks[layer - 1].out : trace.embed;
  const scaled = (part) =>
    app.state.interventions
      .filter(
        (x) => x.layer === layer && (x.part === part || (x.part === "block" && part !== "head")),
      )
      .reduce((s, x) => s * x.scale, 1);

  /** One row of a linear layer times its input. */
  async function linear(tensor, i, input, inputName, scale = 1) {
    const [w, bias] = [await weights(`${tensor}.weight`, i), await biasOf(tensor, i)];
    const short = tensor.split(".").pop();
    return {
      formula: `Σⱼ ${short}[${i}, j] · ${inputName}[j]` + (hasBias(tensor) ? ` + bias[${i}]` : ""),
      terms: Array.from(w, (weight, j) => ({
        label: `${inputName}[${j}]`,
        weight,
        input: input[j],
      })),
      bias,
      scale,
      shown,
    };
  }
  function added(a, aName, b, bName) {
    return {
      formula: `${aName}[${index}] + ${bName}[${index}]`,
      bias: 0,
      scale: 1,
      shown,
      terms: [
        { label: `${aName}[${index}]`, weight: 1, input: a },
        { label: `${bName}[${index}]`, weight: 1, input: b },
      ],
    };
  }
  /** RMSNorm or LayerNorm of x: numbers in a row, no sum. */
  async function norm(tensor, x, i, eps = config.norm_eps, kind = config.norm) {
    const w = (await weights(`${tensor}.weight`))[i];
    const mean = kind === "rmsnorm" ? 0 : x.reduce((a, b) => a + b, 0) / x.length;
    const square = x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length;
    const b = kind === "rmsnorm" ? 0 : (await weights(`${tensor}.bias`))[i];
    const total = ((x[i] - mean) / Math.sqrt(square + eps)) * w + b;
    const lines =
      kind === "rmsnorm"
        ? [
            `mean(x²) + ε = ${num(square)} + ${num(eps)}`,
            `${num(x[i])} / √${num(square + eps)} · ${num(w)}`,
          ]
        : [
            `mean(x) = ${num(mean)}, var(x) + ε = ${num(square)} + ${num(eps)}`,
            `(${num(x[i])} − ${num(mean)}) / √${num(square + eps)} · ${num(w)} + ${num(b)}`,
          ];
    return { formula: `x[${i}], weight[${i}]`, lines, total, shown };
  }
  /** The rotation of one pair; learned positions and unrotated parts pass. */
  function rotation(part, heads) {
    const width = config.rope_dim;
    const [h, d, offset] = [Math.floor(index / D), index % D, D - width];
    const source = block[`${part}_before`];
    const x = (i) => source[(h * T + t) * D + i];
    if (d < offset)
      return { formula: "this part of a head is not rotated", lines: [], total: x(d), shown };
    const j = (d - offset) % (width / 2);
    const angle = t * engine.ropeFrequencies(config)[j];
    const [a, b] = [x(offset + j), x(offset + j + width / 2)];
    const first = d - offset < width / 2;
    return {
      formula:
        `pair ${j} of head ${h}: turned by ${t} · ${num(angle / Math.max(1, t))} = ` +
        `${num(angle)} radians`,
      lines: [
        first
          ? `${num(a)} · cos ${num(angle)} − ${num(b)} · sin ${num(angle)}`
          : `${num(b)} · cos ${num(angle)} + ${num(a)} · sin ${num(angle)}`,
      ],
      total: first
        ? a * Math.cos(angle) - b * Math.sin(angle)
        : b * Math.cos(angle) + a * Math.sin(angle),
      shown,
    };
  }
  /** A number of q or k before the rotation, normalised over its head if the model does. */
  async function projected(part, letter) {
    if (config.use_mla) return latentProjected(part);
    if (!config.qk_norm || part === "v")
      return linear(`${name}attention.w${letter}`, index, row(block.norm1, C), "norm1");
    const [h, d] = [Math.floor(index / D), index % D];
    const matrix = await weights(`${name}attention.w${letter}.weight`);
    const x = matmul(matrix.subarray(h * D * C, (h + 1) * D * C), row(block.norm1, C));
    return norm(`${name}attention.${letter}_norm`, x, d, config.norm_eps, "rmsnorm");
  }
  /** Latent attention: q from the stream or its latent, k and v from the normalised latent c. */
  async function latentProjected(part) {
    const input = row(block.norm1, C);
    const latent = async (tensor, normTensor, size) => {
      const x = matmul(await weights(`${name}attention.${tensor}.weight`), input).subarray(0, size);
      const w = await weights(`${name}attention.${normTensor}.weight`);
      const scale = 1 / Math.sqrt(x.reduce((a, b) => a + b * b, 0) / size + 1e-6);
      return x.map((v, i) => v * scale * w[i]);
    };
    const [nope, R] = [config.qk_nope_head_dim, config.kv_lora_rank];
    if (part === "q") {
      if (!config.q_lora_rank) return linear(`${name}attention.wq`, index, input, "norm1");
      return linear(
        `${name}attention.wq_b`,
        index,
        await latent("wq_a", "q_norm", config.q_lora_rank),
        "norm(wq_a · x)",
      );
    }
    const width = part === "k" ? D : Dv;
    const [h, d] = [Math.floor(index / width), index % width];
    if (part === "k" && d >= nope)
      return linear(`${name}attention.wkv_a`, R + d - nope, input, "norm1");
    return linear(
      `${name}attention.wkv`,
      h * (nope + Dv) + (part === "k" ? d : nope + d),
      await latent("wkv_a", "kv_norm", R),
      "norm(c)",
    );
  }
  /** What a head reads: the values of the positions it sees, weighted. */
  function weighted() {
    const [h, d] = [Math.floor(index / Dv), index % Dv];
    const group = Math.floor((h * K) / H);
    const terms = Array.from({ length: t + 1 }, (_, key) => ({
      label: `${key} ${quoted(trace.pieces[key])}`,
      weight: block.attention[(h * T + t) * T + key],
      input: block.v[(group * T + key) * Dv + d],
    }));
    const scale = app.state.interventions
      .filter((x) => x.layer === layer && x.part === "head" && x.head === h)
      .reduce((s, x) => s * x.scale, 1);
    return {
      formula: `Σ over positions: weight · v[${d}] in head ${h}`,
      terms,
      bias: 0,
      scale,
      shown,
    };
  }
  function activation() {
    const up = cell(block.up, hidden);
    if (!block.gate) {
      const inner = Math.sqrt(2 / Math.PI) * (up + 0.044715 * up ** 3);
      return {
        formula: `gelu(up[${index}])`,
        shown,
        total: 0.5 * up * (1 + Math.tanh(inner)),
        lines: [`½ · ${num(up)} · (1 + tanh ${num(inner)})`],
      };
    }
    const gate = cell(block.gate, hidden);
    return {
      formula: `silu(gate[${index}]) · up[${index}]`,
      total: (gate / (1 + Math.exp(-gate))) * up,
      lines: [`${num(gate)} / (1 + e^${num(-gate)}) · ${num(up)}`],
      shown,
    };
  }
  function softmaxed(id) {
    const logits = row(trace.logits, V);
    const most = logits[engine.largest(logits, 1)[0]];
    const sum = logits.reduce((a, b) => a + Math.exp(b - most), 0);
    return {
      formula: `probability of ${quoted(app.piece(id))}`,
      shown,
      lines: [
        `e^(${num(logits[id])} − ${num(most)}) / ${num(sum)}, the sum over all ${count(V)} tokens`,
      ],
      total: Math.exp(logits[id] - most) / sum,
    };
  }
  async function embedded() {
    const id = trace.ids[t];
    const token = (await weights("embeddings.weight", id))[index];
    if (config.position !== "learned")
      return {
        formula: `embeddings[${id}, ${index}]: looked up, not computed`,
        lines: [],
        total: token,
        shown,
      };
    const place = (await weights("positions.weight", t))[index];
    return {
      formula: `embeddings[${id}, ${index}] + positions[${t}, ${index}]`,
      total: token + place,
      lines: [`${num(token)} + ${num(place)}`],
      shown,
    };
  }
  function attended() {
    const { q, k } = block;
    const h = app.state.head;
    const group = Math.floor((h * K) / H);
    const inputs = k.subarray((group * T + index) * D, (group * T + index + 1) * D);
    const query = q.subarray((h * T + t) * D, (h * T + t + 1) * D);
    return {
      formula: `the score q·k of positions ${t} and ${index}, before √D and softmax`,
      bias: 0,
      terms: Array.from(query, (weight, j) => ({
        label: `q[${j}] k[${j}]`,
        weight,
        input: inputs[j],
      })),
      scale: 1,
      score: true,
    };
  }

  const makers = {
    embed: embedded,
    attention: attended,
    heads: weighted,
    hidden: activation,
    norm1: () => norm(`${name}norm1`, row(before, C), index),
    norm2: () => norm(`${name}norm2`, row(block.middle, C), index),
    final: () => norm("norm", row(trace.blocks[trace.shape.L - 1].out, C), index),
    q_before: () => projected("q", "q"),
    k_before: () => projected("k", "k"),
    v: () => projected("v", "v"),
    q: () => rotation("q"),
    k: () => rotation("k"),
    attention_out: () =>
      linear(`${name}attention.wo`, index, row(block.heads, H * Dv), "heads", scaled("attention")),
    middle: () => added(cell(before, C), "x", cell(block.attention_out, C), "attention_out"),
    gate: () => linear(`${name}ffwd.gate`, index, row(block.norm2, C), "norm2"),
    up: () => linear(`${name}ffwd.up`, index, row(block.norm2, C), "norm2"),
    ffwd_out: () =>
      linear(`${name}ffwd.down`, index, row(block.hidden, hidden), "hidden", scaled("ffwd")),
    out: () => added(cell(block.middle, C), "x", cell(block.ffwd_out, C), "ffwd_out"),
    logits: () => linear("final_linear", index, row(trace.final, C), "final"),
    softmax: () => softmaxed(index),
  };
  const told = await makers[key]();
  if (told.terms)
    told.total = (told.terms.reduce((s, x) => s + x.weight * x.input, 0) + told.bias) * told.scale;
  return told;
}

Object.assign(globalThis, { explainCell });
