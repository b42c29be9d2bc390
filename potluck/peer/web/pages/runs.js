// Where there are several runs, or none yet.
import { h, ago, chip, empty, fixed, head, short, whole } from "./dom.js";

export function show(page) {
  page.title("Runs");
  const { runs } = page.list;
  page.main.append(head("Runs"));
  if (!runs.length) {
    page.main.append(empty("No run yet", h("span", {}, "Join one with ", h("code", {}, "potluck join INVITE"), "; it appears here.")));
    return;
  }
  page.main.append(h("section", { class: "card" }, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs" },
    h("table", {}, h("thead", {}, h("tr", {}, ["Run", "", "Round", "Loss", "Tokens/s", "Peers"].map((text, n) => h("th", { scope: "col", class: n > 1 ? "num" : null }, text || h("span", { class: "hidden" }, "State"))))),
      h("tbody", {}, runs.map((run) => h("tr", {},
        h("th", { scope: "row" }, h("a", { href: `/runs/${run.run}` }, run.name), h("div", { class: "quiet small mono" }, run.run.slice(0, 8))),
        h("td", {}, run.peers ? chip("training", "good", "●") : chip(run.heard_at ? `silent, heard ${ago(run.heard_at)}` : "not heard yet", "", "○")),
        h("td", { class: "num" }, whole(run.round)), h("td", { class: "num" }, fixed(run.loss, 3)),
        h("td", { class: "num" }, short(run.tokens_per_second)), h("td", { class: "num" }, whole(run.peers)))))))));
}
