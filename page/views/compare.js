// Two models on the same text: their configs and their losses.

const CONFIG =
  `n_layers n_embd n_heads n_kv_heads head_dim hidden_dim vocab_size max_seq_len position
  norm mlp bias qkv_bias qk_norm use_mla q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim
  v_head_dim tie_embeddings rope_theta rope_factor norm_eps`.split(/\s+/);
const LATENT = /lora|nope|qk_rope|v_head/; // what latent attention alone has

function makeCompare(app, root) {
  const { models } = app.data;
  const others = [...models.keys()].filter((i) => i !== app.final);
  const { compare = [], run = [] } = Object.groupBy(others, (i) => models[i].group);
  const order = [...compare, ...run];
  const pick = choices("Model beside", ["none", ...order.map(app.modelName)], (n) =>
    app.change({ beside: n ? order[n - 1] : null }),
  );
  const table = el("table.configs");
  refill(
    root,
    !compare.length &&
      el(
        "p.missing",
        "No second model is in this page. ",
        el("code", "python visualize.py --compare=DIR"),
        " adds one with the same tokenizer" +
          (order.length ? "; until then, an earlier step of this run can stand beside it." : "."),
      ),
    order.length > 0 && pick.node,
    el("div.tablebox", table),
  );

  const update = () => {
    const { state, trace, beside } = app;
    const second = typeof state.beside === "number"; // not the same model untouched
    pick.press(second ? order.indexOf(state.beside) + 1 : 0);
    const columns = [{ i: state.model, trace, kind: "this" }];
    if (second) columns.push({ i: state.beside, trace: beside, kind: "beside" });
    for (const column of columns) Object.assign(column, models[column.i]);
    const loss = (f) => (column) => column.trace && num(f(app.scores(column.trace).mean));
    const latent = columns.some(({ config }) => config.use_mla);
    const keys = CONFIG.filter((key) => latent || !LATENT.test(key));
    const rows = [
      ["family", ({ family }) => family],
      ["parameters", ({ n_params }) => count(n_params)],
      ["step", ({ step }) => step !== null && count(step)],
      ["loss on this text, nats per token", loss((x) => x)],
      ["perplexity on this text", loss(Math.exp)],
      ...keys.map((key) => [key, ({ config }) => String(config[key])]),
    ];
    const heads = columns.map(({ i, kind }) =>
      el("th", { scope: "col", class: kind }, app.modelName(i)),
    );
    refill(
      table,
      el("thead", el("tr", el("td"), heads)),
      el(
        "tbody",
        rows.map(([name, of]) => {
          const values = columns.map((column) => of(column) || "–");
          const differs = new Set(values).size > 1 && "differs";
          const cells = values.map((value) => el("td", value));
          return el("tr", { class: differs }, el("th", { scope: "row" }, name), cells);
        }),
      ),
    );
  };
  return { update };
}
