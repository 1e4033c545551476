// The tokenizer: a tokenizer.json, run by npm's @huggingface/tokenizers 0.2.0, which lies unchanged
// in vendor/tokenizers.min.cjs, with the ids that Python's `tokenizers` gives. The bytes of single
// tokens, which it does not tell, are read off the vocabulary here.

const { gunzip } = engine;
const toBytes = (text) => new TextEncoder().encode(text);
const fromBytes = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
const strictly = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });
// JavaScript's \s has U+FEFF and lacks U+0085, and its \d ends at 9, other than in `tokenizers`.
const CLASSES = { "\\s": "\\p{White_Space}", "\\S": "\\P{White_Space}", "\\d": "\\p{N}" };
const BYTES = new engine.tokenizers.ByteLevelDecoder({}).byte_decoder; // of printed characters
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

class Tokenizer {
  /** `content` is a tokenizer.json; what it says of special tokens counts for decoding alone, so
   *  that text which looks like one stays text. */
  constructor(content, { begin_of_text, end_of_text }) {
    const added = content.added_tokens ?? [];
    this.library = new engine.tokenizers.Tokenizer(
      {
        normalizer: null, // of these the library wants all
        pre_tokenizer: null,
        ...content,
        added_tokens: added.filter((token) => !token.special),
        decoder: null,
        post_processor: null,
      },
      {},
    );
    this.names = new Map(added.map((token) => [token.id, token.content]));
    this.model = content.model;
    this.beginOfText = begin_of_text;
    this.endOfText = end_of_text;
    const decoder = JSON.stringify(content.decoder ?? null);
    this.byteLevel = decoder.includes('"ByteLevel"'); // each character of a token is a byte
    this.dropsBlank = /"Strip"|"Metaspace"/.test(decoder); // the one that encoding put first
    for (const step of [this.library.pre_tokenizer].flatMap((s) => s?.tokenizers ?? s ?? [])) {
      if (!step.pattern || step.config.pattern) continue; // of the file: the library translates it
      const source = step.pattern.source.replace(/\\[sSd]/g, (found) => CLASSES[found]);
      step.pattern = new RegExp(source, "gu");
    }
  }

  /** Return the ids of a text, without what a model expects before it. */
  encode(text) {
    const whole = fromBytes(toBytes(text)); // half a surrogate pair becomes U+FFFD
    return this.library.encode(whole, { add_special_tokens: false }).ids;
  }

  /** Return the bytes of a token; nothing for those that only the model knows. */
  bytes(id) {
    if (this.names.has(id)) return toBytes(this.names.get(id));
    return this.toBytes(this.library.id_to_token(id) ?? "");
  }

  /** Return the bytes that the name of a token in the vocabulary stands for. */
  toBytes(token) {
    if (this.byteLevel) return Uint8Array.from(token, (char) => BYTES[char]);
    const byte = token.match(/^<0x([0-9A-F]{2})>$/);
    return byte ? Uint8Array.of(parseInt(byte[1], 16)) : toBytes(token.replaceAll("\u2581", " "));
  }

  /** Return a token as text that can be seen. */
  piece(id) {
    return printable(this.bytes(id)) || `<id ${id}>`;
  }

  /** Return what each of the ids adds to the text; a character of several is the last one's. */
  texts(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const begins = this.beginOfText.every((id, i) => id === ids[i]);
    const from = begins ? this.beginOfText.length : 0;
    const texts = Array.from(ids, (id, i) =>
      i < from ? "" : decoder.decode(this.bytes(id), { stream: true }),
    );
    if (texts.length) texts[texts.length - 1] += decoder.decode();
    const first = texts.findIndex(Boolean);
    if (this.dropsBlank && first >= 0) texts[first] = texts[first].replace(/^ /, "");
    return texts;
  }

  /** Return the text of ids, without what a model expects before it. */
  decode(ids) {
    return this.texts(ids).join("");
  }

  /** Return the merges that make a token of characters or bytes, in the order in which they were
   *  learned, as [{left, right, rank}]; null where none make it. */
  merges(id) {
    this.ranks ??= new Map(
      (this.model.merges ?? []).map((pair, rank) => [[pair].flat().join(" "), rank]),
    );
    const parts = this.names.has(id) ? [] : [...(this.library.id_to_token(id) ?? "")];
    const steps = [];
    while (parts.length > 1) {
      const ranks = parts.map((part, i) => this.ranks.get(`${part} ${parts[i + 1]}`) ?? Infinity);
      const rank = Math.min(...ranks);
      if (rank === Infinity) return null;
      const at = ranks.indexOf(rank);
      const [left, right] = parts.slice(at, at + 2);
      parts.splice(at, 2, left + right);
      steps.push({
        left: printable(this.toBytes(left)),
        right: printable(this.toBytes(right)),
        rank,
      });
    }
    return steps.length ? steps : null;
  }
}

/** Return the tokenizer that visualize.py packed: its description in the page's data, and blobs.
 *  To it, the added tokens whose ids are in `asText` are text like special ones. */
async function loadTokenizer(description, blobs, asText = []) {
  const content = JSON.parse(fromBytes(await gunzip(blobs[description.blob])));
  for (const token of content.added_tokens ?? []) token.special ||= asText.includes(token.id);
  return new Tokenizer(content, description);
}

Object.assign(engine, { Tokenizer, loadTokenizer, printable });
