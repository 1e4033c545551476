// Two models on the same text: their configs, their losses, what they would say.

/** Build the section. */
function makeCompare(app, root) {
  const { models } = app.data;
  const names = models.map((_, i) => app.modelName(i));
  const others = models.map((_, i) => i).filter((i) => i !== app.final);
  const order = [
    ...others.filter((i) => models[i].group === "compare"),
    ...others.filter((i) => models[i].group !== "compare"),
  ];
  const given = order.some((i) => models[i].group === "compare");
  if (!given)
    root.append(
      el(
        "p.missing",
        "No second model is in this page. ",
        el("code", "python visualize.py --compare=DIR"),
        " adds one with the same tokenizer" +
          (order.length ? "; until then, an earlier step of this run can stand beside it." : "."),
      ),
    );
  const pick = choices("Model beside", ["none", ...order.map((i) => names[i])], (n) =>
    app.change({ beside: n ? order[n - 1] : null }),
  );
  const table = el("table.configs");
  const sides = el("div");
  if (order.length) root.append(pick.node);
  root.append(el("div.two", el("div.tablebox", table), sides));

  const KEYS = [
    "n_layers",
    "n_embd",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "vocab_size",
    "max_seq_len",
    "position",
    "norm",
    "mlp",
    "bias",
    "qkv_bias",
    "qk_norm",
    "use_mla",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "tie_embeddings",
    "rope_theta",
    "rope_factor",
    "norm_eps",
  ];
  const LATENT = new Set(KEYS.filter((key) => /lora|nope|qk_rope|v_head/.test(key)));

  const update = () => {
    const { state, trace, beside } = app;
    pick.press(typeof state.beside === "number" ? order.indexOf(state.beside) + 1 : 0);
    const columns = [state.model, ...(typeof state.beside === "number" ? [state.beside] : [])];
    const latent = columns.some((i) => models[i].config.use_mla);
    const traces = [trace, ...(columns.length > 1 && beside ? [beside] : [])];
    const cells = (f) => columns.map((i, n) => f(i, n) ?? "–");
    const rows = [
      ["family", cells((i) => models[i].family)],
      ["parameters", cells((i) => count(models[i].n_params))],
      ["step", cells((i) => (models[i].step === null ? "–" : count(models[i].step)))],
      [
        "loss on this text, nats per token",
        cells((_, n) => traces[n] && num(app.scores(traces[n]).mean)),
      ],
      [
        "perplexity on this text",
        cells((_, n) => traces[n] && num(Math.exp(app.scores(traces[n]).mean))),
      ],
      ...KEYS.filter((key) => latent || !LATENT.has(key)).map((key) => [
        key,
        cells((i) => String(models[i].config[key])),
      ]),
    ];
    table.replaceChildren(
      el(
        "thead",
        el(
          "tr",
          el("td"),
          columns.map((i, n) => el("th", { scope: "col", class: n ? "beside" : "this" }, names[i])),
        ),
      ),
      el(
        "tbody",
        rows.map(([name, values]) =>
          el(
            "tr",
            { class: values.length > 1 && values[0] !== values[1] && "differs" },
            el("th", { scope: "row" }, name),
            values.map((value) => el("td", value)),
          ),
        ),
      ),
    );
    const t = state.position;
    const tops = traces.map((one) => likeliest(one, one.shape.L, t));
    const most = Math.max(...tops.map(([{ p }]) => p));
    sides.replaceChildren(
      ...traces.map((one, n) => showTop(one, names[columns[n]], n, tops[n], most)),
    );
  };

  function showTop(one, name, n, top, most) {
    const t = app.state.position;
    return el(
      "div",
      el("h3", { class: n ? "beside" : "this" }, `${name}, after ${quoted(one.pieces[t])}`),
      el(
        "div",
        { class: n ? "bars besides" : "bars" },
        tokenBars(app, top, { most, follows: following(one, t) }),
      ),
    );
  }
  return { update };
}

Object.assign(globalThis, { makeCompare });
