// What the model does with numbers: 32-bit floats in arrays, 64-bit in sums.
//
// An array of shape (T, C) is one typed array, row after row.

/** Rows of one width that grow in number, (T, width). */
class Rows {
  constructor(width) {
    this.width = width;
    this.data = new Float32Array(0);
  }

  /** Make room for T rows. */
  grow(T) {
    if (T * this.width <= this.data.length) return;
    const old = this.data;
    this.data = new Float32Array(Math.max(T * this.width, 2 * old.length));
    this.data.set(old);
  }

  row(t) {
    return this.data.subarray(t * this.width, (t + 1) * this.width);
  }

  /** Return a copy of rows start to end. */
  cut(start, end) {
    return this.data.slice(start * this.width, end * this.width);
  }
}

/** y[t] = weight x[t] + bias for t from start to end; weight is (y.width, x.width).
 *  Four rows of weights times two of x at once: each number that is read is used several times. */
function linear(x, y, start, end, weight, bias) {
  const [columns, rows, a, b] = [x.width, y.width, x.data, y.data];
  for (let r0 = 0; r0 < rows; r0 += 4) {
    const r1 = Math.min(r0 + 1, rows - 1); // the last row again, where there is none
    const r2 = Math.min(r0 + 2, rows - 1);
    const r3 = Math.min(r0 + 3, rows - 1);
    const [w0, w1, w2, w3] = [r0 * columns, r1 * columns, r2 * columns, r3 * columns];
    let s00, s01, s02, s03, s10, s11, s12, s13;
    for (let t = start; t < end; t += 2) {
      const paired = t + 1 < end;
      const [x0, x1] = [t * columns, (t + 1) * columns];
      const [y0, y1] = [t * rows, (t + 1) * rows];
      s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = 0;
      if (paired) {
        for (let i = 0; i < columns; i++) {
          const first = a[x0 + i];
          const second = a[x1 + i];
          const v0 = weight[w0 + i];
          const v1 = weight[w1 + i];
          const v2 = weight[w2 + i];
          const v3 = weight[w3 + i];
          s00 += first * v0;
          s01 += first * v1;
          s02 += first * v2;
          s03 += first * v3;
          s10 += second * v0;
          s11 += second * v1;
          s12 += second * v2;
          s13 += second * v3;
        }
      } else {
        for (let i = 0; i < columns; i++) {
          const first = a[x0 + i];
          s00 += first * weight[w0 + i];
          s01 += first * weight[w1 + i];
          s02 += first * weight[w2 + i];
          s03 += first * weight[w3 + i];
        }
      }
      b[y0 + r0] = s00;
      b[y0 + r1] = s01;
      b[y0 + r2] = s02;
      b[y0 + r3] = s03;
      if (!paired) continue;
      b[y1 + r0] = s10;
      b[y1 + r1] = s11;
      b[y1 + r2] = s12;
      b[y1 + r3] = s13;
    }
  }
  if (!bias) return;
  for (let t = start; t < end; t++) for (let r = 0; r < rows; r++) b[t * rows + r] += bias[r];
}

/** Divide x, `width` numbers from `from` on, by their root mean square, and scale; into y. */
function rmsNorm(x, y, from, width, weight, eps) {
  let squares = 0;
  for (let i = from; i < from + width; i++) squares += x[i] * x[i];
  const factor = 1 / Math.sqrt(squares / width + eps);
  for (let i = 0; i < width; i++) y[from + i] = x[from + i] * factor * weight[i];
}

/** Give x mean 0 and variance 1, scale and shift; into y. */
function layerNorm(x, y, from, width, weight, bias, eps) {
  let [sum, squares] = [0, 0];
  for (let i = from; i < from + width; i++) sum += x[i];
  const mean = sum / width;
  for (let i = from; i < from + width; i++) squares += (x[i] - mean) ** 2;
  const factor = 1 / Math.sqrt(squares / width + eps);
  for (let i = 0; i < width; i++) y[from + i] = (x[from + i] - mean) * factor * weight[i] + bias[i];
}

const silu = (x) => x / (1 + Math.exp(-x));

/** GELU by GPT-2's formula. */
const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

/** Return softmax of x as 32-bit floats; -Infinity becomes 0. */
function softmax(x) {
  let [largest, sum] = [-Infinity, 0];
  for (let i = 0; i < x.length; i++) if (x[i] > largest) largest = x[i];
  const p = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) sum += Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) p[i] = Math.exp(x[i] - largest) / sum;
  return p;
}

/** Return the entropy of probabilities, in nats. */
function entropy(p) {
  let sum = 0;
  for (let i = 0; i < p.length; i++) if (p[i] > 0) sum -= p[i] * Math.log(p[i]);
  return sum;
}

/** Return the ids of the `count` largest numbers, largest first; of equal ones the lower id. */
function largest(x, count) {
  const ids = [];
  let least = -Infinity; // what it takes to be one of them
  for (let i = 0; i < x.length; i++) {
    if (ids.length === count && !(x[i] > least)) continue;
    let place = ids.length;
    while (place > 0 && x[i] > x[ids[place - 1]]) place--;
    ids.splice(place, 0, i);
    if (ids.length > count) ids.pop();
    least = x[ids.at(-1)];
  }
  return ids;
}

/** Return the Euclidean norm of each of T rows. */
function rowNorms(x, T) {
  const width = x.length / T;
  return Float32Array.from({ length: T }, (_, t) => {
    let squares = 0;
    for (let i = t * width; i < (t + 1) * width; i++) squares += x[i] * x[i];
    return Math.sqrt(squares);
  });
}

Object.assign(engine, {
  entropy,
  gelu,
  largest,
  layerNorm,
  linear,
  rmsNorm,
  Rows,
  rowNorms,
  silu,
  softmax,
});
