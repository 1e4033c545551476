// The worker: answers the page's messages with the engine's results, so that the page never waits.
//
// Runs after the engine's files, in one script with them. Messages are listed at `answers` below.
// An answer repeats the message's id, with ok: true, or ok: false and a line that says why.

const MOST_WEIGHTS = 2e8; // in memory at once, over all models
let page = null; // the data of the page, see visualize.py
const models = new Map(); // number -> promise of a Model, the last used one last
const cancelled = new Set(); // ids of messages whose writing is to stop

/** Return the Model with this number, unpacked at its first use. */
async function modelOf(number) {
  const description = page.data.models[number];
  const { tensors, blob } = description;
  if (!tensors) throw new Error("the weights of this model are not in the page");
  const model =
    models.get(number) ??
    engine.unpack(tensors, page.blobs[blob]).then((w) => new engine.Model(description, w));
  models.delete(number);
  models.set(number, model);
  let weights = 0;
  for (const other of [...models.keys()].reverse()) {
    weights += page.data.models[other].n_params;
    if (weights > MOST_WEIGHTS && other !== number) models.delete(other);
  }
  return model;
}

/** Return the trace of a prompt by a model too large for the page, as visualize.py made it. */
async function packedTrace(number, prompt) {
  const packed = page.data.traces[number][prompt];
  const arrays = await engine.unpack(packed.tensors, page.blobs[packed.blob]);
  return engine.fromPacked(arrays, page.data.models[number]);
}

/** Return all buffers in an answer, which are moved to the page and not copied. */
function buffers(value) {
  if (ArrayBuffer.isView(value)) return [value.buffer];
  return value && typeof value === "object" ? Object.values(value).flatMap(buffers) : [];
}

const answers = {
  /** {data, blobs: [text]} -> {} */
  load({ data, blobs }) {
    page = { data, blobs };
    return {};
  },

  /** {model, ids, interventions, start} -> {rows}, the trace from position `start` on; a model of
   *  the format "trace" takes the number of a `prompt` instead of ids -> {trace} */
  async trace({ model: number, ids, prompt, interventions = [], start = 0 }) {
    if (page.data.models[number].format === "trace") {
      return { trace: await packedTrace(number, prompt) };
    }
    return { rows: (await modelOf(number)).rows(ids, interventions, start) };
  },

  /** {model, tensor, row} -> {values, shape}, of one row of a tensor or, for null, of all */
  async weights({ model: number, tensor, row = null }) {
    const model = await modelOf(number);
    const values = model.tensor(tensor);
    const entry = model.description.tensors.find(({ name }) => model.tensor(name) === values);
    const columns = entry.shape.at(-1);
    return {
      values: row === null ? values.slice() : values.slice(row * columns, (row + 1) * columns),
      shape: entry.shape,
    };
  },

  /** {model, token, count} -> {ids, cosines} of the tokens whose embeddings point most nearly where
   *  that of `token` points */
  async nearest({ model: number, token, count }) {
    const model = await modelOf(number);
    const { V, C } = model.shape;
    const weights = model.tensor("embeddings.weight");
    const norms = engine.rowNorms(weights, V);
    const cosines = norms.map((norm, row) => {
      let dot = 0;
      for (let i = 0; i < C; i++) dot += weights[row * C + i] * weights[token * C + i];
      return dot / (norm * norms[token] || 1);
    });
    cosines[token] = -Infinity; // not itself
    const ids = engine.largest(cosines, count);
    return { ids, cosines: ids.map((other) => cosines[other]) };
  },

  /** {model, ids, count, seed, settings, interventions, endOfText} -> {token, p, alternatives} for
   *  each token, without ok, then {ended} */
  async write({ id, model: number, ids, ...given }) {
    const model = await modelOf(number);
    const request = { endOfText: page.data.tokenizer.end_of_text, ...given };
    for (const { token, p, alternatives, ended } of model.write(ids, request)) {
      postMessage({ id, token, p, alternatives });
      if (ended) return { ended };
      await new Promise((resume) => setTimeout(resume)); // lets other messages in
      if (cancelled.delete(id)) return { ended: "cancelled" };
    }
  },
};

onmessage = async ({ data: message }) => {
  const { id, type } = message;
  if (type === "cancel") return void cancelled.add(id); // the id of a write message, which answers
  try {
    const answer = await answers[type](message);
    postMessage({ id, ok: true, ...answer }, buffers(answer));
  } catch (error) {
    postMessage({ id, ok: false, error: error.message });
  }
};
