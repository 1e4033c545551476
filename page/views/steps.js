// The steps from text to next token, with this model's shapes, parameters, FLOPs and numbers.

/** The sum of `params` or `flops` over all steps, those of a block as often as there are layers. */
function totalOf(steps, what, layers) {
  return steps.reduce((sum, step) => sum + (step.inner ? layers : 1) * (step[what] ?? 0), 0);
}

/** The steps in order. `vectors` of a step are the strips to draw: {name, values(trace, layer, t),
    groups, key}; the values are those of one position, and `key` is what sums.js explains. FLOPs
    are those of this text: 2 for each weight and token, and in attention 2 for each number of each
    pair of positions that see each other. */
function pipelineSteps(config, shape) {
  const { T, C, D, V } = shape;
  const c = config;
  const parts = stepParts(c, shape);
  const { one, stream, norm } = parts;

  const steps = [
    {
      number: "1",
      name: "Tokenization",
      formula: "text → pieces → ids, byte-level BPE",
      from: null,
      to: [1, T],
      about:
        "a batch of 1 text; in training, a long stream of ids is cut into windows and reshaped " +
        "to (batch, time)",
    },
    {
      number: "2",
      name: "Token embedding",
      formula: "h = embeddings[id]",
      from: [1, T],
      to: stream,
      params: V * C,
      flops: 0,
      vectors: [
        one(
          c.position === "learned" ? "embedding + position" : "embedding",
          "embed",
          (trace, _, t) => trace.embed.subarray(t * C, (t + 1) * C),
        ),
      ],
    },
    c.position === "learned"
      ? {
          number: "3",
          name: "Position embedding",
          formula: "h = h + positions[m]",
          from: stream,
          to: stream,
          params: c.max_seq_len * C,
          flops: T * C,
          about:
            `a vector for each of the first ${count(c.max_seq_len)} places is added; the strip ` +
            "above is the sum",
        }
      : {
          number: "3",
          name: "Positional information",
          formula: "angle(m, j) = m · θ^(−2j/D)",
          from: null,
          to: [T, (c.use_mla ? c.qk_rope_head_dim : D) / 2],
          params: 0,
          flops: 0,
          about:
            "RoPE adds no vector: in every block, queries and keys are rotated by these angles",
        },
    { block: true, params: 0 },
    ...blockSteps(c, shape, parts),
    {
      number: "5",
      ...norm,
      name: `Final ${norm.name}`,
      vectors: [one("final", "final", (trace, _, t) => trace.final.subarray(t * C, (t + 1) * C))],
    },
    {
      number: "6",
      name: "Output projection",
      formula: "logits = final_linear · x",
      from: stream,
      to: [1, T, V],
      params: c.tie_embeddings ? 0 : V * C,
      flops: 2 * T * V * C,
      about: c.tie_embeddings ? "tied: the embedding's matrix, used again" : null,
      vectors: [sorted("logits of the likeliest tokens", "logits", (x) => x)],
    },
    {
      number: "7",
      name: "Softmax",
      formula: "p = exp(logit) / Σ exp(logits)",
      from: [1, T, V],
      to: [1, T, V],
      params: 0,
      flops: 3 * T * V,
      vectors: [
        {
          ...sorted("probabilities of the likeliest tokens", "softmax", engine.softmax),
          positive: true,
        },
      ],
    },
    {
      number: "8",
      name: "Sampling",
      formula: "temperature, top-k, top-p, min-p, then draw",
      from: [1, V],
      to: [1],
      params: 0,
      flops: null,
      link: ["next", "see Next token"],
    },
    {
      number: "9",
      name: "Loss, in training",
      formula: "−ln p[the token that follows]",
      from: [1, T, V],
      to: [],
      params: 0,
      flops: null,
      link: ["training", "see Training"],
      loss: true,
    },
  ];
  return steps.filter(Boolean);

  /** The largest 128 of a row over the vocabulary, in order; `ids` says whose they are. */
  function sorted(name, key, f) {
    return {
      name,
      key,
      sorted: true,
      values: (trace, _, t) => {
        const row = trace.logits.subarray(t * V, (t + 1) * V);
        const ids = engine.largest(row, Math.min(V, 128));
        const all = f(row);
        return Object.assign(
          Float32Array.from(ids, (id) => all[id]),
          { ids },
        );
      },
    };
  }
}

Object.assign(globalThis, { pipelineSteps, totalOf });
