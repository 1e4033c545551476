// The tokenizer: byte-level BPE, with the ids of tiktoken.
//
// Bytes are handled as strings of characters 0 to 255.
"use strict";

{
const { fromBase64 } = engine;
const toBytes = (text) => new TextEncoder().encode(text);
const fromBytes = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
const strictly = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });
const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
const NAMED = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };

/** Return bytes as text that can be seen: what is no character, or invisible, is spelled out. */
function printable(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length;) {
    const length = bytes[i] < 0xc0 ? 1 : bytes[i] < 0xe0 ? 2 : bytes[i] < 0xf0 ? 3 : 4;
    try {
      text += strictly.decode(bytes.subarray(i, i + length));
      i += length;
    } catch {
      text += "\\x" + bytes[i++].toString(16).toUpperCase().padStart(2, "0");
    }
  }
  const hex = (char) => `\\u{${char.codePointAt(0).toString(16)}}`;
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (char) => NAMED[char] ?? hex(char));
}

// What makes a word longer, beside an added token that must not be inside of one.
const IN_WORD = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;

class Tokenizer {
  constructor({ pattern, classes, tokens, added, nfc, begin_of_text, end_of_text }) {
    this.tokens = tokens.map((token) => token === null ? null : atob(token)); // by id
    this.ranks = new Map(this.tokens.map((token, id) => [token, id]));
    this.ranks.delete(null);
    this.added = added; // [{id, content, special, ...}]
    this.names = new Map(added.map(({ id, content }) => [id, content]));
    Object.assign(this, { nfc, beginOfText: begin_of_text, endOfText: end_of_text });
    const inFull = (same, name) => classes[name] ?? same; // of L, N, ...: as tiktoken has them
    this.pattern = new RegExp(pattern.replace(/\\p\{(\w+)\}/g, inFull), "gu");
  }

  normalized(text) {
    return this.nfc ? text.normalize("NFC") : text;
  }

  /** Return the added tokens that a text has, and what is between them, in order: an array of
   *  tokens and strings. Some are looked for before normalization, some after it. */
  pieces(text, special) {
    const added = special || this.added.some((token) => !token.special) ? this.added : [];
    const early = added.filter((token) => !token.normalized).map((token) => [token.content, token]);
    const late = added.filter((token) => token.normalized);
    const found = late.map((token) => [this.normalized(token.content), token]);
    return findAdded(text, new Map(early), special).flatMap((piece) => (
      typeof piece === "string"
        ? findAdded(this.normalized(piece), new Map(found), special) : [piece]
    ));
  }

  /** Return {ids, spans}: spans are [start, end] in the bytes of the text, which is in NFC if the
   *  model's is. What is written like a special token is text unless `special`. */
  encode(text, special = false) {
    const ids = [], spans = [];
    let end = 0;
    const add = (id, length) => {
      ids.push(id);
      spans.push([end, end += length]);
    };
    for (const piece of this.pieces(fromBytes(toBytes(text)), special)) { // no half characters
      if (typeof piece !== "string") {
        add(piece.id, toBytes(piece.text).length);
        continue;
      }
      for (const [word] of piece.matchAll(this.pattern)) {
        for (const id of this.merge(toBytes(word))) add(id, this.tokens[id].length);
      }
    }
    return { ids, spans };
  }

  /** Return the ids of one word: of all neighbours, those that make the lowest id merge first. */
  merge(bytes) {
    const word = String.fromCharCode(...bytes);
    if (this.ranks.has(word)) return [this.ranks.get(word)];
    const starts = [...word].map((_, i) => i); // where each part begins
    starts.push(word.length);
    const rank = (i) => this.ranks.get(word.slice(starts[i], starts[i + 2])) ?? Infinity;
    const made = starts.slice(0, -2).map((_, i) => rank(i)); // by merging part i and the next
    for (;;) {
      let lowest = 0;
      for (let i = 1; i < made.length; i++) if (made[i] < made[lowest]) lowest = i;
      if (!(made[lowest] < Infinity)) break;
      starts.splice(lowest + 1, 1);
      made.splice(lowest, 1);
      if (lowest < made.length) made[lowest] = rank(lowest);
      if (lowest > 0) made[lowest - 1] = rank(lowest - 1);
    }
    return starts.slice(0, -1).map((start, i) => {
      const id = this.ranks.get(word.slice(start, starts[i + 1]));
      if (id !== undefined) return id;
      const isToken = (byte) => this.ranks.has(String.fromCharCode(byte));
      const known = (char) => toBytes(char).every(isToken);
      const unknown = [...fromBytes(bytes)].find((char) => !known(char));
      throw new Error(`${JSON.stringify(unknown)} is not in the vocabulary; leave it out`);
    });
  }

  /** Return what sample.py gives the model for a text: {ids, pieces, spans}. */
  encodePrompt(text, special = false) {
    const { ids, spans } = this.encode(text, special);
    ids.unshift(...this.beginOfText);
    spans.unshift(...this.beginOfText.map(() => [0, 0]));
    if (!ids.length) {
      ids.push(this.endOfText[0]);
      spans.push([0, 0]);
    }
    return { ids, pieces: ids.map((id) => this.piece(id)), spans };
  }

  /** Return the bytes of a token; nothing for those that only the model knows. */
  bytes(id) {
    if (this.names.has(id)) return toBytes(this.names.get(id));
    return Uint8Array.from(this.tokens[id] ?? "", (char) => char.charCodeAt(0));
  }

  /** Return a token as text that can be seen. */
  piece(id) {
    return this.names.has(id) || this.tokens[id] ? printable(this.bytes(id)) : `<id ${id}>`;
  }

  decode(ids) {
    return fromBytes(Uint8Array.from(ids.flatMap((id) => [...this.bytes(id)])));
  }
}

/** Return the `tokens`, {content: token}, that a text has, the first and longest ones, and the
 *  strings between them, in order. */
function findAdded(text, tokens, special) {
  const longestFirst = [...tokens.keys()].sort((a, b) => b.length - a.length);
  const found = [];
  let start = 0;
  if (tokens.size) {
    for (const match of text.matchAll(new RegExp(longestFirst.map(escaped).join("|"), "gu"))) {
      const token = tokens.get(match[0]);
      let left = match.index, right = left + match[0].length;
      if (token.special && !special) continue;
      const before = [...text.slice(Math.max(0, left - 2), left)].at(-1) ?? "";
      const after = [...text.slice(right, right + 2)][0] ?? "";
      if (token.single_word && (IN_WORD.test(before) || IN_WORD.test(after))) continue;
      if (token.lstrip) left -= text.slice(start, left).match(/\p{White_Space}*$/u)[0].length;
      if (token.rstrip) right += text.slice(right).match(/^\p{White_Space}*/u)[0].length;
      if (left > start) found.push(text.slice(start, left));
      found.push({ ...token, text: text.slice(left, right) });
      start = right;
    }
  }
  return start < text.length ? [...found, text.slice(start)] : found;
}

Object.assign(engine, {
  Tokenizer, printable,
});
}
