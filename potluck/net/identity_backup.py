"""A backup of a peer's key: one small file, sealed with a passphrase. Whoever has both is that peer.

The file, 160 bytes:

    offset  bytes
         0     16   `potluck identity`
        16      1   version, 1
        17      3   the cost of scrypt (RFC 7914): log2 of N, r, p
        20     16   scrypt's salt
        36     12   the cipher's nonce
        48     32   the public key, readable: whose backup this is
        80     48   the private key, sealed by ChaCha20-Poly1305 (RFC 8439), which authenticates all before it too
       128     32   SHA-256 of all before it: it tells damage from a wrong passphrase, and protects nothing

scrypt and not Argon2id: the oldest `cryptography` that we take has no Argon2id.
"""

from __future__ import annotations

import os
import secrets
import struct
import unicodedata
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from potluck.errors import BackupError, UserError, WrongPassphrase
from potluck.net.host import PeerId
from potluck.net.identity import peer_id_of, sync_directory, write_private

#: Characters. Guessing one costs half a second and 128 MiB; a good passphrase is much longer all the same.
MIN_PASSPHRASE: Final = 8
#: What opening a stranger's file may take: twice the memory and eight times the work of our own.
MAX_MEMORY_BYTES: Final = 1 << 28
MAX_PASSES: Final = 4

_MAGIC: Final = b"potluck identity"
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">16sBBBB16s12s32s")
_SEALED_BYTES: Final = 48
_FILE_BYTES: Final = _HEADER.size + _SEALED_BYTES + 32


class Cost(NamedTuple):
    """What one guess costs. The default is OWASP's for scrypt (Password Storage Cheat Sheet): 128 MiB."""

    log2_n: int = 17
    r: int = 8
    p: int = 1

    def check(self) -> None:
        """Raises BackupError for a cost that no backup of ours has, before any of it is paid."""
        if not (10 <= self.log2_n <= 20 and 8 <= self.r <= 32 and self.p >= 1):
            raise BackupError(
                f"scrypt with N = 2^{self.log2_n}, r = {self.r}, p = {self.p} is nothing that Potluck uses"
            )
        memory = 128 * self.r << self.log2_n
        if memory > MAX_MEMORY_BYTES or self.p > MAX_PASSES:
            raise BackupError(
                f"it wants {memory >> 20} MiB of memory {self.p} times over to be opened, more than the "
                f"{MAX_MEMORY_BYTES >> 20} MiB and {MAX_PASSES} times that are allowed"
            )


@dataclass(frozen=True)
class Backup:
    """A sealed key. Make it with `seal` or `decode`; each raises BackupError for a cost out of bounds."""

    cost: Cost
    salt: bytes
    nonce: bytes
    public_key: bytes
    sealed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        self.cost.check()

    @property
    def peer_id(self) -> PeerId:
        return peer_id_of(self.public_key)

    @classmethod
    def seal(cls, seed: bytes, passphrase: str, cost: Cost = Cost()) -> Backup:
        """Of an Ed25519 seed of 32 bytes. Takes half a second. Raises UserError if the passphrase is too short."""
        check_passphrase(passphrase)
        blank = cls(cost, os.urandom(16), os.urandom(12), _public_key(seed), b"")
        return replace(blank, sealed=blank._cipher(passphrase).encrypt(blank.nonce, seed, blank._header))

    def open(self, passphrase: str) -> bytes:
        """The seed. Takes half a second. Raises WrongPassphrase."""
        try:
            seed = self._cipher(passphrase).decrypt(self.nonce, self.sealed, self._header)
        except InvalidTag:
            raise WrongPassphrase("this passphrase does not open the backup (or somebody changed the file)") from None
        if _public_key(seed) != self.public_key:  # only who knows the passphrase can make such a file
            raise BackupError("the backup holds another key than it says")
        return seed

    def encode(self) -> bytes:
        content = self._header + self.sealed
        return content + sha256(content).digest()

    @classmethod
    def decode(cls, content: bytes) -> Backup:
        """Raises BackupError if these are not all the bytes of a backup, undamaged and within bounds."""
        if not content.startswith(_MAGIC[: len(content)]):
            raise BackupError(
                "not a backup made by `potluck identity backup` (a bare identity.key is copied back by hand)"
            )
        if len(content) > len(_MAGIC) and content[len(_MAGIC)] != _VERSION:
            raise BackupError(f"damaged, or of version {content[len(_MAGIC)]}, which only a newer Potluck reads")
        if len(content) < _FILE_BYTES:
            raise BackupError(f"cut short: {len(content)} of {_FILE_BYTES} bytes are there")
        if len(content) > _FILE_BYTES:
            raise BackupError(f"there is more than a backup's {_FILE_BYTES} bytes in it")
        body, checksum = content[:-32], content[-32:]
        if sha256(body).digest() != checksum:
            raise BackupError("damaged: its checksum does not fit; use another copy of it, or the recovery phrase")
        _, _, log2_n, r, p, salt, nonce, public_key = _HEADER.unpack_from(body)
        return cls(Cost(log2_n, r, p), salt, nonce, public_key, body[_HEADER.size :])

    @property
    def _header(self) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, *self.cost, self.salt, self.nonce, self.public_key)

    def _cipher(self, passphrase: str) -> ChaCha20Poly1305:
        # One passphrase, however this keyboard composes its accents.
        secret = unicodedata.normalize("NFC", passphrase).encode(errors="surrogateescape")
        log2_n, r, p = self.cost
        return ChaCha20Poly1305(Scrypt(self.salt, length=32, n=1 << log2_n, r=r, p=p).derive(secret))


def check_passphrase(passphrase: str) -> None:
    """Raises UserError if it is too short to protect anything."""
    if not passphrase.strip():
        raise UserError(f"the passphrase is empty: use at least {MIN_PASSPHRASE} characters, better several words")
    if len(passphrase) < MIN_PASSPHRASE:
        raise UserError(
            f"the passphrase has {len(passphrase)} characters: use at least {MIN_PASSPHRASE}, better several words"
        )


def read_backup(path: Path) -> Backup:
    """Reads no more than a backup has. Raises BackupError that names the file, UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return Backup.decode(content)
    except BackupError as error:
        raise BackupError(f"{path}: {error}") from None


def write_backup(path: Path, backup: Backup, overwrite: bool = False) -> None:
    """A file of mode 0600 that is there whole or not at all. Raises UserError if there is one, unless `overwrite`."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            write_private(partial, backup.encode())
            if not overwrite:
                path.touch(mode=0o600, exist_ok=False)  # takes the name; a link would too, but USB sticks have none
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(path.parent)
    except FileExistsError:
        raise UserError(f"{path} exists: choose another name, or --force to overwrite it") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _public_key(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
