// The steps from text to next token, with this model's shapes, parameters, FLOPs and numbers.

/** The sum of `params` or `flops` over all steps, those of a block as often as there are layers. */
function totalOf(steps, what, layers) {
  return steps.reduce((sum, step) => sum + (step.inner ? layers : 1) * step[what], 0);
}

/** The steps in order: {number, name, formula, from, to, params, flops, vectors}, from one shape to
    another; those of a block are `inner`. Vectors are the strips to draw: {name, key, groups,
    values(trace, layer, t, head)}; the values are those of one position, and `key` is what sums.js
    explains. FLOPs are those of this text: 2 for each weight and token, and in attention 2 for each
    number of each pair of positions that see each other. */
function pipelineSteps(c, shape) {
  const { T, C, H, K, D, Dv, hidden, V } = shape;
  const stream = [1, T, C];
  const headed = [1, H, T, D];
  const pairwise = [1, H, T, T];
  const read = [1, T, H * Dv]; // by the heads
  const wide = [1, T, hidden];
  const scored = [1, T, V];
  const pairs = (T * (T + 1)) / 2;
  const learned = c.position === "learned";
  const gated = c.mlp === "swiglu";
  const rms = c.norm === "rmsnorm";
  const rotated = c.use_mla ? c.qk_rope_head_dim : D; // numbers of each head
  const angles = [T, rotated / 2];

  const step = (number, name, formula, [from, to], more = {}) => {
    const inner = number.startsWith("4.");
    return { number, name, formula, from, to, inner, params: 0, flops: 0, vectors: [], ...more };
  };
  const linear = (inputs, outputs, biased = c.bias) => ({
    params: (inputs + (biased ? 1 : 0)) * outputs,
    flops: 2 * T * inputs * outputs,
  });
  const normName = rms ? "RMSNorm" : "LayerNorm";
  const norm = (number, name, vectors) => {
    const costs = { params: rms ? C : 2 * C, flops: (rms ? 4 : 6) * T * C };
    const formula = rms
      ? "x / √(mean(x²) + ε) · weight"
      : "(x − mean(x)) / √(var(x) + ε) · weight + bias";
    return step(number, name, formula, [stream, stream], { ...costs, vectors });
  };
  /** The row of a position in what a trace, or the selected block of it, has by a key. */
  const row = (key, width = C, name = key, groups) => ({
    name,
    key,
    groups,
    values: (trace, layer, t) =>
      (trace[key] ?? trace.blocks[layer][key]).subarray(t * width, (t + 1) * width),
  });
  /** The largest 128 of a row over the vocabulary, in order; `ids` says whose they are. */
  const sorted = (name, key, f, positive) => ({
    name,
    key,
    positive,
    sorted: true,
    values: (trace, _, t) => {
      const logits = trace.logits.subarray(t * V, (t + 1) * V);
      const ids = engine.largest(logits, Math.min(V, 128));
      const all = f(logits);
      const values = Float32Array.from(ids, (id) => all[id]);
      return Object.assign(values, { ids });
    },
  });
  const weights = {
    name: "weights of the selected head",
    key: "attention",
    positive: true,
    scale: 1,
    values: (trace, layer, t, head) => attentionRow(trace, layer, head, t),
  };
  const widening = gated ? "silu(gate · x) ⊙ (up · x)" : "gelu(up · x)";
  const projected = [
    row("q_before", H * D, "q", D),
    row("k_before", K * D, "k", D),
    row("v", K * Dv, "v", Dv),
  ];

  return [
    step("1", "Tokenization", "text → pieces → ids", [null, [1, T]], {
      about:
        "a batch of 1 text; in training, a long stream of ids is cut into windows and reshaped " +
        "to (batch, time)",
    }),
    step("2", "Token embedding", "h = embeddings[id]", [[1, T], stream], {
      params: V * C,
      vectors: [row("embed", C, learned ? "embedding + position" : "embedding")],
    }),
    learned
      ? step("3", "Position embedding", "h = h + positions[m]", [stream, stream], {
          params: c.max_seq_len * C,
          flops: T * C,
          about:
            `a vector for each of the first ${count(c.max_seq_len)} places is added; the strip ` +
            "above is the sum",
        })
      : step("3", "Positional information", "angle(m, j) = m · θ^(−2j/D)", [null, angles], {
          about:
            "RoPE adds no vector: in every block, queries and keys are rotated by these angles",
        }),
    { block: true, params: 0, flops: 0, vectors: [] },
    norm("4.1", normName, [row("norm1")]),
    c.use_mla ? latentStep() : projectionStep(),
    !learned &&
      step("4.3", "RoPE", "(a, b) → (a cos − b sin, b cos + a sin)", [headed, headed], {
        flops: 3 * T * (H + K) * rotated,
        vectors: [row("q", H * D, "q, rotated", D), row("k", K * D, "k, rotated", D)],
      }),
    step("4.4", "Attention weights", "softmax(q kᵀ / √D + mask)", [headed, pairwise], {
      flops: H * pairs * (2 * D + 5),
      vectors: [weights],
    }),
    step("4.5", "Weighted values", "heads = weights · v", [pairwise, read], {
      flops: 2 * H * pairs * Dv,
      vectors: [row("heads", H * Dv, "heads", Dv)],
    }),
    step("4.6", "Output of attention", "wo · heads", [read, stream], {
      ...linear(H * Dv, C),
      vectors: [row("attention_out")],
    }),
    step("4.7", "Residual", "x = x + attention(norm1(x))", [stream, stream], {
      flops: T * C,
      vectors: [row("middle", C, "x")],
    }),
    norm("4.8", normName, [row("norm2")]),
    step("4.9", "Feed-forward, wider", widening, [stream, wide], {
      ...linear(C, gated ? 2 * hidden : hidden),
      vectors: [...(gated ? ["gate"] : []), "up", "hidden"].map((key) => row(key, hidden)),
    }),
    step("4.10", "Feed-forward, back", "down · hidden", [wide, stream], {
      ...linear(hidden, C),
      vectors: [row("ffwd_out")],
    }),
    step("4.11", "Residual", "x = x + ffwd(norm2(x))", [stream, stream], {
      flops: T * C,
      vectors: [row("out", C, "x")],
    }),
    norm("5", `Final ${normName}`, [row("final")]),
    step("6", "Output projection", "logits = final_linear · x", [stream, scored], {
      params: c.tie_embeddings ? 0 : V * C,
      flops: 2 * T * V * C,
      about: c.tie_embeddings ? "tied: the embedding's matrix, used again" : null,
      vectors: [sorted("logits of the likeliest tokens", "logits", (x) => x, false)],
    }),
    step("7", "Softmax", "p = exp(logit) / Σ exp(logits)", [scored, scored], {
      flops: 3 * T * V,
      vectors: [sorted("probabilities of the likeliest tokens", "softmax", engine.softmax, true)],
    }),
    step("8", "Sampling", "temperature, top-k, top-p, min-p, then draw", [[1, V], [1]], {
      link: ["next", "see Next token"],
    }),
    step("9", "Loss, in training", "−ln p[the token that follows]", [scored, []], {
      link: ["training", "see Training"],
      loss: true,
    }),
  ].filter(Boolean);

  function projectionStep() {
    const formula =
      "q = wq · x    k = wk · x    v = wv · x" + (c.qk_norm ? ", then RMSNorm of q, k" : "");
    const { params, flops } = linear(C, H * D + 2 * K * D, c.bias || c.qkv_bias);
    return step("4.2", "Queries, keys, values", formula, [stream, headed], {
      params: params + (c.qk_norm ? 2 * D : 0),
      flops,
      vectors: projected,
    });
  }
  function latentStep() {
    const [rank, R] = [c.q_lora_rank, c.kv_lora_rank];
    const q = rank ? C * rank + rank + rank * H * D : C * H * D;
    const kv = C * (R + c.qk_rope_head_dim) + R + R * H * (c.qk_nope_head_dim + Dv);
    const formula =
      `${rank ? "q = wq_b · norm(wq_a · x)" : "q = wq · x"}    ` +
      "[c, k_rotated] = wkv_a · x    [k, v] = wkv · norm(c)";
    return step("4.2", "Queries, latent, keys, values", formula, [stream, headed], {
      params: q + kv,
      flops: 2 * T * (q + kv),
      vectors: projected,
    });
  }
}
