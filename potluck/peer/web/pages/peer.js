// One peer: what it did each round, its score and the reason, and the proof that the ledger says so.
import { h, fill, ago, badge, chip, clock, empty, fixed, peerEnd, peerName, percent, short, signed, span, tile, whole } from "./dom.js";
import { chart } from "./charts.js";
import { follow, get, seldom } from "./net.js";

const OUTCOMES = { contributed: ["contributed", "good", "✓"], refused: ["refused", "bad", "✕"], missed: ["missed", "warn", "–"], network: ["network's fault", "", "~"] };

export async function show(page, run, peer) {
  const body = h("div", { class: "grid2" }), top = h("div"), tiles = h("dl", { class: "tiles" });
  const effect = chart("What its contributions did to the loss", { x: "Round", y: "drop, 0.001 nats per token", format: "+.3~f" });
  const speed = chart("Tokens per second, as it says", { fromZero: true, ticks: "~s", format: ",.0f" });
  const why = h("section", { class: "card" }), rounds = h("section", { class: "card" }), notes = h("div");
  body.append(effect, speed);
  page.main.append(top, notes, tiles, why, body, rounds);

  const update = async () => {
    const told = await get(`/runs/${run}/peers/${peer}`);
    const { heard, standing, ledger, scored, said } = told;
    const name = heard?.name || standing?.name || "";
    page.title(peerName(name, peer));
    fill(top, h("div", { class: "head" }, badge(peer, 44), h("h1", {}, peerName(name, peer)), peer === page.me ? chip("you", "good") : null,
      heard ? chip(heard.here ? heard.phase || "here" : `last heard ${ago(heard.last)}`, heard.here ? "good" : "warn", heard.here ? "●" : "○") : chip("never heard here", "", "○"),
      h("p", { class: "about mono" }, peer),
      heard ? h("p", { class: "about" }, [heard.role, heard.module, heard.version && `potluck ${heard.version}`, `first heard ${clock(heard.first)}`].filter(Boolean).join(" · ")) : null));
    fill(notes, told.problems.map((text) => h("p", { class: "notice" }, text)));
    fill(tiles,
      standing ? [tile("Credit", short(standing.credit), standing.account ? `counts for account ${peerEnd(standing.account)}, ${short(standing.account_credit)} in all` : `${percent(standing.share, 1)} of all, place ${standing.place}`), tile("Score", fixed(standing.score, 3), `computation: ${standing.verdict}`),
        tile("Rounds that counted", whole(standing.contributed), `${standing.refused} refused, ${standing.missed} missed`)]
        : tile("Rounds, as it says", whole(heard?.contributed), "since it started"),
      heard ? [tile("Uptime", percent(heard.uptime), `of the last ${span(Date.now() / 1000 - heard.first)}`), tile("Tokens per second", short(heard.tokens_per_second), "as it says")] : null);
    why.hidden = !told.why.length;
    fill(why, h("h2", {}, "Why this score and this credit"), h("ul", { class: "lines small" }, told.why.map((line) => h("li", { class: "why" }, line))));
    const drops = scored.filter((one) => one.outcome === "contributed" || one.outcome === "refused").reverse();
    effect.hidden = !drops.length;
    if (drops.length) effect.draw([{ name: "Drop of the loss, 0.001 nats per token", x: drops.map((one) => one.round), y: drops.map((one) => 1000 * one.alignment), text: drops.map((one) => `round ${one.round}, ${one.outcome}`), bars: true }],
      `${drops.filter((one) => one.alignment > 0).length} of ${drops.length} contributions lowered the loss`);
    speed.hidden = !said.round.length;
    if (said.round.length) speed.draw([{ name: "Tokens per second", x: said.at.map((at) => new Date(1000 * at)), y: said.tokens_per_second, text: said.round.map((round) => `round ${round}`) }], `${said.round.length} rounds, lately ${short(said.tokens_per_second.at(-1))}`);
    fill(rounds, h("h2", {}, "Round by round"), scored.length ? [verdict(scored, ledger), table(scored), scored.length > 25 ? h("p", { class: "quiet small" }, "Older rounds: ", h("code", {}, `potluck ledger peer ${peer.slice(-8)}`), ".") : null] : h("p", { class: "quiet" }, ledger ? "This validator has not scored it." : "No validator's ledger is at hand: there are no scores to show."));
  };
  await update();
  follow(run, seldom(update, 15), page.live);
}

function verdict(scored, ledger) {
  const proven = scored.filter((one) => one.proof), broken = proven.filter((one) => !one.proof.holds);
  if (broken.length) return h("p", { class: "notice" }, `${broken.length} scores do not follow from the ledger: ${broken[0].proof.problem}`);
  return h("div", {}, h("p", { class: "small" }, chip(`${proven.length} proofs checked`, "good", "✓"), ` The latest scores were checked here, one by one, against the root that validator ${peerEnd(ledger.validator)} signed.`),
    h("details", {}, h("summary", {}, "Which root"), h("ul", { class: "lines small mono" }, h("li", {}, `validator ${ledger.validator}`), h("li", {}, `${ledger.size} entries, signed ${new Date(1000 * ledger.made_at).toISOString()}`), h("li", {}, `root ${ledger.root}`))));
}

function table(scored) {
  const columns = [["Round", ""], ["What came", ""], ["Drop of the loss", "num"], ["Score", "num"], ["Paid", "num"], ["Proof", ""]];
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Round by round" }, h("table", {},
    h("thead", {}, h("tr", {}, columns.map(([text, kind]) => h("th", { scope: "col", class: kind || null }, text)))),
    h("tbody", {}, scored.filter((one, n) => one.proof || n < 25).slice(0, 25).map((one) => {
      const [text, kind, sign] = OUTCOMES[one.outcome] ?? ["not scored", "", "○"];
      return h("tr", {}, h("th", { scope: "row" }, one.round),
        h("td", {}, chip(text, kind, sign), one.module === "stage.0" ? null : h("span", { class: "quiet small" }, ` ${one.module}`), one.reason ? h("div", { class: "quiet small" }, one.reason) : null, factors(one)),
        h("td", { class: "num" }, one.outcome === "contributed" || one.outcome === "refused" ? signed(one.alignment) : "–"), h("td", { class: "num" }, one.outcome ? fixed(one.score, 3) : "–"), h("td", { class: "num" }, one.paid ? fixed(one.paid, 1) : "–"),
        h("td", {}, proof(one)));
    }))));
}

const factors = (one) => {
  const names = Object.entries(one.factors);
  return names.length ? h("div", { class: "quiet small" }, `score × ${names.map(([name, value]) => `${fixed(value, 2)} (${name})`).join(" × ")}`) : null;
};

function proof(one) {
  if (!one.proof) return h("span", { class: "quiet" }, "–");
  if (!one.proof.holds) return chip("does not hold", "bad", "✕");
  return h("details", { style: { margin: "0" } }, h("summary", {}, `✓ entry ${one.proof.entry}`), h("div", { class: "small quiet" }, one.words),
    h("ol", { class: "small mono" }, one.proof.path.map((hash) => h("li", {}, `${hash.slice(0, 24)}…`))));
}
