from __future__ import annotations

import hashlib
import os
import stat
import struct
import unicodedata
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.errors import BackupError, UserError, WrongPassphrase
from potluck.net import identity_backup
from potluck.net.identity import Identity
from potluck.net.identity_backup import Backup, Cost, read_backup, write_backup

CHEAP = Cost(log2_n=10)
SEED = bytes(range(32))
PASSPHRASE = "correct horse battery staple"
PASSPHRASES = st.text(min_size=8, max_size=40).filter(lambda text: bool(text.strip()))


@pytest.fixture(scope="module")
def content() -> bytes:
    return Backup.seal(SEED, PASSPHRASE, CHEAP).encode()


def with_checksum(body: bytes) -> bytes:
    """What somebody writes who changes a backup and knows its format."""
    return body + hashlib.sha256(body).digest()


def with_cost(content: bytes, log2_n: int, r: int, p: int) -> bytes:
    return with_checksum(content[:17] + bytes([log2_n, r, p]) + content[20:-32])


@settings(max_examples=40)
@given(st.binary(min_size=32, max_size=32), PASSPHRASES)
def test_what_was_sealed_is_opened_again(seed: bytes, passphrase: str) -> None:
    backup = Backup.decode(Backup.seal(seed, passphrase, CHEAP).encode())
    assert backup.open(passphrase) == seed
    assert seed not in backup.encode() and backup.sealed.hex() not in repr(backup)


@settings(max_examples=40)
@given(PASSPHRASES, PASSPHRASES)
def test_no_other_passphrase_opens_it(passphrase: str, other: str) -> None:
    backup = Backup.seal(SEED, passphrase, CHEAP)
    if unicodedata.normalize("NFC", passphrase) != unicodedata.normalize("NFC", other):
        with pytest.raises(WrongPassphrase):
            backup.open(other)


def test_the_format_is_what_the_docstring_says_and_stays(content: bytes) -> None:
    magic, version, log2_n, r, p, salt, nonce, public_key, sealed, checksum = struct.unpack(
        ">16s4B16s12s32s48s32s", content
    )
    assert (magic, version, (log2_n, r, p)) == (b"potluck identity", 1, CHEAP)
    assert checksum == hashlib.sha256(content[:-32]).digest() and len(content) == 160
    key = hashlib.scrypt(PASSPHRASE.encode(), salt=salt, n=1 << log2_n, r=r, p=p, dklen=32)
    assert ChaCha20Poly1305(key).decrypt(nonce, sealed, content[:80]) == SEED
    assert public_key == identity_backup._public_key(SEED)


def test_a_backup_of_the_first_version_is_read() -> None:
    header = b"potluck identity" + bytes([1, 10, 8, 1, *range(16), *range(12)])
    public_key = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
    sealed = bytes.fromhex(
        "994e71146889ee0a12aa685940504e96fabefc19dd1bd94717abd1575d83639fed649b0fb1a60c7f049807220de8d498"
    )
    assert Backup.decode(with_checksum(header + public_key + sealed)).open("correct horse") == SEED


def test_two_backups_of_one_key_have_nothing_random_in_common() -> None:
    one, other = (Backup.seal(SEED, PASSPHRASE, CHEAP) for _ in range(2))
    assert one.public_key == other.public_key
    assert one.salt != other.salt and one.nonce != other.nonce and one.sealed != other.sealed


def test_a_passphrase_is_the_same_however_its_accents_were_composed() -> None:
    backup = Backup.seal(SEED, unicodedata.normalize("NFD", "Käsefondue mit Rösti"), CHEAP)
    assert backup.open(unicodedata.normalize("NFC", "Käsefondue mit Rösti")) == SEED


def test_ours_costs_what_is_recommended_and_is_within_bounds() -> None:
    assert Cost() == (17, 8, 1)
    Cost().check()
    assert Backup.decode(Backup.seal(SEED, PASSPHRASE).encode()).open(PASSPHRASE) == SEED


def test_every_flipped_bit_is_refused(content: bytes) -> None:
    for at in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            with pytest.raises(BackupError):
                Backup.decode(bytes(damaged))


def test_every_byte_that_was_changed_on_purpose_is_refused(content: bytes) -> None:
    """With a checksum that fits: then authentication has to find it."""
    for at in range(len(content) - 32):
        changed = bytearray(content[:-32])
        changed[at] ^= 1
        with pytest.raises(BackupError):
            Backup.decode(with_checksum(bytes(changed))).open(PASSPHRASE)


def test_every_other_length_is_refused_and_says_so(content: bytes) -> None:
    for length in range(len(content)):
        with pytest.raises(BackupError, match=f"cut short: {length} of 160"):
            Backup.decode(content[:length])
    with pytest.raises(BackupError, match="more than"):
        Backup.decode(content + b"\0")


@given(st.binary(max_size=400))
def test_garbage_is_never_a_backup(garbage: bytes) -> None:
    with pytest.raises(BackupError):
        Backup.decode(garbage)


@pytest.mark.parametrize("foreign", [b"hello", b"\x08\x01\x12\x40" + bytes(64), b"-----BEGIN OPENSSH PRIVATE KEY-----"])
def test_a_foreign_file_is_named_as_such(foreign: bytes) -> None:
    with pytest.raises(BackupError, match="not a backup"):
        Backup.decode(foreign)


def test_a_later_version_says_what_to_do(content: bytes) -> None:
    with pytest.raises(BackupError, match="version 2, which only a newer Potluck reads"):
        Backup.decode(with_checksum(content[:16] + b"\2" + content[17:-32]))


@pytest.mark.parametrize(
    "cost", [(20, 32, 1), (20, 8, 1), (18, 9, 1), (17, 8, 5), (17, 8, 255), (255, 255, 255), (63, 8, 1), (0, 8, 1),
             (9, 8, 1), (10, 0, 1), (10, 8, 0), (16, 1, 1)]
)  # fmt: skip
def test_a_hostile_cost_is_refused_before_it_is_paid(
    cost: tuple[int, int, int], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paid(*arguments: object, **options: object) -> None:
        raise AssertionError("scrypt was called")

    monkeypatch.setattr(identity_backup, "Scrypt", paid)
    with pytest.raises(BackupError, match=r"scrypt with|wants"):
        Backup.decode(with_cost(content, *cost))
    with pytest.raises(BackupError, match=r"scrypt with|wants"):
        Backup.seal(SEED, PASSPHRASE, Cost(*cost))


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_no_cost_that_is_accepted_takes_more_than_the_bounds(cost: tuple[int, int, int]) -> None:
    try:
        Cost(*cost).check()
    except BackupError:
        return
    log2_n, r, p = cost
    assert 128 * r * 2**log2_n <= 256 << 20 and 1 <= p <= 4


def test_a_backup_that_names_another_key_than_it_holds_is_refused() -> None:
    blank = Backup(CHEAP, bytes(16), bytes(12), bytes(32), b"")
    sealed = blank._cipher(PASSPHRASE).encrypt(blank.nonce, SEED, blank._header)
    with pytest.raises(BackupError, match="another key"):
        Backup(CHEAP, bytes(16), bytes(12), bytes(32), sealed).open(PASSPHRASE)


@pytest.mark.parametrize("passphrase", ["", " " * 20, "1234567"])
def test_a_passphrase_that_protects_nothing_is_refused(passphrase: str) -> None:
    with pytest.raises(UserError, match="at least 8"):
        Backup.seal(SEED, passphrase, CHEAP)


def test_the_file_is_private_whole_and_never_overwritten_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "backup"
    first, second = (Backup.seal(SEED, PASSPHRASE, CHEAP) for _ in range(2))
    write_backup(path, first)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(tmp_path) == ["backup"]
    with pytest.raises(UserError, match="--force"):
        write_backup(path, second)
    assert read_backup(path) == first
    path.chmod(0o644)
    write_backup(path, second, overwrite=True)
    assert read_backup(path) == second
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(tmp_path) == ["backup"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "backup"
    backup = Backup.seal(SEED, PASSPHRASE, CHEAP)
    write_backup(path, backup)

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(identity_backup, "write_private", full)
    for name, overwrite in (("backup", True), ("other", False)):
        with pytest.raises(UserError, match="No space left"):
            write_backup(tmp_path / name, backup, overwrite)
    assert read_backup(path) == backup and os.listdir(tmp_path) == ["backup"]


def test_no_more_of_a_file_is_read_than_a_backup_has(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "huge"
    path.write_bytes(content)
    os.truncate(path, 1 << 40)
    with pytest.raises(BackupError, match=f"{path}: there is more"):
        read_backup(path)
    with pytest.raises(UserError, match="nowhere"):
        read_backup(tmp_path / "nowhere")


def test_a_restored_key_is_the_same_file(tmp_path: Path) -> None:
    created = Identity.create(tmp_path / "key")
    restored = Identity.restore(tmp_path / "other", created.seed)
    assert restored.peer_id == created.peer_id
    assert restored.path.read_bytes() == created.path.read_bytes()
    assert stat.S_IMODE(restored.path.stat().st_mode) == 0o600
