"""`potluck identity`: who this home is, how to stay it when the machine is lost, and to be it on several machines."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption
from potluck.errors import PotluckError, UserError

if TYPE_CHECKING:
    from potluck.peer.home import BackupNote, Home

PASSPHRASE_VARIABLE = "POTLUCK_PASSPHRASE"
#: Of a passphrase or a recovery phrase in a file.
MAX_FILE_BYTES = 4096

PassphraseFileOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", help=f"One line with the passphrase (default: ${PASSPHRASE_VARIABLE}, or you are asked)."
    ),
]


def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print this home's peer id, which is also its account in the ledger. The key is made if there is none.

    Below it: where the key lies, which backups of it were made from this home, for which account this machine earns
    credit if that is not its own, and which machines were taken in to earn for this one.

    Example:  potluck identity show --home ~/validator
    """
    from potluck.peer.home import Home, default_home
    from potluck.peer.links import LinkNotes, next_key_path

    where = Home(home or default_home()).open()
    peer = where.identity().peer_id
    note, links = where.backups(peer), LinkNotes.load(where)
    book = links.book
    machines = {one.peer: one.made_at for one in links.open_offers()}
    account, unfinished = book.account_of(peer), next_key_path(where).exists()
    linked = {one.peer: one.made_at for one in book.links() if book.account_of(one.peer) == peer}
    machines = {one: at for one, at in machines.items() if one not in linked}
    if as_json:
        backups = {"file": note.file, "file_at": note.file_at, "phrase_at": note.phrase_at}
        shown: dict[str, object] = {"peer": peer, "key": str(where.key_path), "backups": backups, "account": account}
        shown |= {"machines": machines, "linked": linked, "rotation_unfinished": unfinished}
        print(json.dumps(shown))
        return
    print(f"{peer}\nkey      {where.key_path}\nbackup   {_text(note)}")
    if account != peer:
        print(f"account  {account}, which its credit counts for")
    for name, at in machines.items():
        print(f"machine  {name}, taken in {_date(at)}; it counts once it has accepted")
    for name, at in linked.items():
        print(f"linked   {name}, {_date(at)}; its credit counts for this key")
    if unfinished:
        print("rotation was interrupted: `potluck identity rotate` again finishes it")


def backup(
    file: Annotated[Path | None, typer.Argument(help="Write the backup there.", metavar="FILE")] = None,
    phrase: Annotated[bool, typer.Option("--phrase", help="Instead: print 24 words to write on paper.")] = False,
    passphrase_file: PassphraseFileOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing FILE.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Print the words though stdout is not a terminal.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Back up this home's key: as a FILE that only your passphrase opens, or as 24 words.

    Keep the file on another machine, and the passphrase apart from it. Whoever reads the words is you.

    Example:  potluck identity backup /media/stick/potluck.backup

    Example:  potluck identity backup --phrase
    """
    from potluck.net.identity import Identity
    from potluck.net.identity_backup import Backup, write_backup
    from potluck.net.recovery_phrase import to_phrase
    from potluck.peer.home import Home, default_home

    if (file is None) != phrase:
        raise UserError("give either FILE, or --phrase")
    where = Home(home or default_home())
    identity = Identity.load(where.key_path)
    note = where.backups(identity.peer_id)
    if file is None:
        _check_shown(yes)
        print("Whoever reads these 24 words is you. Write them on paper, and keep no other copy.", file=sys.stderr)
        words = to_phrase(identity.seed)
        print(json.dumps({"peer": identity.peer_id, "phrase": " ".join(words)}) if as_json else _numbered(words))
        note.phrase_at = time.time()
    else:
        _check_free(file, where.key_path, force)
        write_backup(file, Backup.seal(identity.seed, _passphrase(passphrase_file, twice=True)), force)
        note.file, note.file_at = str(file.absolute()), time.time()
        if as_json:
            print(json.dumps({"peer": identity.peer_id, "file": note.file}))
        else:
            print(f"wrote {file}, the key of {identity.peer_id}; keep it on another machine. To try it:")
            print(f"  potluck identity restore {file.name} --home an-empty-folder")
    _remember(where, note)


def restore(
    file: Annotated[Path | None, typer.Argument(help="A backup of `potluck identity backup`.", metavar="FILE")] = None,
    phrase: Annotated[
        bool, typer.Option("--phrase", help="Instead: the 24 words, typed in or from standard input.")
    ] = False,
    phrase_file: Annotated[Path | None, typer.Option("--phrase-file", help="Instead: the 24 words in a file.")] = None,
    passphrase_file: PassphraseFileOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a key back into a home, from a backup FILE or the 24 words. Another key that is there is never replaced.

    Stop the peer that has this key elsewhere, if it still runs: in one run, the newer of two ends.

    Example:  potluck identity restore /media/stick/potluck.backup

    Example:  potluck identity restore --phrase --home ~/peer-2
    """
    from potluck.net.identity_backup import read_backup
    from potluck.net.recovery_phrase import from_phrase
    from potluck.peer.home import Home, default_home

    if [file is not None, phrase, phrase_file is not None].count(True) != 1:
        raise UserError("give either FILE, or --phrase, or --phrase-file")
    where = Home(home or default_home())
    where.check_idle()
    if file is not None:
        seed = read_backup(file).open(_passphrase(passphrase_file, twice=False))
    else:
        seed = from_phrase(_typed_phrase() if phrase_file is None else _text_of("--phrase-file", phrase_file))
    identity, new = where.restore_identity(seed)
    if as_json:
        print(json.dumps({"peer": identity.peer_id, "key": str(where.key_path), "new": new}))
    else:
        print(f"{'restored' if new else 'nothing to do, it has the same key already:'} {identity.peer_id}")
        print(f"key      {where.key_path}")


def delegate(
    peer: Annotated[str, typer.Argument(help="The other machine's peer id (`potluck identity show` there).")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take another machine in: what it earns will count for this home's key.

    Prints one line, which does nothing until it is accepted there: `potluck identity accept LINE`. Only that machine
    can accept it, so the line is no secret.

    Example:  potluck identity delegate 12D3KooWPXZaM6j5FXCyMeQEuZ6yjQgAgNuhJG1bCMSx4vLoxVG9
    """
    from potluck.net.host import PeerId
    from potluck.peer.home import Home, default_home
    from potluck.peer.links import offer

    where = Home(home or default_home()).open()
    made = offer(where, where.identity(), PeerId(peer), time.time())
    if as_json:
        print(json.dumps({"account": made.account, "peer": made.peer, "made_at": made.made_at, "line": made.line()}))
        return
    print(f"On {made.peer}: `potluck identity accept`, and this line:", file=sys.stderr)
    print(made.line())


def accept(
    line: Annotated[str, typer.Argument(help="A line of `potluck identity` from another machine.", metavar="LINE")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accept a line that another machine printed.

    A `potluck-offer:` makes this machine earn for the account that it is from; until that account revokes it, and with
    all that this key has earned for itself. A `potluck-link:` or `potluck-end:` is kept, and shown to validators by
    this machine as well. A peer that is running here need not be stopped.

    Example:  potluck identity accept potluck-offer:AYSpc3RhdGVtZW50pW9mZmVy...
    """
    from potluck.net.links import End, parse_line
    from potluck.peer.home import Home, default_home
    from potluck.peer.links import LinkNotes
    from potluck.peer.links import accept as accepted

    statement = parse_line(line)
    where = Home(home or default_home()).open()
    me = where.identity()
    link, new = accepted(where, me, statement)
    account = LinkNotes.load(where).book.account_of(me.peer_id)
    if as_json:
        fields = {"peer": link.peer, "account": link.account, "made_at": link.made_at, "line": link.line()}
        print(json.dumps({**fields, "ends": isinstance(link, End), "new": new, "counts_for": account}))
        return
    said = f"{link.peer} counts for {link.account}{' no more' if isinstance(link, End) else ''}"
    print(said if new else f"nothing to do, this is known here: {said}")
    if account != me.peer_id:
        print(f"credit of this machine counts for account {account}")


def revoke(
    peer: Annotated[str, typer.Argument(help="The peer id of a machine that this home's key had taken in.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """End what `potluck identity delegate` began, for a machine that was lost, stolen or given away.

    What it earned before stays with this account. Validators learn it from the peer of this home, when it takes part in
    a run; where it does not, from any machine that accepted the line which this prints.

    Example:  potluck identity revoke 12D3KooWPXZaM6j5FXCyMeQEuZ6yjQgAgNuhJG1bCMSx4vLoxVG9
    """
    from potluck.net.host import PeerId
    from potluck.net.identity import Identity
    from potluck.peer.home import Home, default_home
    from potluck.peer.links import end

    where = Home(home or default_home())
    made, known = end(where, Identity.load(where.key_path), PeerId(peer), time.time())
    if not known:
        print("This home never took it in, as far as it remembers: compare the peer id.", file=sys.stderr)
    if as_json:
        fields = {"account": made.account, "peer": made.peer, "made_at": made.made_at, "line": made.line()}
        print(json.dumps({**fields, "known": known}))
        return
    print("From now on it counts for itself. Other machines may show that, too:", file=sys.stderr)
    print(made.line())


def rotate(
    file: Annotated[
        Path | None, typer.Argument(help="Write an encrypted backup of the new key there.", metavar="FILE")
    ] = None,
    no_backup: Annotated[bool, typer.Option("--no-backup", help="Instead: back the new key up later.")] = False,
    passphrase_file: PassphraseFileOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing FILE.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give this home a new key, which all credit of the old one, and of machines that earn for it, counts for.

    The new key is backed up first: without it, the account is lost. The old one stays in the home, under `retired`. If
    this is interrupted, do it again.

    Example:  potluck identity rotate /media/stick/potluck-2.backup
    """
    from potluck.net.identity import Identity
    from potluck.net.identity_backup import Backup, write_backup
    from potluck.peer.home import BackupNote, Home, default_home
    from potluck.peer.links import check_rotatable, next_key, retired_path
    from potluck.peer.links import rotate as rotated

    if (file is None) != no_backup:
        raise UserError("give either FILE, for a backup of the new key, or --no-backup")
    where = Home(home or default_home())
    old = Identity.load(where.key_path)
    check_rotatable(where, old)
    note = None
    if file is not None:
        _check_free(file, where.key_path, force)
        passphrase = _passphrase(passphrase_file, twice=True)
        new = next_key(where)
        write_backup(file, Backup.seal(new.seed, passphrase), force)
        note = BackupNote(new.peer_id, file=str(file.absolute()), file_at=time.time())
    new, link = rotated(where, old, time.time())
    if note is not None:
        _remember(where, note)
    kept = retired_path(where, old.peer_id)
    if as_json:
        print(json.dumps({"peer": new.peer_id, "before": old.peer_id, "retired": str(kept), "line": link.line()}))
        return
    print(f"{new.peer_id}\nkey      {where.key_path}\nbefore   {old.peer_id}, kept as {kept}")
    if note is None:
        print("backup   none: `potluck identity backup FILE`, now")
    print("Machines that earn for this account may show it, too: `potluck identity accept`, and this line:")
    print(link.line())


def _check_shown(yes: bool) -> None:
    if not (yes or sys.stdout.isatty()):
        raise UserError("--phrase prints your key, and stdout is not a terminal: add --yes if that is what you want")


def _check_free(file: Path, key: Path, force: bool) -> None:
    """Asked before the passphrase is; `write_backup` makes sure."""
    if not file.absolute().parent.is_dir():
        raise UserError(f"{file.absolute().parent} is no folder: choose another place")
    there = os.path.exists(file)  # and not Path.exists, which raises where we may not look: writing will say so
    if there and file.samefile(key):
        raise UserError(f"{file} is the key itself: choose another name")
    if there and not force:
        raise UserError(f"{file} exists: choose another name, or --force to overwrite it")


def _passphrase(file: Path | None, twice: bool) -> str:
    """From the file, the environment or the terminal, in this order."""
    from potluck.net.identity_backup import check_passphrase

    if file is not None:
        passphrase = _text_of("--passphrase-file", file).removesuffix("\n").removesuffix("\r")
        if "\n" in passphrase:
            raise UserError(f"--passphrase-file: {file} has several lines: leave only the one with the passphrase")
        return passphrase
    if (given := os.environ.get(PASSPHRASE_VARIABLE)) is not None:
        return given
    if not sys.stdin.isatty():
        raise UserError(f"no terminal to ask for the passphrase: give --passphrase-file, or set {PASSPHRASE_VARIABLE}")
    try:
        passphrase = getpass("Passphrase: ")
        if twice:
            check_passphrase(passphrase)
            if getpass("The same again: ") != passphrase:
                raise UserError("the two passphrases differ: nothing was written")
    except EOFError:
        raise typer.Abort from None
    return passphrase


def _text_of(option: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise UserError(f"{option}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{option}: {path} is not UTF-8 text") from None
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{option}: {path} has more than {MAX_FILE_BYTES} bytes")
    return text


def _typed_phrase() -> str:
    """All of standard input; from a terminal only until there are 24 words, or an empty line."""
    from potluck.net.recovery_phrase import MAX_CHARACTERS, WORDS, words_of

    if not sys.stdin.isatty():
        return sys.stdin.buffer.read(MAX_CHARACTERS + 1).decode(errors="replace")
    print(f"The {WORDS} words, on one line or several:", file=sys.stderr)
    text = ""
    while len(words_of(text)) < WORDS and (line := sys.stdin.buffer.readline().decode(errors="replace")).strip():
        text += line
    return text


def _numbered(words: list[str]) -> str:
    """Four to a line; `restore` takes them with their numbers."""
    cells = [f"{number:2}. {word:<10}" for number, word in enumerate(words, 1)]
    return "\n".join("".join(cells[at : at + 4]).rstrip() for at in range(0, len(cells), 4))


def _remember(home: Home, note: BackupNote) -> None:
    """The backup is made: a home that cannot be written, perhaps of a broken machine, does not undo it."""
    try:
        home.note_backup(note)
    except PotluckError as error:
        print(f"`potluck identity show` will not know of this backup: {error}", file=sys.stderr)


def _text(note: BackupNote) -> str:
    made = [f"{note.file}, made {_date(note.file_at)}"] if note.file and note.file_at else []
    if note.phrase_at:
        made.append(f"recovery phrase, shown {_date(note.phrase_at)}")
    return "; ".join(made) or "none was made from here: `potluck identity backup FILE`"


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="seconds")
