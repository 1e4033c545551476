// What is exact of the page and what is not: its last lines.

function makeFoot(app, root) {
  const update = () => {
    const { model, beside } = app.state;
    const shown = [model, ...(typeof beside === "number" ? [beside] : [])];
    const names = Map.groupBy(shown, (i) => app.data.models[i].rounding);
    refill(
      root,
      el("p", `Made from ${isolated(app.data.generated_from)}.`),
      [...names].map(([rounding, of]) => {
        const whose = app.data.models.length > 1 ? `${of.map(app.modelName).join(" and ")}: ` : "";
        return el("p", whose + rounding);
      }),
      app.data.notes.map((note) => el("p", isolated(note))),
      el(
        "p",
        app.frozen
          ? "All numbers were computed when this page was made. It needs no network."
          : "Everything here is computed in this file, on this machine: it needs no network.",
      ),
    );
  };
  return { update };
}
