// Elements and texts. What strangers wrote only ever becomes text, never markup.

export function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const fill = (element, ...children) => element.replaceChildren(...children.flat(Infinity).filter((child) => child));

const format = (digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits });
export const whole = (value) => (value === null || value === undefined ? "–" : format(0).format(value));
export const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
export const percent = (value, digits = 0) =>
  value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`;

export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e4) return new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
  return format(size >= 100 ? 0 : size >= 1 ? 1 : 3).format(value);
}

export function signed(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  return (value > 0 ? "+" : "−") + (Math.abs(value) >= 0.001 ? Math.abs(value).toFixed(4) : Math.abs(value).toExponential(1));
}

export function bytes(count) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${format(count >= 10 * size ? 0 : 1).format(count / size)} ${unit}`;
  }
  return `${count} bytes`;
}

export function span(seconds) {
  const total = Math.max(0, Math.round(seconds));
  if (total < 90) return `${total} s`;
  if (total < 5400) return `${Math.round(total / 60)} min`;
  if (total < 129600) return `${Math.round(total / 3600)} h`;
  return `${Math.round(total / 86400)} days`;
}

export const ago = (at) => (at === null || at === undefined ? "never" : `${span(Date.now() / 1000 - at)} ago`);
export const clock = (at) => new Date(1000 * at).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });

export const peerEnd = (peer) => `…${peer.slice(-8)}`;
export const peerName = (name, peer) => name || peerEnd(peer);

// A pattern that follows from the id: two peers of one name can be told apart.
export function badge(peer, size = 30) {
  let seed = 2166136261;
  for (const sign of peer) seed = Math.imul(seed ^ sign.charCodeAt(0), 16777619) >>> 0;
  const make = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const svg = make("svg", { viewBox: "0 0 5 5", width: size, height: size, "aria-hidden": "true" });
  svg.append(make("rect", { width: 5, height: 5, fill: `hsl(${seed % 360} 45% 88%)` }));
  const ink = `hsl(${seed % 360} 55% 38%)`;
  for (let cell = 0; cell < 15; cell++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    if (seed < 0x7fffffff) continue;
    const x = Math.floor(cell / 5), y = cell % 5;
    svg.append(make("rect", { x, y, width: 1, height: 1, fill: ink }));
    if (x < 2) svg.append(make("rect", { x: 4 - x, y, width: 1, height: 1, fill: ink }));
  }
  return svg;
}

export const peerLink = (run, peer, name, isMine) =>
  h("span", { class: "peer" }, badge(peer),
    h("span", { class: "who" },
      h("a", { href: `/runs/${run}/peers/${peer}`, title: `${name ? `${name}: ` : ""}${peer}` }, peerName(name, peer)),
      name || isMine ? h("span", { class: "id" }, isMine ? "you, " : "", peerEnd(peer)) : null));

export const tile = (title, value, below = "") =>
  h("div", { class: "tile" }, h("dt", {}, title), h("dd", {}, value, h("small", {}, below)));

export const chip = (text, kind = "", sign = "") => h("span", { class: `chip ${kind}` }, sign ? h("span", { "aria-hidden": "true" }, sign) : null, text);

export const share = (part) =>
  h("span", { class: "bar", "aria-hidden": "true" }, h("span", { style: { width: `${100 * Math.min(1, Math.max(0, part))}%` } }));

export const empty = (title, text) => h("div", { class: "card empty" }, h("strong", {}, title), text);

export const head = (title, chips, ...about) =>
  h("div", { class: "head" }, h("h1", {}, title), chips, about.map((line) => h("p", { class: "about" }, line)));
