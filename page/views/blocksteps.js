// The steps inside of a decoder block.

/** What steps are made of: their costs, and how their vectors are cut out of a trace. */
function stepParts(c, shape) {
  const { T, C } = shape;
  const rms = c.norm === "rmsnorm";
  const stream = [1, T, C];
  const norm = {
    name: rms ? "RMSNorm" : "LayerNorm",
    formula: rms ? "x / √(mean(x²) + ε) · weight" : "(x − mean(x)) / √(var(x) + ε) · weight + bias",
    from: stream,
    to: stream,
    params: rms ? C : 2 * C,
    flops: (rms ? 4 : 6) * T * C,
  };
  const linear = (inputs, outputs, biased = c.bias) => ({
    params: (inputs + (biased ? 1 : 0)) * outputs,
    flops: 2 * T * inputs * outputs,
  });
  const at = (name, width) => (trace, layer, t) =>
    trace.blocks[layer][name].subarray(t * width, (t + 1) * width);
  const perHead = (name, heads, width) => (trace, layer, t) => {
    const values = new Float32Array(heads * width);
    const source = trace.blocks[layer][name];
    for (let h = 0; h < heads; h++)
      values.set(source.subarray((h * T + t) * width, (h * T + t + 1) * width), h * width);
    return values;
  };
  const one = (name, key, values, groups) => ({ name, key, values, groups });
  return { stream, norm, linear, at, perHead, one };
}

/** The steps of one block, in order; see pipelineSteps. */
function blockSteps(c, shape, { stream, norm, linear, at, perHead, one }) {
  const { T, C, H, K, D, Dv, hidden } = shape;
  const pairs = (T * (T + 1)) / 2;
  const steps = [
    {
      number: "4.1",
      ...norm,
      vectors: [one("norm1", "norm1", at("norm1", C))],
    },
    c.use_mla
      ? latentStep()
      : {
          number: "4.2",
          name: "Queries, keys, values",
          formula:
            "q = wq · x    k = wk · x    v = wv · x" + (c.qk_norm ? ", then RMSNorm of q, k" : ""),
          from: stream,
          to: [1, H, T, D],
          params:
            linear(C, H * D + 2 * K * D, c.bias || c.qkv_bias).params + (c.qk_norm ? 2 * D : 0),
          flops: linear(C, H * D + 2 * K * D).flops,
          vectors: qkv(),
        },
    c.position === "rope" && {
      number: "4.3",
      name: "RoPE",
      formula: "(a, b) → (a cos − b sin, b cos + a sin)",
      from: [1, H, T, D],
      to: [1, H, T, D],
      params: 0,
      flops: (6 * T * (H + K) * (c.use_mla ? c.qk_rope_head_dim : D)) / 2,
      vectors: [
        one("q, rotated", "q", perHead("q", H, D), D),
        one("k, rotated", "k", perHead("k", K, D), D),
      ],
    },
    {
      number: "4.4",
      name: "Attention weights",
      formula: "softmax(q kᵀ / √D + mask)",
      from: [1, H, T, D],
      to: [1, H, T, T],
      params: 0,
      flops: H * pairs * (2 * D + 5),
      vectors: [
        {
          name: "weights of the selected head",
          key: "attention",
          positive: true,
          scale: 1,
          values: (trace, layer, t, head) =>
            trace.blocks[layer].attention.subarray((head * T + t) * T, (head * T + t) * T + t + 1),
        },
      ],
    },
    {
      number: "4.5",
      name: "Weighted values",
      formula: "heads = weights · v",
      from: [1, H, T, T],
      to: [1, T, H * Dv],
      params: 0,
      flops: 2 * H * pairs * Dv,
      vectors: [one("heads", "heads", at("heads", H * Dv), Dv)],
    },
    {
      number: "4.6",
      name: "Output of attention",
      formula: "wo · heads",
      from: [1, T, H * Dv],
      to: stream,
      ...linear(H * Dv, C),
      vectors: [one("attention_out", "attention_out", at("attention_out", C))],
    },
    {
      number: "4.7",
      name: "Residual",
      formula: "x = x + attention(norm1(x))",
      from: stream,
      to: stream,
      params: 0,
      flops: T * C,
      vectors: [one("x", "middle", at("middle", C))],
    },
    {
      number: "4.8",
      ...norm,
      vectors: [one("norm2", "norm2", at("norm2", C))],
    },
    {
      number: "4.9",
      name: "Feed-forward, wider",
      formula: c.mlp === "swiglu" ? "silu(gate · x) ⊙ (up · x)" : "gelu(up · x)",
      from: stream,
      to: [1, T, hidden],
      params: linear(C, hidden).params * (c.mlp === "swiglu" ? 2 : 1),
      flops: linear(C, hidden).flops * (c.mlp === "swiglu" ? 2 : 1),
      vectors: [
        c.mlp === "swiglu" && one("gate", "gate", at("gate", hidden)),
        one("up", "up", at("up", hidden)),
        one("hidden", "hidden", at("hidden", hidden)),
      ].filter(Boolean),
    },
    {
      number: "4.10",
      name: "Feed-forward, back",
      formula: "down · hidden",
      from: [1, T, hidden],
      to: stream,
      ...linear(hidden, C),
      vectors: [one("ffwd_out", "ffwd_out", at("ffwd_out", C))],
    },
    {
      number: "4.11",
      name: "Residual",
      formula: "x = x + ffwd(norm2(x))",
      from: stream,
      to: stream,
      params: 0,
      flops: T * C,
      vectors: [one("x", "out", at("out", C))],
    },
  ];
  return steps.filter(Boolean).map((step) => ({ inner: true, ...step }));

  function qkv() {
    const [q, k] = c.position === "rope" ? ["q_before", "k_before"] : ["q", "k"];
    return [
      one("q", "q_before", perHead(q, H, D), D),
      one("k", "k_before", perHead(k, K, D), D),
      one("v", "v", perHead("v", K, Dv), Dv),
    ];
  }
  function latentStep() {
    const [rank, R] = [c.q_lora_rank, c.kv_lora_rank];
    const q = rank ? C * rank + rank + rank * H * D : C * H * D;
    const kv = C * (R + c.qk_rope_head_dim) + R + R * H * (c.qk_nope_head_dim + Dv);
    return {
      number: "4.2",
      name: "Queries, latent, keys, values",
      formula:
        `${rank ? "q = wq_b · norm(wq_a · x)" : "q = wq · x"}    ` +
        "[c, k_rotated] = wkv_a · x    [k, v] = wkv · norm(c)",
      from: stream,
      to: [1, H, T, D],
      params: q + kv,
      flops: 2 * T * (q + kv),
      vectors: qkv(),
    };
  }
}

Object.assign(globalThis, { blockSteps, stepParts });
