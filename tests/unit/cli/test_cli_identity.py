"""`potluck identity`: a key that is lost with its machine comes back, and none is ever lost to a mistake."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from potluck.cli.main import main
from potluck.dht.manifest import RunId
from potluck.net.identity import Identity
from potluck.net.identity_backup import Backup, Cost, read_backup, write_backup
from potluck.net.recovery_phrase import to_phrase
from potluck.peer.home import Home

PASSPHRASE = "correct horse battery staple"


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POTLUCK_PASSPHRASE", raising=False)
    monkeypatch.delenv("POTLUCK_HOME", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """With a key."""
    home = Home(tmp_path / "home").open()
    home.identity()
    return home


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{PASSPHRASE}\n")
    return path


@pytest.fixture
def backup(tmp_path: Path, home: Home) -> Path:
    """Of the home's key, cheap to open."""
    write_backup(tmp_path / "backup", Backup.seal(home.identity().seed, PASSPHRASE, Cost(log2_n=10)))
    return tmp_path / "backup"


def process(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A real one, with no terminal."""
    command = [sys.executable, "-m", "potluck", "identity", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def potluck(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["potluck", "identity", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], code: int, kind: str, says: str, *arguments: object) -> None:
    """One clear line, the right exit code, and the same for machines."""
    assert potluck(*arguments, "--json") == code
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert (error["kind"], error["exit_code"]) == (kind, code), error
    assert says in error["error"] and err == f"error: {error['error']}\n"


def last(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("verb", ["show", "backup", "restore", "delegate", "accept", "revoke", "rotate"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert potluck(verb, "--help") == 0
    text = capsys.readouterr().out
    assert f"Example:  potluck identity {verb}" in text and "--json" in text


def test_a_key_comes_back_from_its_file_in_another_home(tmp_path: Path, secret: Path) -> None:
    """With nobody at a terminal: the passphrase once from a file, once from the environment."""
    lost, new, file = tmp_path / "lost", tmp_path / "new", tmp_path / "potluck.backup"
    peer = last(process("show", "--home", lost, "--json"))["peer"]
    made = last(process("backup", file, "--home", lost, "--passphrase-file", secret, "--json"))
    assert made == {"peer": peer, "file": str(file)} and mode(file) == 0o600
    key = (lost / "identity.key").read_bytes()
    assert key[4:36] not in file.read_bytes()
    restored = last(process("restore", file, "--home", new, "--json", POTLUCK_PASSPHRASE=PASSPHRASE))
    assert restored == {"peer": peer, "key": str(new / "identity.key"), "new": True}
    assert (new / "identity.key").read_bytes() == key
    assert mode(new / "identity.key") == 0o600 and mode(new) == 0o700 and os.listdir(new) == ["identity.key"]


def test_a_key_comes_back_from_its_words(tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    shown = process("backup", "--phrase", "--yes", "--home", home.path)
    assert shown.returncode == 0 and len(shown.stdout.split()) == 48 and "is you" in shown.stderr
    again = process("restore", "--phrase", "--home", tmp_path / "new", stdin=shown.stdout)
    assert again.returncode == 0, again.stderr
    assert Home(tmp_path / "new").identity().seed == home.identity().seed
    words = tmp_path / "words"
    assert potluck("backup", "--phrase", "--yes", "--json", "--home", home.path) == 0
    words.write_text(json.loads(capsys.readouterr().out)["phrase"])
    assert potluck("restore", "--phrase-file", words, "--home", tmp_path / "newer") == 0
    assert Home(tmp_path / "newer").identity().peer_id in capsys.readouterr().out


def test_words_are_not_shown_to_a_pipe_unless_asked_for(home: Home) -> None:
    done = process("backup", "--phrase", "--home", home.path)
    assert done.returncode == 2 and "--yes" in done.stderr and done.stdout == ""
    assert Home(home.path).backups(home.identity().peer_id).phrase_at is None


def test_an_existing_file_is_overwritten_only_by_force(
    tmp_path: Path, home: Home, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "precious"
    file.write_text("photos")
    command = ("backup", file, "--home", home.path, "--passphrase-file", secret)
    refused(capsys, 2, "UserError", "--force", *command)
    assert file.read_text() == "photos"
    assert potluck(*command, "--force") == 0
    assert read_backup(file).open(PASSPHRASE) == home.identity().seed and mode(file) == 0o600
    assert f"potluck identity restore {file.name}" in capsys.readouterr().out


def test_the_key_itself_is_never_overwritten(
    tmp_path: Path, home: Home, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = home.key_path.read_bytes()
    (tmp_path / "link").symlink_to(home.key_path)
    for file in (home.key_path, tmp_path / "link"):
        refused(
            capsys, 2, "UserError", "is the key itself",
            "backup", file, "--force", "--home", home.path, "--passphrase-file", secret,
        )  # fmt: skip
    assert home.key_path.read_bytes() == key


def test_a_home_without_a_key_has_nothing_to_back_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 3, "IdentityError", "no key file", "backup", tmp_path / "b", "--home", tmp_path / "none")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "is empty"), ("\n", "is empty"), ("short\n", "5 characters"), ("one two three\nfour\n", "several lines"),
     ("x" * 5000, "4096 bytes")],
)  # fmt: skip
def test_a_useless_passphrase_writes_nothing(
    text: str, says: str, tmp_path: Path, home: Home, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret.write_text(text)
    refused(capsys, 2, "UserError", says, "backup", tmp_path / "b", "--home", home.path, "--passphrase-file", secret)
    assert not (tmp_path / "b").exists()


def test_a_passphrase_that_cannot_be_had_names_the_ways_to_give_it(
    tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("backup", tmp_path / "b", "--home", home.path)
    refused(capsys, 2, "UserError", "--passphrase-file, or set POTLUCK_PASSPHRASE", *command)
    refused(capsys, 2, "UserError", "cannot read", *command, "--passphrase-file", tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes("Käsefondue".encode("latin-1"))
    refused(capsys, 2, "UserError", "not UTF-8", *command, "--passphrase-file", tmp_path / "latin")


def test_where_it_goes_and_where_it_comes_from_are_said_once(
    tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), (tmp_path / "b", "--phrase")):
        refused(capsys, 2, "UserError", "either FILE, or --phrase", "backup", *options, "--home", home.path)
        refused(capsys, 2, "UserError", "either FILE, or --phrase", "restore", *options, "--home", home.path)


def test_a_wrong_passphrase_restores_nothing(
    tmp_path: Path, backup: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret.write_text("correct horse battery stable\n")
    new = tmp_path / "new"
    refused(
        capsys, 3, "WrongPassphrase", "does not open", "restore", backup, "--home", new, "--passphrase-file", secret
    )
    assert not new.exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [("flipped", "damaged"), ("truncated", "cut short"), ("empty", "cut short: 0"), ("oversized", "more than"),
     ("foreign", "not a backup"), ("key", "copied back"), ("hostile", "MiB of memory")],
)  # fmt: skip
def test_a_file_that_is_no_whole_backup_restores_nothing(
    damage: str, says: str, tmp_path: Path, home: Home, backup: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(backup.read_bytes())
    if damage == "flipped":
        content[100] ^= 1
    elif damage == "hostile":
        monster = Backup.seal(home.identity().seed, PASSPHRASE, Cost(log2_n=10))
        monster.__dict__["cost"] = Cost(20, 32, 1)  # behind the back of its check
        content = bytearray(monster.encode())
    others = {"truncated": content[:-1], "empty": b"", "oversized": content + b"x", "foreign": b"MZ" + bytes(158),
              "key": home.key_path.read_bytes()}  # fmt: skip
    backup.write_bytes(others.get(damage, content))
    refused(capsys, 3, "BackupError", says, "restore", backup, "--home", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_misspelled_word_is_named(tmp_path: Path) -> None:
    words = to_phrase(bytes(32))
    assert words[4] == "abandon"
    words[4] = "abandn"
    done = process("restore", "--phrase", "--home", tmp_path / "new", stdin=" ".join(words))
    assert done.returncode == 3 and "word 5, 'abandn' (perhaps abandon" in done.stderr
    assert not (tmp_path / "new").exists()


def test_another_key_is_never_replaced_and_the_same_is_fine(
    tmp_path: Path, home: Home, backup: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Home(tmp_path / "other").open()
    key = other.identity()
    command = ("restore", backup, "--passphrase-file", secret, "--home")
    refused(capsys, 3, "IdentityError", f"holds another key ({key.peer_id})", *command, other.path)
    assert Identity.load(other.key_path).peer_id == key.peer_id
    assert potluck(*command, home.path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["new"] is False
    assert potluck(*command, home.path) == 0
    assert "the same key already" in capsys.readouterr().out


def test_a_damaged_key_is_not_replaced_either(
    home: Home, backup: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.key_path.write_bytes(b"damaged")
    command = ("restore", backup, "--passphrase-file", secret, "--home", home.path)
    refused(capsys, 3, "IdentityError", "move it away", *command)
    home.key_path.rename(home.path / "damaged.key")
    assert potluck(*command) == 0


@pytest.mark.parametrize("lock", ["runs/x/lock", "daemon.lock"])
def test_nothing_is_restored_under_a_running_peer(
    lock: str, home: Home, backup: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    home.key_path.unlink()
    path = home.path / lock
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ("restore", backup, "--home", home.path, "--passphrase-file", secret)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(capsys, 2, "UserError", f"a peer is running in {home.path}", *command)
        assert not home.key_path.exists()
    assert potluck(*command) == 0


def test_a_run_is_locked_as_restoring_takes_it(home: Home, capsys: pytest.CaptureFixture[str], backup: Path) -> None:
    with home.run(RunId("b" * 52)).locked():
        refused(capsys, 2, "UserError", "is running", "restore", backup, "--home", home.path)


def test_show_tells_where_the_key_is_and_what_was_backed_up(
    tmp_path: Path, home: Home, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> dict[str, Any]:
        assert potluck("show", "--home", home.path, "--json") == 0
        return dict(json.loads(capsys.readouterr().out))

    peer = home.identity().peer_id
    none = {"file": None, "file_at": None, "phrase_at": None}
    alone = {"account": peer, "machines": {}, "linked": {}, "rotation_unfinished": False}
    assert shown() == {"peer": peer, "key": str(home.key_path), "backups": none, **alone}
    assert potluck("show", "--home", home.path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == peer and str(home.key_path) in lines[1] and "none was made from here" in lines[2]

    file = tmp_path / "potluck.backup"
    assert potluck("backup", file, "--home", home.path, "--passphrase-file", secret) == 0
    assert potluck("backup", "--phrase", "--yes", "--home", home.path) == 0
    capsys.readouterr()
    told = shown()["backups"]
    assert told["file"] == str(file) and 0 <= told["phrase_at"] - told["file_at"] < 60
    assert potluck("show", "--home", home.path) == 0
    assert f"backup   {file}, made 20" in (text := capsys.readouterr().out) and "recovery phrase, shown 20" in text

    home.key_path.unlink()  # what was made of another key is not said of this one
    assert shown()["backups"] == none
    (home.path / "backups.json").write_text("{")
    assert shown()["backups"] == none


def test_a_home_that_cannot_be_written_is_backed_up_all_the_same(
    tmp_path: Path, home: Home, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.path / "backups.json").mkdir()  # in the way of the note, also where the tests are root
    assert potluck("backup", tmp_path / "b", "--home", home.path, "--passphrase-file", secret) == 0
    assert "will not know of this backup" in capsys.readouterr().err
    assert read_backup(tmp_path / "b").open(PASSPHRASE) == home.identity().seed


def at_terminal(dialogue: list[tuple[str, str]], *arguments: object) -> tuple[int, str]:
    """Runs a command at a terminal of its own, and answers each prompt as it appears. Returns code and screen."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "potluck", "identity", *map(str, arguments)]
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    screen = ""
    try:
        for prompt, answer in [*dialogue, ("\0", "")]:  # the last comes never: until all is said
            seen = len(screen)
            while prompt not in screen[seen:] and (piece := read(master)):
                screen += piece
            if piece:
                os.write(master, f"{answer}\n".encode())
        return child.wait(timeout=60), screen
    finally:
        child.kill()
        child.wait()
        os.close(master)


def read(master: int) -> str:
    """Empty once the command has ended."""
    try:
        return os.read(master, 4096).decode()
    except OSError:
        return ""


def test_at_a_terminal_a_passphrase_is_asked_twice_and_not_shown(tmp_path: Path, home: Home) -> None:
    asked = [("Passphrase: ", PASSPHRASE), ("The same again: ", PASSPHRASE)]
    code, screen = at_terminal(asked, "backup", tmp_path / "b", "--home", home.path)
    assert code == 0 and PASSPHRASE not in screen
    code, screen = at_terminal([("Passphrase: ", PASSPHRASE)], "restore", tmp_path / "b", "--home", tmp_path / "new")
    assert code == 0 and f"restored {home.identity().peer_id}" in screen and PASSPHRASE not in screen
    slip = [asked[0], ("The same again: ", PASSPHRASE.upper())]
    code, screen = at_terminal(slip, "backup", tmp_path / "c", "--home", home.path)
    assert code == 2 and "differ" in screen and not (tmp_path / "c").exists()


def test_at_a_terminal_words_are_shown_and_typed_on_several_lines(tmp_path: Path, home: Home) -> None:
    code, screen = at_terminal([], "backup", "--phrase", "--home", home.path)
    words = to_phrase(home.identity().seed)
    assert code == 0 and "is you" in screen and all(word in screen for word in words)
    lines = " ".join(words[:12]) + "\n" + " ".join(words[12:])
    code, screen = at_terminal([("The 24 words", lines)], "restore", "--phrase", "--home", tmp_path / "new")
    assert code == 0 and Home(tmp_path / "new").identity().peer_id == home.identity().peer_id


# ---- one account on several machines ------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert potluck(*arguments, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert potluck(*arguments) == 0
    return capsys.readouterr().out


def test_a_machine_is_taken_in_with_one_line_and_a_lost_one_is_let_go(
    tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    laptop, account = tmp_path / "laptop", home.identity().peer_id
    peer = told(capsys, "show", "--home", laptop)["peer"]
    line = said(capsys, "delegate", peer, "--home", home.path)
    assert line.startswith("potluck-offer:") and line.count("\n") == 1
    assert f"machine  {peer}, taken in 20" in said(capsys, "show", "--home", home.path)
    assert f"account {account}" in said(capsys, "accept", line, "--home", laptop)
    again = told(capsys, "accept", line, "--home", laptop)
    assert (again["new"], again["counts_for"], again["ends"]) == (False, account, False)
    assert f"account  {account}, which its credit counts for" in said(capsys, "show", "--home", laptop)

    ended = said(capsys, "revoke", peer, "--home", home.path)
    assert ended.startswith("potluck-end:") and told(capsys, "show", "--home", home.path)["machines"] == {}
    assert "no more" in said(capsys, "accept", ended, "--home", laptop)
    assert told(capsys, "show", "--home", laptop)["account"] == peer


def test_a_line_that_is_not_for_this_machine_changes_nothing(
    tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    other = told(capsys, "show", "--home", tmp_path / "other")["peer"]
    line = said(capsys, "delegate", other, "--home", home.path).strip()
    new = ("--home", tmp_path / "new")
    refused(capsys, 3, "IdentityError", f"this offer is for {other}", "accept", line, *new)
    refused(capsys, 3, "IdentityError", "cut short", "accept", line[:-20], *new)
    refused(capsys, 3, "IdentityError", "no line of", "accept", other, *new)
    refused(capsys, 3, "IdentityError", "not a peer id", "delegate", "laptop", *new)
    refused(capsys, 3, "IdentityError", "no key file", "revoke", other, "--home", tmp_path / "none")
    assert not (tmp_path / "new" / "links.json").exists()
    capsys.readouterr()
    assert potluck("revoke", told(capsys, "show", *new)["peer"], "--home", home.path) == 0
    assert "never took it in" in capsys.readouterr().err


def test_a_key_is_rotated_once_the_new_one_is_backed_up(
    tmp_path: Path, home: Home, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, file = home.identity(), tmp_path / "new.backup"
    laptop = tmp_path / "laptop"
    peer = told(capsys, "show", "--home", laptop)["peer"]
    said(capsys, "accept", said(capsys, "delegate", peer, "--home", home.path), "--home", laptop)

    command = ("rotate", "--home", home.path)
    refused(capsys, 2, "UserError", "either FILE", *command)
    refused(capsys, 2, "UserError", "either FILE", *command, file, "--no-backup")
    file.write_text("photos")
    refused(capsys, 2, "UserError", "--force", *command, file, "--passphrase-file", secret)
    refused(capsys, 3, "IdentityError", f"counts for account {old.peer_id}", "rotate", "--no-backup", "--home", laptop)
    with home.run(RunId("b" * 52)).locked():
        refused(capsys, 2, "UserError", "is running", *command, "--no-backup")
    assert home.identity().seed == old.seed and not told(capsys, "show", "--home", home.path)["rotation_unfinished"]

    done = told(capsys, *command, file, "--force", "--passphrase-file", secret)
    new = home.identity()
    assert (done["peer"], done["before"]) == (new.peer_id, old.peer_id) and new.seed != old.seed
    assert read_backup(file).open(PASSPHRASE) == new.seed
    assert Identity.load(Path(done["retired"])).seed == old.seed
    shown = told(capsys, "show", "--home", home.path)
    assert shown["backups"]["file"] == str(file) and list(shown["linked"]) == [old.peer_id]
    assert list(shown["machines"]) == [peer]
    assert told(capsys, "accept", done["line"], "--home", laptop)["counts_for"] == new.peer_id
    refused(capsys, 3, "IdentityError", "had before", "revoke", old.peer_id, "--home", home.path)


def test_an_interrupted_rotation_is_said_and_finished_with_the_same_key(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = Identity.create(home.path / "identity.key.next")
    assert "`potluck identity rotate` again finishes it" in said(capsys, "show", "--home", home.path)
    text = said(capsys, "rotate", "--no-backup", "--home", home.path)
    assert text.startswith(begun.peer_id) and "backup   none" in text and "potluck-link:" in text
    assert home.identity().peer_id == begun.peer_id
