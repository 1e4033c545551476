// What a head does: its measures, the name of its role, its map in small.

/** Roles by what a head does on this text: the first that holds names it. */
const ROLES = [
  [
    "induction",
    (m) => m.induction !== null && m.induction > 0.4,
    "over 40% on what followed the present token before",
  ],
  ["previous token", (m) => m.previous > 0.4, "over 40% on the token before"],
  ["first token", (m) => m.first > 0.5, "over 50% on the first token"],
  ["even", (m) => m.entropy > 0.9 * m.most, "over 90% of the entropy of looking everywhere alike"],
];

const SHORTEST = 8; // tokens below which weights say nothing of a role: there is too little to see

/** The name of a head's role, by its measures. */
function roleOf(measures) {
  if (measures.tokens < SHORTEST) return "text too short";
  return ROLES.find(([, holds]) => holds(measures))?.[0] ?? "mixed";
}

/** The measures of all heads of a trace, [layer][head], each with the entropy of even looking. */
function measureHeads(trace) {
  const { T } = trace.shape;
  if (trace.measures) return trace.measures;
  let most = 0;
  for (let t = 1; t < T; t++) most += Math.log(t + 1) / Math.max(1, T - 1);
  trace.measures = trace.blocks.map((block) =>
    engine.headMeasures(block.attention, T, trace.ids).map((m) => ({ ...m, most, tokens: T })),
  );
  return trace.measures;
}

const ALL = -1; // in place of a head: the mean of all

/** Draw a head's weights, a pixel for each pair of positions. */
function drawHead(canvas, trace, layer, head) {
  const { T, H } = trace.shape;
  const weights = trace.blocks[layer].attention;
  const heads = head === ALL ? [...Array(H).keys()] : [head];
  drawPixels(canvas, T, T, paint.sequential, (query, key) => {
    if (key > query) return -1;
    let sum = 0;
    for (const h of heads) sum += weights[(h * T + query) * T + key];
    return weightShade(sum / heads.length);
  });
}

/** What a head is called. */
const headName = (layer, head) => `Layer ${layer}, head ${head}`;

Object.assign(globalThis, { ALL, drawHead, headName, measureHeads, roleOf, ROLES, SHORTEST });
