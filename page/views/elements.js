// Elements of the page. Data reaches it as text nodes and pixels only.

/** Make an element: el("button.quiet", { onclick }, "close"). The first word is its tag and classes;
    attributes may follow, of which those that begin with "on" are listeners, then children, which
    are nodes or text. */
function el(kind, ...rest) {
  const attributes = rest[0]?.constructor === Object ? rest.shift() : {};
  const [tag, ...classes] = kind.split(".");
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  if (tag === "button") node.type = "button";
  if (attributes.class) classes.push(attributes.class);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (missing.includes(value) || name === "class") continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  return refill(node, rest);
}

const missing = [null, undefined, false];

/** Give a node other children; those that are missing are left out. */
function refill(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => !missing.includes(child)));
  return node;
}

/** Make or remove children of a node at its end until there are n; make(i) makes one. Return them. */
function fillUp(node, n, make) {
  while (node.children.length < n) node.append(make(node.children.length));
  while (node.children.length > n) node.lastChild.remove();
  return Array.from(node.children);
}

/** Write a text into a node, if it is another one: the browser lays out what is written. */
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Wait until a condition holds. */
async function until(holds) {
  while (!holds()) await new Promise((resume) => setTimeout(resume, 20));
}

const setPressed = (button, on) => button.setAttribute("aria-pressed", String(on));

/** Call move(right, down) for the arrow keys, which then do nothing else. */
function onArrows(node, move) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  node.addEventListener("keydown", (event) => {
    if (!steps[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    move(...steps[event.key]);
    event.preventDefault();
    event.stopPropagation();
  });
}

/** A row of choices of which one is pressed. */
function choices(label, names, onPick) {
  const buttons = names.map((name, i) => el("button.choice", { onclick: () => onPick(i) }, name));
  const node = el("div.choices", { role: "group", "aria-label": label }, buttons);
  const press = (index) => buttons.forEach((button, i) => setPressed(button, i === index));
  return { node, press };
}

/** A labelled slider that shows its value; `format` makes text of it. */
function slider(label, options, format, onInput) {
  const output = el("output");
  const input = el("input", { type: "range", "aria-label": label, ...options });
  const show = () => (output.textContent = format(Number(input.value)));
  const set = (value) => {
    input.value = value;
    show();
  };
  input.addEventListener("input", () => {
    show();
    onInput(Number(input.value));
  });
  show();
  return { node: el("label.slider", el("span", label), input, output), input, set };
}
