// What the model does with numbers: 32-bit floats in arrays, 64-bit in sums.
//
// An array of shape (T, C) is one typed array, row after row.
"use strict";

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
  const columns = x.width,
    rows = y.width,
    a = x.data,
    b = y.data;
  let r = 0;
  for (; r + 3 < rows; r += 4) {
    const w0 = r * columns,
      w1 = w0 + columns,
      w2 = w1 + columns,
      w3 = w2 + columns;
    let t = start;
    for (; t + 1 < end; t += 2) {
      const x0 = t * columns,
        x1 = x0 + columns;
      let s00 = 0,
        s01 = 0,
        s02 = 0,
        s03 = 0,
        s10 = 0,
        s11 = 0,
        s12 = 0,
        s13 = 0;
      for (let i = 0; i < columns; i++) {
        const first = a[x0 + i],
          second = a[x1 + i];
        const v0 = weight[w0 + i],
          v1 = weight[w1 + i],
          v2 = weight[w2 + i],
          v3 = weight[w3 + i];
        s00 += first * v0;
        s01 += first * v1;
        s02 += first * v2;
        s03 += first * v3;
        s10 += second * v0;
        s11 += second * v1;
        s12 += second * v2;
        s13 += second * v3;
      }
      const to = t * rows + r,
        next = to + rows;
      b[to] = s00;
      b[to + 1] = s01;
      b[to + 2] = s02;
      b[to + 3] = s03;
      b[next] = s10;
      b[next + 1] = s11;
      b[next + 2] = s12;
      b[next + 3] = s13;
    }
    if (t < end) {
      const x0 = t * columns,
        to = t * rows + r;
      let s0 = 0,
        s1 = 0,
        s2 = 0,
        s3 = 0;
      for (let i = 0; i < columns; i++) {
        const first = a[x0 + i];
        s0 += first * weight[w0 + i];
        s1 += first * weight[w1 + i];
        s2 += first * weight[w2 + i];
        s3 += first * weight[w3 + i];
      }
      b[to] = s0;
      b[to + 1] = s1;
      b[to + 2] = s2;
      b[to + 3] = s3;
    }
  }
  for (; r < rows; r++) {
    for (let t = start; t < end; t++) {
      let sum = 0;
      for (let i = 0; i < columns; i++) sum += a[t * columns + i] * weight[r * columns + i];
      b[t * rows + r] = sum;
    }
  }
  if (!bias) return;
  for (let t = start; t < end; t++) for (r = 0; r < rows; r++) b[t * rows + r] += bias[r];
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
  let sum = 0,
    squares = 0;
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
  let largest = -Infinity,
    sum = 0;
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
