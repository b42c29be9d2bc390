// A run: how it goes, who is at which part of the model, and how to join.
import { h, fill, ago, badge, chip, empty, fixed, head, percent, peerName, short, span, tile, whole } from "./dom.js";
import { chart } from "./charts.js";
import { Refusal, follow, get } from "./net.js";

export async function show(page, run) {
  const curve = await get(`/runs/${run}/curve`);
  const top = h("div"), tiles = h("dl", { class: "tiles" }), map = h("section", { class: "card" }), join = h("div");
  const loss = chart("Loss", { tall: true, format: ".4f" });
  const speed = chart("Tokens per second", { fromZero: true, ticks: "~s", format: ",.0f" });
  const peers = chart("Peers", { fromZero: true, ticks: ",d", format: ",d", steps: true });
  const waiting = empty("Nothing was heard of this run yet", "Its first round appears here as soon as a peer tells of one.");
  page.main.append(top, tiles, waiting, loss, h("div", { class: "grid2" }, speed, peers), map, join);
  let draw = Promise.resolve(), asking = null, drawnRound = null;

  const plot = () => {
    const x = curve.at.map((at) => new Date(1000 * at)), text = curve.round.map((round) => `round ${round}`);
    const over = `${curve.round.length} points, from round ${curve.round[0]} to ${curve.round.at(-1)}`;
    const known = curve.loss.filter((value) => value !== null);
    loss.draw([{ name: "Loss", x, y: curve.loss, text }], known.length ? `From ${fixed(known[0], 3)} to ${fixed(known.at(-1), 3)} nats per token; ${over}` : over);
    // What was told of the newest round is not whole yet.
    const end = x.length > 1 ? -1 : undefined;
    speed.draw([{ name: "Tokens per second", x: x.slice(0, end), y: curve.tokens_per_second.slice(0, end), text }], `Lately ${short(curve.tokens_per_second.at(-2))}; ${over}`);
    return peers.draw([{ name: "Peers", x: x.slice(0, end), y: curve.peers.slice(0, end), text }], `Lately ${curve.peers.at(-2) ?? "none"}; ${over}`);
  };

  const absorb = async (state) => {
    const { latest } = state, last = curve.round.at(-1) ?? -1;
    if (latest.round.length && last < latest.round[0] && curve.round.length) asking ??= get(`/runs/${run}/curve`).then((all) => { Object.assign(curve, all); }).finally(() => { asking = null; });
    await asking;
    for (const [n, round] of latest.round.entries()) {
      const at = curve.round.lastIndexOf(round);
      if (at < 0 && (round < (curve.round.at(-1) ?? -1) || (curve.every > 1 && round % curve.every))) continue;
      for (const column of ["round", "at", "loss", "tokens_per_second", "peers"]) curve[column][at < 0 ? curve.round.length - (column === "round" ? 0 : 1) : at] = latest[column][n];
    }
  };

  const update = async (state) => {
    page.title(state.name);
    fill(top, head(state.name, status(state), `${state.family} · ${state.modules.length === 1 ? "one module" : `${state.modules.length} stages`} · rounds of ${span(state.round_seconds)} · run ${run.slice(0, 8)}`));
    fill(tiles, tile("Loss", fixed(state.loss, 4), "nats per token"), tile("Tokens per second", short(state.tokens_per_second), "all peers together"),
      tile("Peers", whole(state.peers), roles(state.roles)), tile("Round", whole(state.round), state.heard_at ? `heard ${ago(state.heard_at)}` : ""));
    fill(map, ...pipeline(state, page.me));
    if (!join.firstChild && state.invite) join.append(invitation(state.invite));
    await absorb(state);
    const some = curve.round.length > 0;
    waiting.hidden = some;
    for (const one of [loss, speed, peers]) one.hidden = !some;
    if (some && drawnRound !== `${curve.round.length} ${curve.round.at(-1)} ${curve.loss.at(-1)} ${curve.peers.at(-1)}`) {
      drawnRound = `${curve.round.length} ${curve.round.at(-1)} ${curve.loss.at(-1)} ${curve.peers.at(-1)}`;
      await plot();
    }
  };

  // What failed once (a fetch, mostly) is tried again with the next state; until then the line is not up.
  const enqueue = (state) => {
    draw = draw.then(() => update(state)).catch((error) => {
      page.live(false);
      if (!(error instanceof Refusal || error instanceof TypeError)) reportError(error);
    });
  };
  await update(await get(`/runs/${run}`));
  follow(run, enqueue, page.live);
}

function status(state) {
  if (!state.peers) return chip(state.heard_at ? `silent: heard ${ago(state.heard_at)}` : "not heard yet", "warn", "○");
  if (state.unserved.length) return chip(`nobody serves ${state.unserved.join(", ")}`, "bad", "!");
  return chip("training", "good", "●");
}

const roles = (counts) => Object.entries(counts).map(([role, count]) => `${count} ${role}${count === 1 ? "" : "s"}`).join(", ");

function pipeline(state, me) {
  const single = state.modules.length === 1;
  return [h("h2", {}, single ? "Who trains" : "Pipeline: who serves which stage"),
    h("ul", { class: "map" }, state.modules.map((module) => h("li", { class: module.replicas ? null : "none" },
      h("h3", {}, module.module),
      h("div", { class: "line" }, h("span", {}, module.replicas ? `${module.replicas} replica${module.replicas === 1 ? "" : "s"}` : "nobody serves it"),
        module.replicas ? h("span", {}, single ? `${short(module.tokens_per_second)} tokens/s` : `load ${percent(module.load)}`) : null),
      h("ul", { class: "seats" }, module.shown.map((one) => h("li", {}, seat(state.run, one, me, single)))),
      module.replicas > module.shown.length ? h("p", { class: "quiet small" }, `and ${module.replicas - module.shown.length} more`) : null))),
    single ? null : h("p", { class: "quiet small note" }, "A square is a replica, the bar beside it shows how busy it is. Point at one, or open it, for its numbers.")];
}

function seat(run, one, me, single) {
  const text = `${peerName(one.name, one.peer)}: ${one.phase || one.role}, ${single ? "" : `load ${percent(one.load)}, `}${short(one.tokens_per_second)} tokens/s`;
  return h("a", { class: one.peer === me ? "seat mine" : "seat", href: `/runs/${run}/peers/${one.peer}`, title: text, "aria-label": text },
    badge(one.peer, 24), single ? null : h("span", { class: "gauge" }, h("i", { style: { height: `${100 * Math.min(1, one.load)}%` } })));
}

function invitation(invite) {
  const command = `potluck join '${invite}'`;
  const copy = h("button", { type: "button", onclick: async () => { await navigator.clipboard.writeText(command); copy.textContent = "Copied"; } }, "Copy");
  return h("section", { class: "card" }, h("h2", {}, "Join this run"), h("div", { class: "invite" }, h("pre", { tabindex: "0", "aria-label": "Command to join" }, command), navigator.clipboard ? copy : null));
}
