// Drawings: curves over time and the arena as a bar. No state of the server is kept here but what the curves show.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${unit && count < 10 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

// A curve of the last `SAMPLES` values; null is a gap that keeps its place.
export class Curve {
  static SAMPLES = 180;

  constructor(parent, title, show) {
    this.values = [];
    this.title = title;
    this.show = show;
    this.now = element("b", {}, "–");
    this.svg = shape("svg", { class: "chart", viewBox: `0 0 ${Curve.SAMPLES - 1} 100`, preserveAspectRatio: "none", role: "img" });
    this.line = shape("polyline", { points: "" });
    this.svg.append(this.line);
    parent.append(element("figure", {}, element("figcaption", {}, element("span", {}, title), this.now), this.svg));
  }

  add(value) {
    this.values.push(value);
    if (this.values.length > Curve.SAMPLES) this.values.shift();
    const most = Math.max(...this.values.filter((v) => v !== null), 0) || 1;
    const from = Curve.SAMPLES - this.values.length;
    const points = this.values.map((v, i) => (v === null ? null : `${from + i},${96 - (90 * v) / most}`));
    this.line.setAttribute("points", points.filter((p) => p !== null).join(" "));
    const last = this.values.findLast((v) => v !== null);
    this.now.textContent = last === undefined ? "–" : this.show(last);
    this.svg.setAttribute("aria-label", `${this.title}: now ${this.now.textContent}, at most ${this.show(most)} in the last minutes`);
  }
}

// The same name has the same colour in every browser.
export function hue(name) {
  let mixed = 2166136261; // FNV-1a, which tells short names apart
  for (const letter of name) mixed = Math.imul(mixed ^ letter.codePointAt(0), 16777619) >>> 0;
  return mixed % 360;
}

// The arena as one bar: what requests hold, the prefix cache, each adapter, free.
export function drawArena(parent, legend, arena, adapters) {
  const total = arena.total_pages || 1;
  const parts = [
    { name: "KV of running requests", pages: arena.kv_pages, colour: "var(--kv)" },
    { name: "prefix cache", pages: arena.prefix_pages, colour: "var(--prefix)" },
  ];
  const resident = adapters.filter((a) => a.device_bytes).sort((a, b) => b.device_bytes - a.device_bytes);
  let named = 0;
  for (const adapter of resident) {
    const pages = adapter.device_bytes / arena.page_bytes;
    named += pages;
    parts.push({ name: adapter.name + (adapter.pinned ? " (pinned)" : ""), pages, colour: `hsl(${hue(adapter.name)} 55% 55%)` });
  }
  const others = arena.adapter_pages - named;
  if (others > 0.5) parts.push({ name: "other versions of adapters", pages: others, colour: "var(--soft)" });
  parts.push({ name: "free", pages: arena.free_pages, colour: "var(--free)" });
  const svg = shape("svg", { viewBox: `0 0 ${total} 10`, preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", parts.map((p) => `${p.name} ${bytes(p.pages * arena.page_bytes)}`).slice(0, 12).join(", "));
  let at = 0;
  for (const part of parts) {
    const rect = shape("rect", { x: at, y: 0, width: part.pages, height: 10 });
    rect.style.fill = part.colour;
    const title = shape("title", {});
    title.textContent = `${part.name}: ${bytes(part.pages * arena.page_bytes)}`;
    rect.append(title);
    svg.append(rect);
    at += part.pages;
  }
  parent.replaceChildren(svg);
  legend.replaceChildren(
    ...parts.filter((p) => p.pages > 0).map((p) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.background = p.colour;
      return element("li", {}, swatch, `${p.name} ${bytes(p.pages * arena.page_bytes)}`);
    }),
  );
}

// Words of `text` with those marked that `other` does not have at that place (longest common subsequence).
export function difference(text, other) {
  const a = other.split(/(\s+)/), b = text.split(/(\s+)/);
  if (a.length * b.length > 4e6) return [document.createTextNode(text)];
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const found = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { found.push(document.createTextNode(b[j])); i++; j++; }
    else if (j < b.length && (i === a.length || length[i][j + 1] >= length[i + 1][j])) found.push(element("ins", {}, b[j++]));
    else found.push(element("del", {}, a[i++]));
  }
  return found;
}
