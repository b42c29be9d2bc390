"""`potluck identity`: who this home is, and how to stay it when the machine is lost."""

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

    Below it: where the key lies, and which backups of it were made from this home.

    Example:  potluck identity show --home ~/validator
    """
    from potluck.peer.home import Home, default_home

    where = Home(home or default_home()).open()
    peer = where.identity().peer_id
    note = where.backups(peer)
    if as_json:
        backups = {"file": note.file, "file_at": note.file_at, "phrase_at": note.phrase_at}
        print(json.dumps({"peer": peer, "key": str(where.key_path), "backups": backups}))
        return
    print(f"{peer}\nkey      {where.key_path}\nbackup   {_text(note)}")


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


def _check_shown(yes: bool) -> None:
    if not (yes or sys.stdout.isatty()):
        raise UserError("--phrase prints your key, and stdout is not a terminal: add --yes if that is what you want")


def _check_free(file: Path, key: Path, force: bool) -> None:
    """Asked before the passphrase is; `write_backup` makes sure."""
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
