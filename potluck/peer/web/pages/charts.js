// Charts by plotly, each with its numbers as a table. The library is loaded once a page has something to draw.
import { h, fill } from "./dom.js";

let loading = null;
const drawn = new Map();

function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = document.querySelector('meta[name="plotly"]').content;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new TypeError("the chart library does not load"));
    document.head.append(script);
  });
  return loading;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
// Plotly reads some markup in texts.
export const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

// Lines differ in colour and, for who cannot tell colours apart, in how they are broken.
const DASHES = [["solid", ""], ["dash", "7 4"], ["dot", "2 3"], ["dashdot", "7 3 2 3"]];
const dash = (place) => DASHES[Math.floor(place / 3) % DASHES.length];

function swatch(place) {
  const make = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const svg = make("svg", { width: 26, height: 8, "aria-hidden": "true" });
  svg.append(make("line", { x1: 0, y1: 4, x2: 26, y2: 4, stroke: `var(--c${(place % 10) + 1})`, "stroke-width": 2.5, "stroke-dasharray": dash(place)[1] }));
  return svg;
}

// `series`: [{name, x, y, text?, bars?}]; `summary`: the chart in one sentence; `format`: d3's, of the values.
export function chart(title, options = {}) {
  const plot = h("div", { class: options.tall ? "chart tall" : "chart", role: "img", "aria-label": title });
  const table = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${title}, as a table` });
  const details = h("details", {}, h("summary", {}, "As a table"), table);
  const legend = h("ul", { class: "legend" });
  const box = h("section", { class: "card" }, h("h2", {}, title), plot, legend, details);
  box.draw = (series, summary) => {
    plot.setAttribute("aria-label", `${title}. ${summary}`);
    const redraw = () => render(plot, series, options);
    drawn.set(plot, redraw);
    fill(legend, series.length > 1 ? series.map((one, place) => h("li", {}, swatch(place), one.name)) : null);
    if (details.open) fill(table, asTable(title, series, options));
    details.ontoggle = () => fill(table, details.open ? asTable(title, series, options) : null);
    return redraw();
  };
  return box;
}

async function render(plot, series, options) {
  const Plotly = await plotly();
  const lines = series.map((one, place) => ({
    type: one.bars ? "bar" : "scatter",
    mode: one.y.length > 1 ? "lines" : "markers",
    name: plain(one.name),
    x: one.x, y: one.y, text: one.text,
    connectgaps: true,
    hovertemplate: `${one.text ? "%{text}<br>" : ""}<b>%{y:${options.format ?? ",.4~g"}}</b>${series.length > 1 ? ` ${plain(one.name)}` : ""}<extra></extra>`,
    line: { color: colour(`c${(place % 10) + 1}`), width: 2, dash: dash(place)[0], shape: options.steps ? "hv" : "linear" },
    marker: { color: one.bars ? one.y.map((value) => colour(value < 0 ? "bad" : "c2")) : colour(`c${(place % 10) + 1}`), size: 7 },
  }));
  const axis = { color: colour("quiet"), gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"), fixedrange: true, automargin: true };
  await Plotly.react(plot, lines, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("quiet") },
    margin: { l: 8, r: 12, t: 8, b: 8 },
    xaxis: { ...axis, showgrid: false, tickangle: 0, nticks: plot.clientWidth < 480 ? 4 : 7, ...(options.x ? { title: { text: options.x, standoff: 6, font: { size: 13 } } } : {}) },
    yaxis: { ...axis, ...(options.y ? { title: { text: options.y, standoff: 8, font: { size: 13 } } } : {}), rangemode: options.fromZero ? "tozero" : "normal", nticks: 6, tickformat: options.ticks ?? "" },
    showlegend: false,
    hovermode: series.length > 1 ? "closest" : "x",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") } },
    dragmode: false,
    bargap: 0.25,
  }, { displayModeBar: false, responsive: true });
  plot.firstElementChild?.setAttribute("aria-hidden", "true");
}

// About 24 rows: the first, the last, and some between.
function asTable(title, series, options) {
  const longest = series.reduce((a, b) => (b.x.length > a.x.length ? b : a), series[0] ?? { x: [], y: [] });
  const step = Math.max(1, Math.ceil(longest.x.length / 24));
  const at = longest.x.map((_, n) => n).filter((n) => (longest.x.length - 1 - n) % step === 0);
  const value = (one, x) => one.y[one.x.indexOf(x)];
  const cell = (number) => (number === undefined || number === null ? "–" : new Intl.NumberFormat("en", { maximumSignificantDigits: 5 }).format(number));
  return h("table", { class: "plain" }, h("caption", {}, step > 1 ? `${title}: one in ${step} points` : title),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, options.x || "Time"), series.map((one) => h("th", { scope: "col", class: "num" }, one.name)))),
    h("tbody", {}, at.map((n) => h("tr", {}, h("th", { scope: "row" }, longest.x[n] instanceof Date ? longest.x[n].toLocaleString("en") : String(longest.x[n])),
      series.map((one) => h("td", { class: "num" }, cell(value(one, longest.x[n]))))))));
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((redraw) => redraw()));
