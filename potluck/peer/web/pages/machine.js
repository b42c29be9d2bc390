// This machine: what it does now and why, pause and finish, limits, credit, traffic.
import { h, fill, bytes, chip, head, percent, short, span, tile, whole } from "./dom.js";
import { get, post } from "./net.js";
import { limitRows } from "./limits.js";

const RULES = {
  you: "Paused by you", schedule: "Waiting for its hours", battery: "On battery", idle_minutes: "Somebody uses this machine", programs: "A program has priority",
  shared_gpu: "Another program uses the GPU", load: "The machine is busy", temperature: "Too hot", upload_month: "This month's traffic is used up",
  download_month: "This month's traffic is used up", fullscreen: "A program fills the screen", gpu_power: "The GPU draws too much power",
};
const STATES = { working: ["works", "good", "●"], starting: ["starts", "", "…"], finishing: ["completes its round", "good", "●"], paused: ["paused", "warn", "‖"], waiting: ["waits", "warn", "…"], stopped: ["stopped", "bad", "■"] };

export async function show(page) {
  page.title("My machine");
  const state = h("section", { class: "card", "aria-live": "polite" }), tiles = h("dl", { class: "tiles" }), runs = h("section", { class: "card" });
  const limits = h("section", { class: "card" }), said = h("p", { class: "quiet small", role: "status" }), wrong = h("div", { role: "alert" });
  page.main.append(head("My machine", null), wrong, state, tiles, runs, limits);
  let shown = "", caps = null, credits = new Map();

  const act = (what, body = {}) => async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    fill(wrong);
    try { draw(await post(`/machine/${what}`, body)); } catch (error) { fill(wrong, h("p", { class: "notice" }, error.message)); }
    button.disabled = false;
  };

  const draw = (now) => {
    const text = JSON.stringify({ ...now, runs: now.runs.map((run) => ({ ...run, now: run.now && { ...run.now, now: 0 } })) });
    drawTiles(now);
    drawRuns(now);
    if (text === shown) return; // keeps the focus where it is
    shown = text;
    const paused = now.rule === "you", stopped = now.runs.some((run) => run.state === "stopped"), active = now.runs.some((run) => ["working", "starting"].includes(run.state));
    fill(state, h("div", { class: "state" }, h("div", { class: "what" },
      h("h2", {}, now.works ? (now.runs.length ? (active ? "Working" : "Ready") : "Ready: no run joined yet") : (RULES[now.rule] ?? `Paused by ${now.rule}`)),
      h("p", {}, now.works ? doing(now) : [now.rule === "you" ? "The whole machine is yours. Resume goes on with the runs below." : `${sentence(now.reason)}`, now.until ? ` Until ${new Date(now.until).toLocaleString("en", { weekday: "short", hour: "2-digit", minute: "2-digit" })}.` : ""]),
      now.limits_error ? h("p", { class: "notice" }, `${now.limits_error}; the limits before it are in force.`) : null),
    h("div", { class: "row" },
      paused || stopped ? h("button", { type: "button", class: "main", onclick: act("resume") }, "Resume") : null,
      paused ? null : h("button", { type: "button", class: paused || stopped ? "" : "main", onclick: act("pause") }, "Pause"),
      now.works && active ? h("button", { type: "button", onclick: act("finish") }, "Finish this round") : null)));
  };

  const drawTiles = (now) => {
    const cap = caps?.get("upload_month") ?? null, most = caps?.get("download_month") ?? null;
    const rounds = now.runs.reduce((sum, run) => sum + run.contributed_rounds, 0);
    const known = [...credits.values()].filter((credit) => credit !== null);
    fill(tiles, tile("Sent this month", bytes(now.sent_this_month), cap ? `${percent(now.sent_this_month / cap)} of ${bytes(cap)}` : "no monthly limit"),
      tile("Received this month", bytes(now.received_this_month), most ? `${percent(now.received_this_month / most)} of ${bytes(most)}` : "no monthly limit"),
      tile("Rounds contributed", whole(rounds), "since the daemon started"),
      tile("Credit", known.length ? short(known.reduce((a, b) => a + b, 0)) : "–", known.length ? "by the validators' ledgers" : "no ledger is at hand"));
  };

  const drawRuns = (now) => {
    if (!now.runs.length) return fill(runs, h("h2", {}, "Runs"), h("p", { class: "quiet" }, "Join one in a terminal: ", h("code", {}, "potluck join INVITE")));
    if (runs.contains(document.activeElement)) return null; // somebody is on a link of it: the next look draws it
    const items = now.runs.map((run) => {
      const [text, kind, sign] = STATES[run.state] ?? [run.state, "", ""];
      const credit = credits.get(run.run) ?? null;
      const facts = [run.round === null ? null : `round ${whole(run.round)}`, `${whole(run.contributed_rounds)} contributed`, run.restarts ? `${run.restarts} restarts` : null, credit === null ? null : `${short(credit)} credit`];
      return h("li", { class: "run" }, h("div", { class: "row" }, h("h3", {}, run.run ? h("a", { href: `/runs/${run.run}` }, named(run)) : "a run that it joins"),
        chip(run.phase && run.state === "working" ? run.phase : text, kind, sign)), h("p", { class: "quiet small" }, facts.filter(Boolean).join(" · ")), waits(run) ? h("p", { class: "small" }, waits(run)) : null);
    });
    return fill(runs, h("h2", {}, "Runs"), h("ul", { class: "lines" }, items));
  };

  const earn = async (now) => {
    for (const { run } of now.runs) {
      if (!run || !now.peer) continue;
      try { credits.set(run, (await get(`/runs/${run}/contributors?limit=1&peer=${now.peer}`)).rows.find((row) => row.place)?.account_credit ?? null); } catch { credits.set(run, null); }
    }
  };

  const drawLimits = async () => {
    const list = (await get("/machine/limits")).limits;
    caps = new Map(list.map((one) => [one.name, one.value]));
    const save = async (name, value) => {
      const answer = await post("/machine/limits", { [name]: value });
      caps = new Map(answer.limits.map((one) => [one.name, one.value]));
      said.textContent = "Saved. The daemon follows within a second; CPU threads, GPU memory and priority from a worker's next start on.";
      return caps.get(name);
    };
    fill(limits, h("h2", {}, "Limits"), said, limitRows(list, save));
  };

  const first = await get("/machine");
  await Promise.all([drawLimits(), earn(first)]);
  draw(first);
  page.live(true);
  let ticks = 0;
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const now = await get("/machine");
      page.live(true);
      if (++ticks % 30 === 0) await earn(now);
      draw(now);
    } catch { page.live(false); }
  }, 1000);
}

const sentence = (text) => (text ? `${text[0].toUpperCase()}${text.slice(1)}.` : "");

function doing(now) {
  if (!now.runs.length) return "Join a run in a terminal, and this machine takes part in it.";
  const alone = now.runs.find((run) => run.now?.alone);
  if (alone) return `It trains alone for ${alone.now.rounds_alone} rounds: no other peer was seen.`;
  const busy = now.runs.filter((run) => run.state === "working");
  const what = busy.length ? `${sentence(`${busy[0].phase || "working"}: ${busy.map(named).join(", ")}`)} ` : "";
  return `${what}Nothing in the limits speaks against it.`;
}

const named = (run) => run.name ?? (run.run ? run.run.slice(0, 8) : "a run that it joins");

function waits(run) {
  if (run.state === "waiting" || run.state === "stopped") return run.reason;
  const wait = run.now?.waits.at(-1);
  if (!wait) return "";
  return `Waits for ${wait.what}, at most ${span(wait.until - run.now.now)} more; then ${wait.then}.`;
}
