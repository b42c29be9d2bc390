"""`potluck ledger`: what is printed and written, exit codes, and errors that name the fix."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from sample_entries import round_entry

from potluck.cli.main import main
from potluck.dht.manifest import RunId
from potluck.incentives.entries import AnyEntry, CreditEntry, LinkEntry, ScoreEntry, Standing
from potluck.incentives.ledger import Ledger, verify_file
from potluck.net.identity import Identity, peer_id_of
from potluck.net.links import End, Link, make_end, make_link, make_offer
from potluck.peer.home import Home

RUN = RunId("b" * 52)
ANNA, BORIS = (peer_id_of(bytes([n]) * 32) for n in (1, 2))
VERBS = ["show", "peer", "explain", "verify", "prove", "export"]


def potluck(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["potluck", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def entries(validator: str, number: int, **changes: float) -> list[AnyEntry]:
    return [
        round_entry(number, validator, run=RUN),
        ScoreEntry(module="model", round=number, peer=ANNA, came=True, standing=Standing(usefulness=1.0), score=1.0),
        ScoreEntry(module="model", round=number, peer=BORIS, refused="no commit", standing=Standing(missed=1)),
        CreditEntry(module="model", round=number, opinions={}, incentive={}, paid={ANNA: changes.get("paid", 2.5)}),
    ]


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity.create(tmp_path / "identity.key")


def written(path: Path, identity: Identity, rounds: int, **changes: float) -> Path:
    with Ledger.open(path, RUN, identity) as ledger:
        for number in range(rounds):
            ledger.append(entries(identity.peer_id, number, **changes), 1_700_000_000 + number)
    return path


@pytest.fixture
def file(tmp_path: Path, identity: Identity) -> Path:
    return written(tmp_path / "ledger.sqlite", identity, 3)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert potluck("ledger", verb, "--help") == 0
    assert capsys.readouterr().out.count(f"potluck ledger {verb}") >= 2


def test_show_lists_everyone_with_the_whole_id(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert potluck("ledger", "show", file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("12 entries, root ") and lines[2].endswith("2023-11-14 22:13:22+00:00")
    assert lines[4].split() == [ANNA, "7.5", "100.0%", "3", "0", "0", "1", "open"]
    assert lines[5].split() == [BORIS, "0", "0.0%", "0", "0", "3", "0", "open"]
    assert potluck("ledger", "show", file, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["size"] == 12 and [row["credit"] for row in shown["peers"]] == [7.5, 0.0]


def test_peer_takes_a_prefix_and_prints_each_round(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert potluck("ledger", "peer", ANNA[8:16], "--ledger", file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"peer {ANNA}: credit 7.5, 100.0% of all" and len(lines) == 5
    assert lines[2].split()[:3] == ["0", "contributed", "model"] and lines[2].endswith("2.5")
    assert potluck("ledger", "peer", BORIS, "--ledger", file, "--json") == 0
    rounds = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["round"], one["outcome"], one["peer"]) for one in rounds] == [(n, "missed", BORIS) for n in range(3)]


def test_explain_says_why(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert potluck("ledger", "explain", BORIS, "--ledger", file, "--rounds", 2) == 0
    text = capsys.readouterr().out
    assert "missed: 0-2" in text and "no commit" in text and "the last 2 of 3 rounds" in text
    assert potluck("ledger", "explain", ANNA, "--ledger", file, "--json") == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["credit"] == [[0, 2.5], [1, 5.0], [2, 7.5]] and explained["lines"]


def test_export_writes_what_verify_accepts_and_plots(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {option: tmp_path / f"out.{option}" for option in ("csv", "json", "ledger", "png")}
    options = [
        "--csv",
        outputs["csv"],
        "--json",
        outputs["json"],
        "--file",
        outputs["ledger"],
        "--plot",
        outputs["png"],
    ]
    assert potluck("ledger", "export", file, *options) == 0
    assert len(list(csv.DictReader(outputs["csv"].open()))) == 12
    assert len(json.loads(outputs["json"].read_text())["entries"]) == 12
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    assert verify_file(outputs["ledger"]) == verify_file(file)
    capsys.readouterr()
    assert potluck("ledger", "verify", outputs["ledger"], "--against", file) == 0
    text = capsys.readouterr().out
    assert "verified: 12 entries, 3 heads" in text and "one history" in text
    assert potluck("ledger", "show", outputs["ledger"]) == 0


@pytest.mark.parametrize("which", [["7"], ["--peer", ANNA, "--round", "1"]])
def test_a_proof_is_verified_without_the_ledger(
    which: list[str], file: Path, tmp_path: Path, identity: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "proof.json"
    assert potluck("ledger", "prove", *which, "--ledger", file, "-o", proof) == 0
    file.unlink()
    capsys.readouterr()
    assert potluck("ledger", "verify", proof, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["validator"] == identity.peer_id and shown["size"] == 12
    assert shown["entry"]["kind"] == ("credit" if which == ["7"] else "score") and shown["entry"]["round"] == 1
    proof.write_text(proof.read_text().replace('"index": ', '"index": 1'))
    assert potluck("ledger", "verify", proof) == 10


def test_a_proof_goes_to_stdout_without_a_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert potluck("ledger", "prove", 0, "--ledger", file) == 0
    assert json.loads(capsys.readouterr().out)["index"] == 0


def test_a_changed_ledger_is_exit_code_10_and_names_the_validator(
    file: Path, tmp_path: Path, identity: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.ledger"
    assert potluck("ledger", "export", file, "--file", out) == 0
    content = bytearray(out.read_bytes())
    content[-3] ^= 1
    out.write_bytes(content)
    for verb in (["verify", out], ["show", out], ["peer", ANNA, "--ledger", out], ["export", out, "--csv", "x.csv"]):
        assert potluck("ledger", *verb) == 10
        error = capsys.readouterr().err
        assert str(out) in error and identity.peer_id in error and "entry 11 is not" in error
    assert potluck("ledger", "verify", out, "--json") == 10
    assert json.loads(capsys.readouterr().out)["exit_code"] == 10


def test_two_histories_are_exit_code_10_with_both_heads(
    file: Path, tmp_path: Path, identity: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    other = written(tmp_path / "other.sqlite", identity, 2, paid=99.0)
    assert potluck("ledger", "verify", file, "--against", other) == 10
    error = capsys.readouterr().err
    assert f"{identity.peer_id} shows two histories" in error and "differ from entry 3 on" in error
    with Ledger.read(file) as a, Ledger.read(other) as b:
        evidence = [head.signature.hex() for head in (a.head_at(4), b.head_at(4)) if head]
    assert len(evidence) == 2 and all(signature in error for signature in evidence)


def test_the_default_is_the_ledger_of_this_homes_run(
    tmp_path: Path, identity: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    assert potluck("ledger", "show", "--home", home) == 2
    assert "no run yet" in capsys.readouterr().err
    folder = Home(home).run(RUN)
    folder.path.mkdir(parents=True)
    folder.manifest_path.touch()
    assert potluck("ledger", "show", "--home", home) == 2
    assert "only validators keep one" in capsys.readouterr().err
    written(folder.ledger, identity, 1)
    for verb in (["show"], ["verify"], ["peer", ANNA], ["explain", ANNA], ["prove", 0], ["verify", "--run", "bbb"]):
        assert potluck("ledger", *verb, "--home", home) == 0
    assert sorted(path.name for path in folder.path.iterdir()) == ["ledger.sqlite", "manifest.bin"]


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["show", "nowhere.ledger"], "nowhere.ledger"),
        (["peer", "nobody", "--ledger", "FILE"], "potluck ledger show"),
        (["peer", "12D3KooW", "--ledger", "FILE"], "more characters"),
        (["prove", "--ledger", "FILE"], "either INDEX"),
        (["prove", "1", "--peer", ANNA, "--round", "1", "--ledger", "FILE"], "either INDEX"),
        (["prove", "1", "--round", "1", "--ledger", "FILE"], "either INDEX"),
        (["prove", "--peer", ANNA, "--ledger", "FILE"], "--round"),
        (["prove", "--peer", ANNA, "--round", "9", "--ledger", "FILE"], "--round 9"),
        (["prove", "99", "--ledger", "FILE"], "12 entries"),
        (["prove", "1", "--ledger", "FILE", "-o", "/nowhere/proof.json"], "cannot write"),
        (["export", "FILE"], "--csv"),
        (["export", "FILE", "--csv", "FILE"], "choose another name"),
        (["export", "FILE", "--file", "FILE"], "choose another name"),
        (["export", "FILE", "--plot", "credit.txt"], ".png"),
    ],
)
def test_mistakes_are_exit_code_2_and_name_the_fix(
    arguments: list[str], fix: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file.read_bytes()
    assert potluck("ledger", *(str(file) if word == "FILE" else word for word in arguments)) == 2
    assert fix in capsys.readouterr().err
    assert file.read_bytes() == before


def test_without_matplotlib_the_extra_is_named_and_nothing_is_left(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    before = sorted(tmp_path.iterdir())
    assert potluck("ledger", "export", file, "--plot", tmp_path / "credit.png") == 2
    assert "potluck[plot]" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_credit_is_summed_by_account_with_the_machines_below_it(
    tmp_path: Path, identity: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    laptop, desktop = Identity.create(tmp_path / "laptop"), Identity.create(tmp_path / "desktop")
    account = Identity.create(tmp_path / "account")  # which earns nothing itself

    def paid(number: int, **to: float) -> AnyEntry:
        peers = {"laptop": laptop.peer_id, "desktop": desktop.peer_id, "anna": ANNA}
        amounts = {peers[name]: amount for name, amount in to.items()}
        return CreditEntry(module="model", round=number, opinions={}, incentive={}, paid=amounts)

    def linked(link: Link | End) -> AnyEntry:
        return LinkEntry(module="model", round=1, link=link)

    links = [make_link(make_offer(account, one.peer_id, 5), one) for one in (laptop, desktop)]
    path = tmp_path / "shared.sqlite"
    with Ledger.open(path, RUN, identity) as ledger:
        ledger.append([*entries(identity.peer_id, 0), paid(0, laptop=3.0, desktop=1.0)], 1_700_000_000)
        ledger.append([*map(linked, links), paid(1, laptop=2.0, desktop=1.0)], 1_700_000_001)
        ledger.append([linked(make_end(account, laptop.peer_id, 6)), paid(2, laptop=8.0)], 1_700_000_002)
    verify_file(path)

    assert potluck("ledger", "show", path) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = lines[lines.index(["account", "credit"]) + 1 :]
    assert table == [
        [account.peer_id, "7"],
        [laptop.peer_id, "5", "until", "it", "was", "revoked"],
        [desktop.peer_id, "2"],
    ]
    assert potluck("ledger", "show", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    by_account = {one["account"]: one["machines"] for one in shown["accounts"]}
    assert by_account[laptop.peer_id] == [{"peer": laptop.peer_id, "credit": 8.0, "linked": True}]
    assert [one["linked"] for one in by_account[account.peer_id]] == [False, True]
    assert {row["peer"]: row["credit"] for row in shown["peers"]}[laptop.peer_id] == 13.0  # each key by itself

    assert potluck("ledger", "peer", desktop.peer_id, "--ledger", path) == 0
    assert f"which counts for {account.peer_id}" in capsys.readouterr().out
    assert potluck("ledger", "explain", desktop.peer_id, "--ledger", path) == 0
    assert f"account   what it earns counts for {account.peer_id}" in capsys.readouterr().out
    assert potluck("ledger", "explain", laptop.peer_id, "--ledger", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["account"] == laptop.peer_id
    assert potluck("ledger", "export", path, "--csv", tmp_path / "out.csv") == 0
    rows = [row for row in csv.DictReader((tmp_path / "out.csv").open()) if row["account"]]
    assert [(row["kind"], row["peer"]) for row in rows] == [
        ("link", laptop.peer_id),
        ("link", desktop.peer_id),
        ("end", laptop.peer_id),
    ]
