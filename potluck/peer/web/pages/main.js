// Which page this is, and what all pages share: the head, and the words when something is not there.
import { h, fill, empty } from "./dom.js";
import { Refusal, get } from "./net.js";

const ID = "[a-z2-7]{52}";
const PAGES = [
  [new RegExp("^/$"), "./runs.js"],
  [new RegExp(`^/runs/(${ID})/?$`), "./run.js"],
  [new RegExp(`^/runs/(${ID})/contributors/?$`), "./contributors.js"],
  [new RegExp(`^/runs/(${ID})/peers/(\\w+)/?$`), "./peer.js"],
  [new RegExp("^/machine/?$"), "./machine.js"],
  [new RegExp("^/api/?$"), "./reference.js"],
];

function navigation(list, run) {
  const here = location.pathname.replace(/\/$/, "") || "/";
  const links = [];
  if (list.runs.length !== 1) links.push(["/", "Runs"]);
  if (run) links.push([`/runs/${run}`, "Run"], [`/runs/${run}/contributors`, "Contributors"]);
  if (run && list.me) links.push([`/runs/${run}/peers/${list.me}`, "My peer"]);
  if (list.machine) links.push(["/machine", "My machine"]);
  fill(document.getElementById("nav"), links.map(([href, text]) => h("a", { href, "aria-current": href === here ? "page" : null }, text)));
}

const main = document.getElementById("main");
const line = document.getElementById("live");

const page = {
  main,
  title: (...parts) => { document.title = [...parts, "Potluck"].join(" · "); },
  live: (up) => {
    line.textContent = up ? "live" : "reconnecting…";
    line.classList.toggle("on", up);
  },
};

try {
  const [pattern, module] = PAGES.find(([one]) => one.test(location.pathname)) ?? [null, null];
  if (!module) throw new Refusal(404, "there is no such page");
  const words = location.pathname.match(pattern).slice(1);
  const [list, { show }] = await Promise.all([get("/runs"), import(module)]);
  navigation(list, words[0] ?? (list.runs.length === 1 ? list.runs[0].run : null));
  fill(main);
  await show({ ...page, list, me: list.me }, ...words);
} catch (error) {
  fill(main, h("h1", { class: "hidden" }, "Nothing here"), empty("This cannot be shown", error.message));
  if (!("status" in error)) throw error;
}
