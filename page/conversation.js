// Conversations as ids: those that Template.prompt of plainllama/chat.py gives, from its `pieces`.
// Without any, the last message is a text that goes on. A message is {role, content}.

const LONGEST = 256; // tokens of an answer, as in sample.py
const BLANK = "[\\p{White_Space}\\x1c-\\x1f]+"; // what Python strips
const [EDGES, START] = [new RegExp(`^${BLANK}|${BLANK}$`, "gu"), new RegExp(`^${BLANK}`, "u")];

class Conversation {
  /** `pieces` is the page's data of its chat, `tokenizer` has been told which words are text. */
  constructor(pieces, tokenizer) {
    this.pieces = pieces;
    this.tokenizer = tokenizer;
  }

  /** Return the ids of messages, up to where the model answers. */
  prompt(messages) {
    const { frames, strips } = this.pieces;
    if (!frames)
      return [...this.tokenizer.beginOfText, ...this.tokenizer.encode(messages.at(-1).content)];
    const ids = [];
    let before = "begin";
    for (const { role, content } of messages) {
      const text = strips.includes(role) ? content.replace(EDGES, "") : content;
      ids.push(...frames[`${before} ${role}`], ...this.tokenizer.encode(text));
      before = role;
    }
    return [...ids, ...frames[`${before} answer`]];
  }

  /** Return {ids, leftOut, room}: a prompt without the first exchanges, after the system's message,
   *  if it has to be shorter; how many they are; for how many tokens of an answer there is room.
   *  An error says that the last message alone is too long. */
  fit(messages, context) {
    if (!this.pieces.frames) return { ids: this.prompt(messages), leftOut: 0, room: LONGEST };
    const system = messages.filter(({ role }) => role === "system");
    const spoken = messages.slice(system.length);
    let [ids, leftOut] = [this.prompt(messages), 0];
    while (ids.length > context - Math.floor(context / 4) && spoken.length > 1) {
      spoken.splice(0, 2); // a question and its answer
      ids = this.prompt([...system, ...spoken]);
      leftOut++;
    }
    const room = context - ids.length;
    if (room <= 0)
      throw new Error(`the message takes ${ids.length} tokens of a context of ${context}`);
    return { ids, leftOut, room: Math.min(LONGEST, room) };
  }

  /** Return what each of an answer's ids adds to its text; bytes of half a character add nothing. */
  texts(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return ids.map((id) => decoder.decode(this.tokenizer.bytes(id), { stream: true }));
  }

  /** Return what an answer says, without the thoughts before it. */
  said(text) {
    const { said_after: word } = this.pieces;
    return word && text.includes(word) ? text.split(word).at(-1).replace(START, "") : text;
  }
}

Object.assign(engine, { Conversation });
