// Typed arrays as plainllama/page.py packs them: gzip as text, 16-bit floats, rows of whole numbers.
//
// The files of the engine share the one object `engine`, in the page, in its worker and in Node:
// those that visualize.py's ENGINE names, in that order.
globalThis.engine = {};

/** Return the bytes that a text of 85 signs stands for: see pack_bytes. */
function fromText(text) {
  const signs = text.trim();
  const bytes = new DataView(new ArrayBuffer(4 * Math.ceil(signs.length / 5)));
  for (let to = 0, i = 0; to < bytes.byteLength; to += 4) {
    let number = 0;
    for (const end = i + 5; i < end; i++) {
      const code = signs.charCodeAt(i) || 119; // "w", the largest, after the last
      number = 85 * number + (code === 120 ? 60 : code) - 35;
    }
    bytes.setUint32(to, number);
  }
  return new Uint8Array(bytes.buffer, 0, Math.floor((4 * signs.length) / 5));
}

const TYPES = { float32: Float32Array, int32: Int32Array, int8: Int8Array, float16: Uint16Array };

/** Return the bytes that the gzip holds for which a text stands. */
async function gunzip(text) {
  const gzip = new Blob([fromText(text)]).stream();
  const unzipped = new Response(gzip.pipeThrough(new DecompressionStream("gzip")));
  return new Uint8Array(await unzipped.arrayBuffer());
}

/** Return {name: typed array} for a table of tensors and the text that holds them. */
async function unpack(table, text) {
  const packed = await gunzip(text);
  const arrays = {};
  for (const { name, dtype, shape, offset } of table) {
    const array = new TYPES[dtype](shape.reduce((a, b) => a * b, 1));
    const size = array.BYTES_PER_ELEMENT;
    const bytes = new Uint8Array(array.buffer);
    // The first bytes of all numbers come first, then the second ones, and so on.
    for (let plane = 0, from = offset; plane < size; plane++) {
      for (let to = plane; to < bytes.length; to += size) bytes[to] = packed[from++];
    }
    arrays[name] = dtype === "float16" ? fromHalf(array) : array;
  }
  for (const [name, array] of Object.entries(arrays)) {
    if (!(array instanceof Int8Array)) continue;
    const scale = arrays[`${name}.scale`],
      columns = array.length / scale.length;
    const floats = (arrays[name] = new Float32Array(array.length));
    for (let i = 0, row = 0; row < scale.length; row++) {
      for (const end = i + columns; i < end; i++) floats[i] = array[i] * scale[row];
    }
    delete arrays[`${name}.scale`];
  }
  return arrays;
}

let halves = null; // the value of each of the 65,536 16-bit floats

/** Return the 16-bit floats of a Uint16Array as 32-bit ones, which is exact. */
function fromHalf(bits) {
  halves ??= Float32Array.from({ length: 65536 }, (_, half) => {
    const sign = half & 0x8000 ? -1 : 1,
      exponent = (half >> 10) & 31,
      fraction = half & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
  const floats = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) floats[i] = halves[bits[i]];
  return floats;
}

Object.assign(engine, { gunzip, unpack });
