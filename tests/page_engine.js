// Runs the page's engine for tests/test_visualize.py: reads a question as one JSON object a line,
// writes its answer as one. Typed arrays travel as {dtype, data: base64}.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const readline = require("node:readline");
const vm = require("node:vm");

const PAGE = path.join(__dirname, "..", "page");
const run = (name) => {
  const filename = path.join(PAGE, `${name}.js`);
  // As join_page of visualize.py does.
  vm.runInThisContext(`"use strict";{${fs.readFileSync(filename, "utf8")}}`, { filename });
};
run("unpack");
engine.tokenizers = require(path.join(PAGE, "vendor", "tokenizers.min.cjs"));
["tokenizer", "numbers", "sampling", "conversation", "block", "pass", "trace", "model"].forEach(run);
const [models, tokenizers, conversations] = [new Map(), new Map(), new Map()];

const DTYPES = { Float32Array: "float32", Int32Array: "int32", Float64Array: "float64" };

function packed(key, value) {
  const dtype = DTYPES[value?.constructor?.name];
  if (!dtype) return value;
  const bytes = Buffer.from(value.buffer, value.byteOffset, value.byteLength);
  return { dtype, data: bytes.toString("base64") };
}

const floats = (base64) => new Float32Array(Uint8Array.from(Buffer.from(base64, "base64")).buffer);

const answers = {
  async model({ key, description, blob }) {
    const weights = await engine.unpack(description.tensors, blob);
    models.set(key, new engine.Model(description, weights));
  },
  async packedTrace({ description, tensors, blob }) {
    return engine.fromPacked(await engine.unpack(tensors, blob), description);
  },
  trace({ key, ids, interventions, fresh }) {
    const model = models.get(key);
    if (fresh) model.passes.clear();
    return new engine.Reading(model.config).take(model.rows(ids, interventions));
  },
  write({ key, ids, request }) {
    return [...models.get(key).write(ids, request)];
  },
  async tokenizer({ key, blob, end_of_text }) {
    const description = { begin_of_text: [], end_of_text, blob: 0 };
    tokenizers.set(key, await engine.loadTokenizer(description, [blob]));
  },
  encode({ key, text }) {
    const ids = tokenizers.get(key).encode(text);
    return { ids, decoded: tokenizers.get(key).decode(ids) };
  },
  async chat({ key, tokenizer: blob, pieces }) {
    const tokenizer = await engine.loadTokenizer({ begin_of_text: [], blob: 0 }, [blob], pieces.as_text);
    conversations.set(key, new engine.Conversation(pieces, tokenizer));
  },
  fit: ({ key, messages, context }) => conversations.get(key).fit(messages, context),
  answer({ key, messages, context }) {
    const [conversation, model] = [conversations.get(key), models.get(key)];
    const { ids, leftOut, room } = conversation.fit(messages, context);
    const { ends: endOfText } = conversation.pieces;
    const request = { count: room, settings: { temperature: 0 }, endOfText };
    const tokens = [...model.write(ids, request)].map(({ token }) => token);
    const text = conversation.texts(tokens.filter((token) => !endOfText.includes(token))).join("");
    return { ids, leftOut, tokens, said: conversation.said(text) };
  },
  pieces: ({ key, ids }) => ids.map((id) => tokenizers.get(key).piece(id)),
  filter({ logits, settings }) {
    return settings.map((each) => engine.filterProbabilities(floats(logits), each));
  },
  random({ seed, count }) {
    const next = engine.randomNumbers(seed);
    return Float64Array.from({ length: count }, next);
  },
  draw: ({ p, numbers }) => numbers.map((number) => engine.draw(floats(p), number)),
  measures: ({ attention, T, ids }) => engine.headMeasures(floats(attention), T, ids),
};

(async () => {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { question, ...values } = JSON.parse(line);
    let answer;
    try {
      answer = { answer: await answers[question](values) };
    } catch (error) {
      answer = { error: String(error.message ?? error) };
    }
    process.stdout.write(`${JSON.stringify(answer, packed)}\n`);
  }
})();
