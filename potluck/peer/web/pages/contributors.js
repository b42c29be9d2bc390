// Who earned what, by a validator's ledger; and who else takes part.
import { h, fill, ago, chip, clock, empty, fixed, head, peerEnd, peerLink, percent, share, short, whole } from "./dom.js";
import { chart } from "./charts.js";
import { follow, get, seldom } from "./net.js";

const PAGE = 50;

export async function show(page, run) {
  page.title("Contributors");
  const top = h("div"), notes = h("div"), credit = chart("Credit over time", { tall: true, x: "Round", steps: true, ticks: "~s" });
  const board = h("section", { class: "card" });
  let offset = 0, validator = "";
  page.main.append(top, notes, credit, board);

  const update = async () => {
    const told = await get(`/runs/${run}/contributors?limit=${PAGE}&offset=${offset}${validator ? `&validator=${validator}` : ""}`);
    const { ledger } = told;
    const choose = h("select", { id: "ledger", onchange: () => { validator = choose.value; offset = 0; update(); } },
      told.ledgers.map((one) => h("option", { value: one.validator, selected: one.validator === ledger?.validator }, `${peerEnd(one.validator)} (${whole(one.size)} entries)`)));
    fill(top, head("Contributors", ledger ? chip("ledger verified", "good", "✓") : chip("no ledger at hand", "warn", "○"),
      ledger ? `By the ledger of validator ${peerEnd(ledger.validator)}: ${whole(ledger.size)} entries, signed ${clock(ledger.made_at)}, root ${ledger.root.slice(0, 16)}…` : "Without a validator's ledger only what peers say of themselves is shown: nobody has been paid here."),
      told.ledgers.length > 1 ? h("div", { class: "row" }, h("label", { for: "ledger" }, "Ledger of"), choose) : null);
    fill(notes, told.problems.map((text) => h("p", { class: "notice" }, text)));
    credit.hidden = !told.curves.length;
    if (told.curves.length) {
      const best = told.curves[0];
      credit.draw(told.curves.map((one) => ({ name: one.name ? `${one.name.slice(0, 20)} ${peerEnd(one.peer)}` : peerEnd(one.peer), x: one.round, y: one.credit, text: one.round.map((round) => `round ${round}`) })),
        `The ${told.curves.length} with the most; ${best.name || peerEnd(best.peer)} leads with ${short(best.credit.at(-1))}`);
    }
    fill(board, h("h2", {}, "Leaderboard"), told.total ? table(run, told, page.me) : h("p", { class: "quiet" }, "Nobody yet."), pages(told));
  };
  const pages = (told) => (told.total <= PAGE ? null : h("div", { class: "row" },
    h("button", { type: "button", disabled: offset === 0, onclick: () => { offset = Math.max(0, offset - PAGE); update(); } }, "Before"),
    h("span", { class: "quiet" }, `${offset + 1} to ${Math.min(told.total, offset + PAGE)} of ${told.total}`),
    h("button", { type: "button", disabled: offset + PAGE >= told.total, onclick: () => { offset += PAGE; update(); } }, "Next")));

  await update();
  follow(run, seldom(update, 15), page.live);
}

function table(run, told, me) {
  const paid = told.ledger !== null, most = Math.max(1e-9, ...told.rows.map((row) => row.share));
  const columns = [["", "num"], ["Peer", ""], ...(paid ? [["Credit", "num"], ["Share", "wide-only"]] : []), ["Rounds", "num"],
    ...(paid ? [["Refused", "num wide-only"], ["Missed", "num wide-only"], ["Score", "num wide-only"]] : []), ["Uptime", "num wide-only"], ["Heard", "num wide-only"]];
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Leaderboard" },
    h("table", {}, h("thead", {}, h("tr", {}, columns.map(([text, kind]) => h("th", { scope: "col", class: kind || null }, text || h("span", { class: "hidden" }, "Place"))))),
      h("tbody", {}, told.rows.map((row) => h("tr", { class: row.peer === me ? "mine" : null },
        h("td", { class: "num quiet" }, row.place ?? "–"), h("th", { scope: "row" }, peerLink(run, row.peer, row.name, row.peer === me), row.account ? h("div", { class: "quiet small" }, `for account ${peerEnd(row.account)}`) : null),
        paid ? [h("td", { class: "num" }, short(row.credit)), h("td", { class: "wide-only" }, share(row.share / most), percent(row.share, 1))] : null,
        h("td", { class: "num" }, whole(row.contributed)),
        paid ? [h("td", { class: "num wide-only" }, whole(row.refused)), h("td", { class: "num wide-only" }, missed(row)), h("td", { class: "num wide-only" }, fixed(row.score, 3))] : null,
        h("td", { class: "num wide-only" }, percent(row.uptime)),
        h("td", { class: "num wide-only" }, row.here ? [h("span", { class: "dot", "aria-hidden": "true" }), "now"] : ago(row.last)))))),
    paid ? null : h("p", { class: "quiet small" }, "Rounds: as each peer says, since it started."));
}

const missed = (row) => (row.network ? h("span", { title: `and ${row.network} by the network's fault, which cost no score` }, `${whole(row.missed)} + ${row.network}`) : whole(row.missed));
