// What is selected, and the trace of it: every view reads both here and none keeps its own.

const KEPT = 8; // traces, which are large
const SAMPLED = { temperature: 0.8 }; // as sample.py does, while nobody has moved a slider

/** Questions to the worker as promises; `onPart` receives what is streamed before the answer. */
function makeClient(engineText, workerText) {
  const blob = new Blob([engineText, "\n", workerText], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(blob));
  const waiting = new Map();
  let last = 0;
  worker.onmessage = ({ data }) => {
    const question = waiting.get(data.id);
    if (!question) return;
    if (data.ok === undefined) return question.onPart?.(data);
    waiting.delete(data.id);
    if (data.ok) question.resolve(data);
    else question.reject(new Error(data.error));
  };
  worker.onerror = (event) => {
    for (const question of waiting.values()) question.reject(new Error(event.message));
    waiting.clear();
  };
  return {
    ask(message, onPart) {
      const id = ++last;
      const answer = new Promise((resolve, reject) => waiting.set(id, { resolve, reject, onPart }));
      worker.postMessage({ ...message, id });
      return Object.assign(answer, { id });
    },
    cancel: (id) => worker.postMessage({ type: "cancel", id }),
  };
}

/** A name as text that stays in its place: signs that cannot be seen are spelled out, and its
    direction does not reach what stands beside it. */
function isolated(name) {
  const seen = engine.printable(new TextEncoder().encode(name));
  return /^[ -~]*$/.test(seen) ? seen : `\u2068${seen}\u2069`;
}

/** The run that a checkpoint's path names: out/tiny/step_000300 is of tiny. */
function runOf(path) {
  const parts = path.split("/").filter((part) => !/^(step_\d+|snapshots)$/.test(part));
  return isolated(parts.at(-1) ?? path);
}

/** The state, its traces, and the views that are told when either changes. */
function makeApp(data, client, tokenizer, given = {}) {
  const first = data.models.reduce((best, m, i) => (m.group === "run" ? i : best), 0);
  const app = {
    data,
    client,
    tokenizer,
    trace: null,
    beside: null, // the trace of the model beside
    besideModel: null,
    all: [], // the tokens of the text; `ids` are the last of them, as many as the context holds
    ids: [],
    dropped: 0,
    busy: false,
    final: first, // the newest checkpoint of the run
    frozen: data.models[first].format === "trace", // all models are here as stored traces only
    plain: {
      text: data.prompts[0], // what the box shows
      ids: null, // what is read where it is not this text, but tokens
      model: first,
      beside: null,
      interventions: [],
      position: Infinity,
      key: 0,
      layer: 0,
      head: 0,
      pair: 0,
      settings: { temperature: 1, top_k: 0, top_p: 1, min_p: 0 },
    }, // the state of a page that is just opened
  };
  app.state = { ...app.plain, ...given }; // by the address
  if (given.ids) app.state.text = tokenizer.decode(given.ids);
  const readings = new Map(); // of recent models and interventions, each with its last trace
  let [wanted, error, started] = [0, "", false];

  /** Take new values of the state; what the model reads is read again, the rest is shown. */
  app.change = (patch) => {
    const { state } = app;
    if (patch.interventions?.length && state.beside === null) patch.beside = "untouched";
    if (patch.interventions?.length === 0 && state.beside === "untouched") patch.beside = null;
    if ("ids" in patch) patch.text = tokenizer.decode(patch.ids);
    else if ("text" in patch) patch.ids = null;
    Object.assign(state, patch);
    app.refused = false;
    const names = Object.keys(patch);
    clampSelection();
    if (names.some((name) => ["text", "model", "beside", "interventions"].includes(name)))
      retrace(); // and show it then
    else app.show(new Set(names));
  };

  /** Read the text again; while one is read, only the newest wish waits. */
  async function retrace() {
    wanted++;
    if (app.busy) return;
    app.busy = true;
    try {
      let done;
      do {
        done = wanted;
        error = await readText().then(
          () => "",
          (problem) => problem.message,
        );
        app.show(new Set(error ? ["error"] : ["trace"]));
      } while (done !== wanted);
    } finally {
      app.busy = false;
    }
  }

  async function readText() {
    const { state } = app;
    const atEnd = !app.trace || state.position >= app.trace.shape.T - 1;
    const besideModel = wantedBeside();
    const limits = [app.config(), besideModel?.config].map((config) => config?.max_seq_len);
    const limit = Math.min(...limits.filter(Boolean));
    const all = app.frozen
      ? data.traces[state.model][data.prompts.indexOf(state.text)].ids
      : (state.ids ?? encodeText(state.text));
    const ids = all.slice(-limit);
    const trace = await app.traceOf(state.model, ids, state.interventions);
    const beside = besideModel ? await app.traceOf(besideModel.index, ids, []) : null;
    Object.assign(app, { all, ids, trace, beside, besideModel });
    app.dropped = all.length - ids.length;
    if (atEnd) state.position = trace.shape.T - 1;
    if (!started) Object.assign(state, bestHead(trace, state.position), given);
    started = true;
    clampSelection();
  }

  /** The ids of a text, after what a model expects before one. */
  function encodeText(text) {
    const { begin_of_text: begin, end_of_text: end } = data.tokenizer;
    const ids = [...begin, ...tokenizer.encode(text)];
    return ids.length ? ids : end.slice(0, 1);
  }

  /** The trace of ids by a model; the last one of each model and its interventions is kept. */
  app.traceOf = (model, ids, interventions) => {
    const [key, text] = [JSON.stringify([model, interventions]), String(ids)];
    const kept = readings.get(key) ?? { reading: new engine.Reading(app.config(model)) };
    readings.delete(key); // and put it last, so that it is kept longest
    readings.set(key, kept);
    if (readings.size > KEPT) readings.delete(readings.keys().next().value);
    if (kept.text !== text) {
      kept.text = text;
      kept.trace = app.read(model, ids, interventions, kept.reading);
      kept.trace.catch(() => readings.delete(key));
    }
    return kept.trace;
  };

  /** The trace of ids by a model, of which a reading may have the beginning. */
  app.read = async (model, ids, interventions, reading) => {
    reading ??= new engine.Reading(app.config(model));
    const prompt = data.traces[model]?.findIndex((one) => String(one.ids) === String(ids));
    const start = reading.expect(ids);
    const answer = await client.ask({ type: "trace", model, ids, prompt, interventions, start });
    const trace = answer.trace ? { mark: {}, ...answer.trace } : reading.take(answer.rows);
    return Object.assign(trace, { model, pieces: Array.from(trace.ids, app.piece) });
  };

  /** The config of a model, of the one shown by default. */
  app.config = (model = app.state.model) => data.models[model].config;
  /** A model's name: a step of the run, or the compared one's run and step. */
  app.modelName = (i) => {
    const { name, group, step } = data.models[i];
    const run = runOf(name);
    const at = step === null ? "" : `step ${count(step)}`;
    return group === "run" && at ? at : [run, at].filter(Boolean).join(", ");
  };

  /** The model that is to stand beside the main one, {index, config, name}, or null;
      `app.besideModel` is the one whose trace is there. */
  function wantedBeside() {
    const { beside, model, interventions } = app.state;
    if (beside === null || (beside === "untouched" && !interventions.length)) return null;
    const index = beside === "untouched" ? model : beside;
    const name = beside === "untouched" ? "untouched" : app.modelName(index);
    return { index, config: app.config(index), name };
  }

  app.setText = (text) => app.change({ text, position: Infinity });
  app.setIds = (ids) => app.change({ ids, position: Infinity });

  /** How tokens are chosen in what the model writes: a slider that was moved back counts as moved. */
  app.settings = () => (app.state.settings === app.plain.settings ? SAMPLED : app.state.settings);

  /** The tokens of the text to go on from; the one that is read for an empty text is not its own. */
  app.written = () => (app.state.text ? app.all : data.tokenizer.begin_of_text).slice();

  app.error = () => error;
  const pieces = new Map(); // id -> what is shown of it
  app.piece = (id) => {
    if (!pieces.has(id)) pieces.set(id, tokenizer.piece(id));
    return pieces.get(id);
  };

  /** How the text was predicted: mean nats per token, and each token's probability and rank. */
  app.scores = (trace) => {
    const { follows: p, rank } = trace.lens.at(-1);
    const nats = Array.from(p.subarray(0, -1), (x) => -Math.log(x));
    const mean = nats.reduce((a, b) => a + b, 0) / Math.max(1, nats.length);
    return (trace.scores ??= { nats, mean, rank, p });
  };

  function clampSelection() {
    const { state, trace } = app;
    const [L, H] = [app.config().n_layers, app.config().n_heads];
    state.layer = Math.max(0, Math.min(L - 1, state.layer));
    state.head = Math.max(0, Math.min(H - 1, state.head));
    if (!trace) return;
    state.position = Math.max(0, Math.min(trace.shape.T - 1, state.position));
    state.key = Math.max(0, Math.min(state.position, state.key));
  }

  makeSchedule(app);
  app.retrace = retrace;
  return app;
}
