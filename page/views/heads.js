// What a head does: its measures beside chance, the name of its role, its map in small.

const SHORTEST = 8; // tokens below which weights say nothing of a role: there is too little to see
const NAMED = 0.2; // of the way from looking everywhere alike to looking at one place alone
const EVEN = 0.9; // of the entropy of looking everywhere alike
const ROLES = {
  induction: "on what followed the present token before",
  previous: "on the token before",
  first: "on the first token",
};
const NAMES = { induction: "induction", previous: "previous token", first: "first token" };

/** How far a measure is from chance, 0, to all of the weight, 1. */
const lift = (m, role) =>
  m[role] === null ? 0 : (m[role] - m.chance[role]) / (1 - m.chance[role]);

/** The role of a head by its measures, as a key of ROLES, or null. */
function keyOfRole(m) {
  const best = Object.keys(ROLES).reduce((a, b) => (lift(m, b) > lift(m, a) ? b : a));
  return lift(m, best) >= NAMED ? best : null;
}

function roleOf(m) {
  if (m.tokens < SHORTEST) return "text too short";
  return NAMES[keyOfRole(m)] ?? (m.entropy > EVEN * m.most ? "even" : "mixed");
}

/** The measures of all heads of a trace, [layer][head]: those of engine.headMeasures, and what they
    are if a head looks everywhere alike: `most` entropy, `chance` of each role. */
function measureHeads(trace) {
  if (trace.measures) return trace.measures;
  const { T } = trace.shape;
  const even = new Float32Array(T * T);
  for (let t = 0; t < T; t++) even.fill(1 / (t + 1), t * T, t * T + t + 1);
  const [chance] = engine.headMeasures(even, T, trace.ids);
  const measures = (block) => engine.headMeasures(block.attention, T, trace.ids);
  trace.measures = trace.blocks.map((block) =>
    measures(block).map((m) => ({ ...m, tokens: T, most: chance.entropy, chance })),
  );
  return trace.measures;
}

/** The head that has most of each role: {role: {layer, head, value, chance, learned}}; a role that
    no token of the text shows is left out. */
function strongest(trace) {
  const heads = measureHeads(trace).flatMap((row, layer) =>
    row.map((m, head) => ({ layer, head, m })),
  );
  const found = {};
  for (const role of Object.keys(ROLES)) {
    const { layer, head, m } = heads.reduce((a, b) => (b.m[role] > a.m[role] ? b : a));
    if (m[role] === null) continue;
    const learned = m.tokens >= SHORTEST && lift(m, role) >= NAMED;
    found[role] = { layer, head, value: m[role], chance: m.chance[role], learned };
  }
  return found;
}

/** The head to begin with, and the key that it reads most: {layer, head, key}, or {} if no head has
    a role yet. */
function bestHead(trace, position) {
  const [best] = Object.values(strongest(trace)).filter(({ learned }) => learned);
  if (!best) return {};
  const { layer, head } = best;
  return { layer, head, key: engine.largest(attentionRow(trace, layer, head, position), 1)[0] };
}

/** The weights of a head at position t, on the positions up to it. */
function attentionRow(trace, layer, head, t) {
  const { T } = trace.shape;
  const from = (head * T + t) * T;
  return trace.blocks[layer].attention.subarray(from, from + t + 1);
}

const ALL = -1; // in place of a head: the mean of all

/** Draw a head's weights, a pixel for each pair of positions. */
function drawHead(canvas, trace, layer, head) {
  const { T, H } = trace.shape;
  const weights = trace.blocks[layer].attention;
  const heads = head === ALL ? [...Array(H).keys()] : [head];
  drawTrace(canvas, trace, `${layer} ${head}`, T, paint.sequential, (query, key) => {
    if (key > query) return -1;
    let sum = 0;
    for (const h of heads) sum += weights[(h * T + query) * T + key];
    return weightShade(sum / heads.length);
  });
}

const headName = (layer, head) => `Layer ${layer}, head ${head}`;
