// Numbers as text, colours and canvases, for all views.

/** A number with three significant digits, as short as it can be read. */
function num(x, digits = 3) {
  if (!Number.isFinite(x)) return x > 0 ? "∞" : x < 0 ? "−∞" : "–";
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size < 1e-4 || size >= 1e6) return x.toExponential(1).replace(/-/g, "−");
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return x.toFixed(Math.min(decimals, 5)).replace("-", "−");
}

/** A probability in per cent. */
function percent(p) {
  if (p === 0) return "0%";
  if (p < 0.0001) return "<0.01%";
  if (p > 0.9995 && p < 1) return ">99.9%";
  return `${(100 * p).toFixed(p < 0.001 ? 2 : p < 0.9995 ? 1 : 0)}%`;
}

const COMPACT = new Intl.NumberFormat("en-US", {
  notation: "compact",
  maximumSignificantDigits: 3,
});

/** A count with thousands separators, or shortened from a million on. */
const count = (n) => (n < 1e6 ? Math.round(n).toLocaleString("en-US") : COMPACT.format(n));

/** A number of floating-point operations. */
const flops = (n) => `${COMPACT.format(n)} FLOP`;

/** A token as one reads it: blanks become dots, for a piece usually begins with one. */
function showPiece(piece) {
  return piece === "" ? "∅" : piece.replace(/ /g, "·");
}

/** A token within a sentence, in quotes. */
function quoted(piece) {
  return `“${showPiece(piece)}”`;
}

/** Ramps of 256 colours from the style sheet; `paint.ink` and so on are its plain colours. */
const paint = {
  layouts: 0, // how often the page was laid out anew, so that widths have to be measured again
  read() {
    measureAnew();
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    const stops = (name, n) => Array.from({ length: n }, (_, i) => rgb(get(`--${name}-${i}`)));
    this.sequential = ramp(stops("sequential", 4));
    this.surprisal = ramp(stops("surprisal", 3));
    this.diverging = ramp(stops("diverging", 5));
    for (const name of ["ink", "soft", "line", "paper", "this", "beside", "mono"])
      this[name] = get(`--${name}`);
  },
};

/** Note that widths are no longer what they were. */
function measureAnew() {
  paint.layouts++;
}

function rgb(hex) {
  const n = parseInt(hex.slice(1), 16);
  return [n >> 16, (n >> 8) & 255, n & 255];
}

/** 256 colours between the stops, as [r, g, b]; `packed` has each as one pixel of a canvas. */
function ramp(stops) {
  const colours = Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (stops.length - 1);
    const k = Math.min(Math.floor(x), stops.length - 2);
    return stops[k].map((v, c) => Math.round(v + (stops[k + 1][c] - v) * (x - k)));
  });
  const bytes = Uint8Array.from(colours.flatMap((colour) => [...colour, 255]));
  return Object.assign(colours, { packed: new Uint32Array(bytes.buffer) });
}

const colourAt = (colours, t) => colours[Math.max(0, Math.min(255, Math.round(255 * t)))];

/** The colour of t in [0, 1] on a ramp, as CSS. */
const shade = (colours, t) => `rgb(${colourAt(colours, t)})`;

/** Black or white, whichever has more contrast (WCAG 2.2) with the colour of t: at least 4.58. */
function inkOn(colours, t) {
  const [r, g, b] = colourAt(colours, t).map((x) =>
    x <= 10 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4,
  );
  const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 ? "#ffffff" : "#000000";
}

/** Give a node the colour of t, and what is written on it the ink that can be read there. */
function tint(node, colours, t) {
  node.style.background = shade(colours, t);
  node.style.color = inkOn(colours, t);
}

/** Fit a canvas's pixels to its size on the screen and return its context, in CSS pixels. */
function fit(canvas, width, height) {
  const dpr = window.devicePixelRatio;
  const [w, h] = [Math.round(width * dpr), Math.round(height * dpr)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(dpr, 0, 0, dpr, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Draw rows * columns values, a pixel each; CSS enlarges it. `at(row, column)` is in [0, 1], or below
    0 where there is nothing; the first rows can be those of `known`, {pixels, columns, rows}. Return
    the pixels. */
function drawPixels(canvas, rows, columns, colours, at, known = { rows: 0 }) {
  const pixels = new Uint32Array(rows * columns);
  for (let r = 0; r < known.rows; r++) {
    const row = known.pixels.subarray(r * known.columns, (r + 1) * known.columns);
    pixels.set(row.subarray(0, columns), r * columns);
  }
  for (let r = known.rows, n = r * columns; r < rows; r++)
    for (let c = 0; c < columns; c++, n++) {
      const t = at(r, c);
      if (t >= 0) pixels[n] = colours.packed[Math.min(255, Math.round(255 * t))];
    }
  [canvas.width, canvas.height] = [columns, rows];
  const image = new ImageData(new Uint8ClampedArray(pixels.buffer), columns, rows);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return pixels;
}

const drawn = new WeakMap(); // canvas -> what drawTrace has drawn on it

/** Draw a row of a trace for each position; `what` names the numbers. If the canvas has the same of a
    text that began alike, only the rows that are new are drawn. */
function drawTrace(canvas, trace, what, columns, colours, at) {
  const before = drawn.get(canvas);
  const alike = before?.what === what && before.colours === colours;
  if (alike && before.mark === trace.mark) return;
  const known =
    alike && before.mark === trace.before ? { ...before, rows: trace.start } : undefined;
  const pixels = drawPixels(canvas, trace.shape.T, columns, colours, at, known);
  drawn.set(canvas, { what, colours, pixels, columns, mark: trace.mark });
}

/** A function that measures a node's width, again only after the page was laid out anew: reading a
    width makes the browser lay out what was written before. */
function widthOf(node, otherwise) {
  let [width, layouts] = [0, -1];
  return () => {
    if (layouts !== paint.layouts || !width) width = node.clientWidth;
    layouts = paint.layouts;
    return width || otherwise;
  };
}

/** Attention weights are mostly small; the root makes 0.05 visible and keeps the order. */
const weightShade = (weight) => Math.sqrt(weight);

/** Where a number lies on the diverging ramp, on which `most` is the largest; by the root, too. */
const signedShade = (v, most) =>
  0.5 + 0.5 * Math.sign(v) * Math.sqrt(Math.min(1, Math.abs(v) / most));

/** Largest magnitude of some numbers, at least a trifle. */
function magnitude(values) {
  let most = 1e-9;
  for (let i = 0; i < values.length; i++) most = Math.max(most, Math.abs(values[i]));
  return most;
}
