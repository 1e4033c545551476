// Save picture: a section as a PNG, with the model's name below.

const MARGIN = 24;
const SHARPNESS = 2; // pixels of the picture for one of the page

function makePicture(app, section) {
  const button = el("button.quiet", { onclick: save }, "Save picture");
  section.append(el("p.saving", button));

  async function save() {
    const canvas = await pictureOf(section, captionOf(app));
    const blob = await new Promise((resolve) => canvas.toBlob(resolve));
    const href = URL.createObjectURL(blob);
    const name = `${runOf(app.data.title)}-${section.id}.png`.replace(/[^\w.-]+/g, "-");
    el("a", { href, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  }
}

function captionOf(app) {
  const { family, n_params } = app.data.models[app.state.model];
  const names = new Set([runOf(app.data.title), app.modelName(app.state.model)]); // or one twice
  return `${[...names].join(", ")}: ${family}, ${count(n_params)} parameters · plainllama`;
}

/** A section drawn on a canvas: as a picture of a document that holds all it needs. */
async function pictureOf(section, caption) {
  const box = section.getBoundingClientRect();
  const [width, height] = [Math.ceil(box.width), Math.ceil(box.height)];
  const copy = section.cloneNode(true);
  const pairs = (selector) => {
    const copies = copy.querySelectorAll(selector);
    return [...section.querySelectorAll(selector)].map((node, i) => [node, copies[i]]);
  };
  for (const [node, same] of pairs("textarea")) same.textContent = node.value;
  for (const [node, same] of pairs("input")) same.setAttribute("value", node.value);
  for (const [node, same] of pairs("select"))
    same.options[node.selectedIndex]?.setAttribute("selected", "");
  for (const [node, same] of pairs(".sheet, .talk"))
    same.style.cssText = `max-height: none; height: ${node.offsetHeight}px; overflow: hidden`;
  for (const [node, same] of pairs("canvas")) {
    const image = el("img", { src: node.toDataURL(), class: node.className });
    image.style.cssText = `${node.style.cssText}; display: block`;
    same.replaceWith(image);
  }
  copy.querySelector(".saving").remove();
  const style = document.querySelector("style").textContent.replaceAll("canvas", "img");
  const root = getComputedStyle(document.documentElement);
  const names = new Set(style.match(/--[\w-]+(?=:)/g));
  const colours = [...names].map((name) => `${name}: ${root.getPropertyValue(name)}`).join("; ");
  const page = el("div", { xmlns: "http://www.w3.org/1999/xhtml" }, el("style", style), copy);
  page.style.cssText = `${colours}; color: var(--ink); font: 15px/1.5 var(--sans); width: ${width}px`;
  const holder = el("svg:foreignObject", { width: "100%", height: "100%" }, page);
  const size = { xmlns: "http://www.w3.org/2000/svg", width, height };
  const drawn = new XMLSerializer().serializeToString(el("svg:svg", size, holder));
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(drawn)}`;
  await image.decode();
  const sides = [width + 2 * MARGIN, height + 3 * MARGIN].map((side) => side * SHARPNESS);
  const canvas = el("canvas", { width: sides[0], height: sides[1] });
  const context = canvas.getContext("2d");
  context.scale(SHARPNESS, SHARPNESS);
  context.fillStyle = paint.paper;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, MARGIN, MARGIN, width, height);
  context.fillStyle = paint.soft;
  context.font = "14px system-ui, sans-serif";
  context.fillText(caption, MARGIN, height + 2 * MARGIN);
  return canvas;
}
