"""A peer's Ed25519 key: its name in the network, its account in the ledger, its signature on records.

The file is what `p2pd -id=FILE` reads: a serialized libp2p `crypto.pb.PrivateKey` with key type Ed25519 and
`private || public` (32 + 32 bytes) as data. The peer id is the identity multihash of the serialized
`crypto.pb.PublicKey`, so it embeds the public key and a signature can be checked from the id alone.
Both are encoded by hand here: importing hivemind for them would cost every command 280 MB.
Spec: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from potluck.errors import IdentityError
from potluck.net.host import PeerId

#: Protobuf: field 1 (key type) = 1 (Ed25519), field 2 (data) = 64 bytes.
_FILE_PREFIX = bytes.fromhex("08011240")
#: Identity multihash (0x00) of 0x24 bytes: field 1 = Ed25519, field 2 = 32 bytes.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_KEY_BYTES = 32
_FILE_BYTES = len(_FILE_PREFIX) + 2 * _KEY_BYTES
_RESTORE = "restore it from a backup (`potluck identity restore`)"


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a 32-byte Ed25519 public key. Raises IdentityError for another length."""
    if len(public_key) != _KEY_BYTES:
        raise IdentityError(f"an Ed25519 public key has {_KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


def public_key_of(peer_id: PeerId) -> bytes:
    """The 32-byte public key inside a peer id. Raises IdentityError if it is not an Ed25519 peer id."""
    # Base58 decoding is quadratic: look at the length before decoding a stranger's text.
    if len(peer_id) > 64:
        raise IdentityError(f"not a peer id: {peer_id[:16]!r}... has {len(peer_id)} characters")
    try:
        raw = base58.b58decode(peer_id)
    except ValueError as error:
        raise IdentityError(f"not a peer id: {peer_id!r} is not base58") from error
    if len(raw) != len(_PEER_ID_PREFIX) + _KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise IdentityError(f"not an Ed25519 peer id: {peer_id!r} (Potluck's start with 12D3KooW)")
    return raw[len(_PEER_ID_PREFIX) :]


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is `public_key`'s Ed25519 signature of `message`. False for malformed input."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class Identity:
    """One key pair and the file that holds it. Make it with `create`, `load` or `load_or_create`."""

    def __init__(self, path: Path, private_key: Ed25519PrivateKey) -> None:
        self.path = path
        self._private_key = private_key
        self.public_key = private_key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id}, {str(self.path)!r})"

    def sign(self, message: bytes) -> bytes:
        """64 bytes of Ed25519 signature."""
        return self._private_key.sign(message)

    @property
    def seed(self) -> bytes:
        """The private half, 32 bytes, from which all else follows: for backups only."""
        return self._private_key.private_bytes_raw()

    @classmethod
    def create(cls, path: Path) -> Identity:
        """A new key in a new file of mode 0600. Raises IdentityError if there is one: never replaced."""
        return cls._write(path, Ed25519PrivateKey.generate())

    @classmethod
    def restore(cls, path: Path, seed: bytes) -> Identity:
        """The key of a 32-byte `seed`, written as by `create`."""
        return cls._write(path, Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def _write(cls, path: Path, private_key: Ed25519PrivateKey) -> Identity:
        content = _FILE_PREFIX + private_key.private_bytes_raw() + private_key.public_key().public_bytes_raw()
        # Written beside and linked into place: whoever sees the name sees the whole key, and one of two wins.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                write_private(temporary, content)
                os.link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(path.parent)
        except FileExistsError as error:
            raise IdentityError(f"{path} exists already: a key is never overwritten; move it away first") from error
        except OSError as error:
            raise IdentityError(f"cannot create the key file {path}: {error.strerror or error}") from error
        return cls(path, private_key)

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Raises IdentityError, with the fix, if the file is missing, open to others, corrupt or foreign."""
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(_FILE_BYTES + 1)
        except FileNotFoundError as error:
            raise IdentityError(
                f"there is no key file {path}: {_RESTORE}, or let `potluck identity show` make a new one"
            ) from error
        except OSError as error:
            raise IdentityError(f"cannot read the key file {path}: {error.strerror or error}") from error
        if mode & 0o077:
            raise IdentityError(f"other users can read the key file {path}: run `chmod 600 {path}`")
        if len(content) != _FILE_BYTES or not content.startswith(_FILE_PREFIX):
            raise IdentityError(f"{path} is not an Ed25519 key file or is damaged: move it away, then {_RESTORE}")
        key = content[len(_FILE_PREFIX) :]
        identity = cls(path, Ed25519PrivateKey.from_private_bytes(key[:_KEY_BYTES]))
        if identity.public_key != key[_KEY_BYTES:]:
            raise IdentityError(f"the halves of the key in {path} do not match: move it away, then {_RESTORE}")
        return identity

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The key in `path`, made now if there is none. Safe when several processes do it at once."""
        if not path.exists():
            try:
                return cls.create(path)
            except IdentityError:
                if not path.exists():
                    raise
        return cls.load(path)


def write_private(path: Path, content: bytes) -> None:
    """A new file of mode 0600, on the disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Names of files that are new in it are on the disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
