// Choosing the next token, and what the heads of attention do.

const { largest, softmax, entropy } = engine;
const GREEDY = 1e-5; // temperatures below choose the likeliest token

/** Return the probabilities (V) that the filters leave of logits (V), as sample.py's
 *  filter_logits: temperature, top-k, top-p, min-p, each on what the one before has left. */
function filterProbabilities(logits, settings) {
  const { temperature = 1, top_k = 0, top_p = 1, min_p = 0 } = settings;
  const V = logits.length;
  if (temperature < GREEDY) {
    const p = new Float32Array(V);
    p[largest(logits, 1)[0]] = 1;
    return p;
  }
  const left = Float32Array.from(logits, (x) => x / Math.fround(temperature));
  const cutBelow = (weakest) => {
    for (let i = 0; i < V; i++) if (left[i] < weakest) left[i] = -Infinity;
  };
  if (top_k > 0 && top_k < V) cutBelow(left.slice().sort()[V - top_k]);
  if (top_p < 1) {
    const descending = softmax(left).sort().reverse();
    let [count, sum] = [0, 0]; // how many it takes to reach p
    while (count < V && sum < top_p) sum += descending[count++];
    const values = left.slice().sort().reverse();
    const weakest = values[count - 1];
    let equal = 0; // how many of those that are as likely as the weakest stay, lower ids first
    while (equal < count && values[count - 1 - equal] === weakest) equal++;
    cutBelow(weakest);
    for (let i = 0; i < V; i++) {
      if (left[i] === weakest) {
        if (equal === 0) left[i] = -Infinity;
        else equal--;
      }
    }
  }
  if (min_p > 0) cutBelow(Math.fround(left[largest(left, 1)[0]] + Math.log(min_p)));
  return softmax(left);
}

/** Return a function that gives numbers in [0, 1): PCG32 (pcg-random.org), seeded. */
function randomNumbers(seed) {
  const wrap = (n) => BigInt.asUintN(64, n),
    increment = 1n;
  const step = (state) => wrap(state * 6364136223846793005n + increment);
  let state = step(wrap(step(0n) + BigInt(Math.floor(seed))));
  return () => {
    const mixed = Number(BigInt.asUintN(32, ((state >> 18n) ^ state) >> 27n));
    const turn = Number(state >> 59n);
    state = step(state);
    return (((mixed >>> turn) | (mixed << (-turn & 31))) >>> 0) / 2 ** 32;
  };
}

/** Return the first token at which the sum of probabilities passes a number in [0, 1). */
function draw(p, number) {
  let total = 0,
    sum = 0,
    token = -1;
  for (let i = 0; i < p.length; i++) total += p[i];
  for (let i = 0; i < p.length && !(sum > number * total); i++) {
    if (p[i] > 0) token = i;
    sum += p[i];
  }
  return token;
}

// What a head does

/** Return for each head of a layer's attention (H, T, T), as means over positions from 1 on:
 *  `entropy` in nats of where it looks; `previous` and `first`, the weight on the token before and
 *  on the first; `induction`, the weight on tokens that followed earlier occurrences of the present
 *  one, at the positions where there are any. null where no position counts. */
function headMeasures(attention, T, ids) {
  const mean = (numbers) =>
    numbers.length ? numbers.reduce((a, b) => a + b) / numbers.length : null;
  return Array.from({ length: attention.length / (T * T) }, (_, h) => {
    const row = (t) => attention.subarray((h * T + t) * T, (h * T + t + 1) * T);
    const later = Array.from({ length: T - 1 }, (_, i) => row(i + 1));
    const copied = later.flatMap((weights, i) => {
      const followers = []; // of earlier occurrences of token i + 1
      for (let s = 0; s <= i; s++) if (ids[s] === ids[i + 1]) followers.push(weights[s + 1]);
      return followers.length ? followers.reduce((a, b) => a + b) : [];
    });
    return {
      entropy: mean(later.map(entropy)),
      previous: mean(later.map((row, i) => row[i])),
      first: mean(later.map((row) => row[0])),
      induction: mean(copied),
    };
  });
}

Object.assign(engine, { draw, filterProbabilities, headMeasures, randomNumbers });
