"""What a ledger says, for people: who earned how much, one peer's rounds, and why its score is what it is. Pure, except
for the files that are written at the end.

Everything is read in one pass over the entries, in the order in which they were written: a round, its scores, and later
the credit for it. Alignments and deltas are drops of the loss in nats per token: what is positive helped.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, BinaryIO, Final, Literal

import msgspec

from potluck.errors import UserError
from potluck.incentives.entries import AnyEntry, CreditEntry, LinkEntry, RoundEntry, ScoreEntry, Standing
from potluck.incentives.ledger import Head
from potluck.net.links import End

#: What became of a peer's round. "network": missed, and laid to the network, because too many were missing at once.
Outcome = Literal["contributed", "refused", "missed", "network"]

VERDICTS: Final = {1: "trained", 0: "open", -1: "not trained"}
#: Curves that can be told apart in one plot.
CURVES: Final = 10
#: All peer ids begin like this: a prefix may leave it out.
_COMMON: Final = "12D3KooW"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One peer in the leaderboard. `share`: of all credit that was paid."""

    peer: str
    credit: float
    share: float
    contributed: int
    refused: int
    missed: int
    network: int
    #: The latest, of all modules.
    score: float
    verdict: str


class PeerRound(msgspec.Struct, frozen=True, kw_only=True):
    """One peer in one round of a module. What is None was not written down, or not looked at."""

    round: int
    module: str
    outcome: Outcome | None = None
    reason: str = ""
    tokens: int = 0
    weight: float = 0.0
    alignment: float = 0.0
    #: How far the round's path credit is from the loss drop, as a part of it.
    error: float | None = None
    random_delta: float | None = None
    own_delta: float | None = None
    #: How well it fits its own samples, `among` so many contributions: 1 is best.
    place: int | None = None
    among: int = 0
    standing: Standing | None = None
    factors: Mapping[str, float] = {}
    score: float = 0.0
    share: float = 0.0
    paid: float = 0.0


def leaderboard(entries: Iterable[AnyEntry]) -> list[Row]:
    """Everyone who was scored or paid, the most credit first."""
    paid: defaultdict[str, float] = defaultdict(float)
    outcomes: defaultdict[str, Counter[Outcome]] = defaultdict(Counter)
    latest: dict[str, ScoreEntry] = {}
    faults: set[tuple[str, int]] = set()
    for entry in entries:
        match entry:
            case RoundEntry():
                if entry.network_fault:
                    faults.add((entry.module, entry.round))
            case ScoreEntry():
                latest[entry.peer] = entry
                outcomes[entry.peer][_outcome(entry, (entry.module, entry.round) in faults)] += 1
            case CreditEntry():
                for peer, credit in entry.paid.items():
                    paid[peer] += credit
    total = sum(paid.values())
    rows = []
    for peer in latest.keys() | paid.keys():
        last, counts = latest.get(peer), outcomes[peer]
        rows.append(
            Row(
                peer=peer,
                credit=paid[peer],
                share=paid[peer] / total if total > 0 else 0.0,
                contributed=counts["contributed"],
                refused=counts["refused"],
                missed=counts["missed"],
                network=counts["network"],
                score=last.score if last else 0.0,
                verdict=VERDICTS[last.standing.verdict if last else 0],
            )
        )
    return sorted(rows, key=lambda row: (-row.credit, -row.score, row.peer))


class ValidatorRow(msgspec.Struct, frozen=True, kw_only=True):
    """A validator as the ledger's own one saw it: what it earned, and how often it had evaluated when checked."""

    peer: str
    earned: float
    passed: int
    failed: int


def validators(entries: Iterable[AnyEntry]) -> list[ValidatorRow]:
    """Every validator whose weights were read, or that earned something, the most earned first."""
    earned: defaultdict[str, float] = defaultdict(float)
    checks: Counter[tuple[str, bool]] = Counter()
    for entry in entries:
        if isinstance(entry, CreditEntry):
            for peer in entry.opinions.keys() | entry.earned.keys():
                earned[peer] += entry.earned.get(peer, 0.0)
            if entry.claim is not None:
                checks[entry.claim.validator, entry.claim.passed] += 1
    rows = [
        ValidatorRow(peer=peer, earned=amount, passed=checks[peer, True], failed=checks[peer, False])
        for peer, amount in earned.items()
    ]
    return sorted(rows, key=lambda row: (-row.earned, row.peer))


def history(entries: Iterable[AnyEntry], peer: str) -> list[PeerRound]:
    """All that was written about one peer, the oldest round first."""
    rounds: dict[tuple[int, str], RoundEntry] = {}
    scores: dict[tuple[int, str], ScoreEntry] = {}
    paid: defaultdict[tuple[int, str], float] = defaultdict(float)
    for entry in entries:
        key = entry.round, entry.module
        match entry:
            case RoundEntry():
                rounds[key] = entry
            case ScoreEntry() if entry.peer == peer:
                scores[key] = entry
            case CreditEntry() if peer in entry.paid:
                paid[key] += entry.paid[peer]
    found = []
    for key in sorted(scores.keys() | paid.keys()):
        fields: dict[str, Any] = {"round": key[0], "module": key[1], "paid": paid[key]}
        if score := scores.get(key):
            same = PeerRound.__struct_fields__
            fields |= {name: getattr(score, name) for name in ScoreEntry.__struct_fields__ if name in same}
            fields["outcome"] = _outcome(score, key in rounds and rounds[key].network_fault)
            fields["reason"] = score.refused
            fields["error"] = rounds[key].error if key in rounds else None
        found.append(PeerRound(**fields))
    return found


def credit_over_time(entries: Iterable[AnyEntry], peers: Collection[str]) -> dict[str, list[tuple[int, float]]]:
    """Peer -> (round, all that was paid to it up to that round), for the rounds that were paid."""
    paid: dict[str, defaultdict[int, float]] = {peer: defaultdict(float) for peer in peers}
    for entry in entries:
        if isinstance(entry, CreditEntry):
            for peer in entry.paid.keys() & paid.keys():
                paid[peer][entry.round] += entry.paid[peer]
    curves = {}
    for peer, by_round in paid.items():
        rounds = sorted(by_round)
        curves[peer] = list(zip(rounds, accumulate(by_round[one] for one in rounds), strict=True))
    return curves


def find_peer(rows: Sequence[Row], prefix: str) -> Row:
    """The peer whose id begins with `prefix`, with or without the beginning that all have, or ends with it. Raises
    UserError."""
    found = [row for row in rows if row.peer.removeprefix(_COMMON).startswith(prefix.removeprefix(_COMMON))]
    found = found or [row for row in rows if row.peer.endswith(prefix)]  # as pages show it
    if not prefix or not found:
        raise UserError(f"PEER {prefix!r}: no such peer in this ledger; `potluck ledger show` lists them")
    if len(found) > 1 and prefix not in (row.peer for row in found):
        raise UserError(f"PEER {prefix!r} fits {len(found)} peers: give more characters of the peer id")
    return next((row for row in found if row.peer == prefix), found[0])


def find_score(entries: Iterable[AnyEntry], peer: str, round_: int) -> int:
    """The number of the entry that scores `peer` in a round. Raises UserError if there is none, or one per module."""
    found = {
        number: entry.module
        for number, entry in enumerate(entries)
        if isinstance(entry, ScoreEntry) and (entry.peer, entry.round) == (peer, round_)
    }
    if not found:
        raise UserError(f"--round {round_}: no score of {peer} in it; see `potluck ledger peer {peer}`")
    if len(found) > 1:
        which = ", ".join(f"{number} ({module})" for number, module in found.items())
        raise UserError(f"--round {round_}: {len(found)} scores of {peer}: give one of these as INDEX: {which}")
    return next(iter(found))


def explain(row: Row, place: int, rounds: Sequence[PeerRound], last: int, account: str | None = None) -> list[str]:
    """Why a peer's score and credit are what they are, in lines: the sum, then the `last` rounds one by one. `account`:
    what its credit counts for, if that is not its own key."""
    lines = [
        f"peer      {row.peer}",
        f"credit    {row.credit:.6g}, {row.share:.1%} of all that was paid: place {place}",
        *([] if account in (None, row.peer) else [f"account   what it earns counts for {account}"]),
        f"rounds    {row.contributed} contributed, {row.refused} refused, {row.missed} missed; {row.network} missed by "
        "the network's fault, which costs no score",
    ]
    for outcome, what in (("missed", "missed"), ("network", "missed by the network's fault"), ("refused", "refused")):
        if numbers := sorted({one.round for one in rounds if one.outcome == outcome}):
            lines.append(f"          {what}: {_ranges(numbers)}")
    latest = {one.module: one for one in rounds if one.standing is not None}
    for module, one in sorted(latest.items()):
        assert one.standing is not None
        lines += _score_lines(module, one, one.standing)
    paid = [one for one in rounds if one.paid > 0]
    if paid:
        totals = list(accumulate(one.paid for one in paid))
        steps = sorted({(len(paid) - 1) * part // 6 for part in range(7)})
        lines.append("over time " + ", ".join(f"{totals[k]:.4g} up to round {paid[k].round}" for k in steps))
    if last and rounds:
        shown = rounds[-last:]
        lines.append(f"the last {len(shown)} of {len(rounds)} rounds:")
        lines += [round_line(one) for one in shown]
    return lines


def round_line(one: PeerRound) -> str:
    """One round of a peer, with each number that its score follows from."""
    parts = [f"round {one.round:>5}  {one.module}  {'not scored' if one.outcome is None else one.outcome}"]
    if one.outcome == "network":
        parts.append("laid to the network, costs no score")
    elif one.reason:
        parts.append(_clean(one.reason))
    if one.outcome in ("contributed", "refused"):
        error = "" if one.error is None else f" (sum within {one.error:.1%})"
        parts.append(f"weight {one.weight:.4f}  alignment {one.alignment:+.3e}{error}")
    deltas = [("random", one.random_delta), ("its own", one.own_delta)]
    parts += [f"exact drop on {what} data {delta:+.3e}" for what, delta in deltas if delta is not None]
    if one.place is not None:
        parts.append(f"fits its own samples as number {one.place} of {one.among}")
    if one.standing is not None:
        factors = "".join(f" x{factor:.3g} {_clean(name)}" for name, factor in one.factors.items())
        parts.append(
            f"score {one.score:.4g} (usefulness {one.standing.usefulness:.4g}{factors})  share {one.share:.2%}"
        )
    if one.paid:
        parts.append(f"paid {one.paid:.4g}")
    return "  ".join(parts)


def _score_lines(module: str, one: PeerRound, standing: Standing) -> list[str]:
    lines = [
        f"verdict   {VERDICTS[standing.verdict]}; log-likelihood ratio since then {standing.evidence:+.2f}",
        f"rating    mu {standing.mu:.3g}, sigma {standing.sigma:.3g}: {standing.mu - 3 * standing.sigma:.3g}, which is "
        "not in the score",
        f"score     {one.score:.4g} in {module} after round {one.round}, {one.share:.2%} of this validator's weights: "
        f"usefulness {standing.usefulness:.4g}",
    ]
    for name, factor in one.factors.items():
        lines.append(f"          x {factor:.4g} {_clean(name)}{_because(name, standing)}")
    return lines


def _because(factor: str, standing: Standing) -> str:
    """What a factor below 1 is for (`score.py`)."""
    match factor, standing.verdict:
        case "computation", 0:
            return ": whether it trains on the samples that it was given is not decided yet"
        case "computation", 1:
            return ": it was found to train, but its last contributions speak against that"
        case "computation", _:
            return ": it was found not to train on the samples that it was given"
        case "sync", _:
            return f": it began {standing.unsynced} rounds in a row with other parameters than the run's"
        case "harmful", _:
            return f": {sum(standing.harmed)} of its last {len(standing.harmed)} contributions made the loss worse"
        case "away", _:
            return f": it missed {standing.missed} rounds in a row"
    return ""


def _outcome(entry: ScoreEntry, network_fault: bool) -> Outcome:
    if entry.came:
        return "refused" if entry.refused else "contributed"
    return "network" if network_fault else "missed"


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _clean(text: str) -> str:
    """A stranger's text, safe on a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


# ---- files --------------------------------------------------------------------------------------------------

#: One row for a round, for a peer's score, for each peer and each validator that a credit entry pays, and for a peer's
#: link to an account, or the end of one.
COLUMNS: Final = (
    *("entry", "kind", "module", "round", "peer", "loss_before", "loss_after", "usual", "network_fault", "refused"),
    *("came", "blob", "size", "tokens", "steps", "weight", "alignment", "random_delta", "own_delta", "place", "among"),
    *("mu", "sigma", "usefulness", "evidence", "verdict", "missed", "factors", "score", "share", "incentive", "paid"),
    *("account", "earned"),
)


def write_csv(entries: Iterable[AnyEntry], file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for number, entry in enumerate(entries):
        for row in _csv_rows(entry):
            writer.writerow({"entry": number, "module": entry.module, "round": entry.round, **row})
    text.detach()


def _csv_rows(entry: AnyEntry) -> Iterator[dict[str, Any]]:
    match entry:
        case RoundEntry():
            yield {"kind": "round", **msgspec.structs.asdict(entry)}
        case ScoreEntry():
            factors = " ".join(f"{name}={factor!r}" for name, factor in entry.factors.items())
            standing = msgspec.structs.asdict(entry.standing)
            yield {"kind": "score", **standing, **msgspec.structs.asdict(entry), "factors": factors}
        case CreditEntry():
            for peer, paid in entry.paid.items():
                yield {"kind": "credit", "peer": peer, "paid": paid, "incentive": entry.incentive.get(peer, 0.0)}
            for validator, earned in entry.earned.items():
                yield {"kind": "credit", "peer": validator, "earned": earned}
        case LinkEntry():
            kind = "end" if isinstance(entry.link, End) else "link"
            yield {"kind": kind, "peer": entry.link.peer, "account": entry.link.account}


def write_json(head: Head, entries: Iterable[AnyEntry], file: BinaryIO) -> None:
    """One object: the latest head, and all entries in their order."""
    file.write(b'{"head":' + msgspec.json.encode(head) + b',"entries":[')
    for number, entry in enumerate(entries):
        file.write((b"\n" if number == 0 else b",\n") + msgspec.json.encode(entry))
    file.write(b"\n]}\n")


def write_plot(curves: Mapping[str, Sequence[tuple[int, float]]], file: BinaryIO, kind: str) -> None:
    """Credit over time; `kind`: png, svg or pdf. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'potluck[plot]'") from None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for peer, curve in curves.items():
        axes.step(
            [round_ for round_, _ in curve], [credit for _, credit in curve], where="post", label=f"..{peer[-8:]}"
        )
    axes.set(title="credit over time", xlabel="round", ylabel="credit")
    if curves:
        axes.legend()
    figure.savefig(file, format=kind)
