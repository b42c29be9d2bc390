"""Every error that Potluck raises on purpose, in one tree.

    PotluckError                      exit code
    ├── UserError                         2    a setting is wrong: the message names the setting and the fix
    │   ├── IdentityError                 3    key file unreadable, corrupt, readable by others, in use
    │   │   └── BackupError                    a backup or a recovery phrase that is damaged, foreign or hostile
    │   │       └── WrongPassphrase            the backup is whole, and this passphrase does not open it
    │   ├── ManifestError                 4    manifest or invite corrupt, foreign, unknown, out of bounds
    │   ├── HardwareError                 5    a device or an amount of memory or disk that is not there
    │   ├── DiskFull                     11    no space left: a daemon tries again by itself
    │   └── CapTooLow                     2    an upload cap under which a run's contributions cannot be had in time
    ├── NetworkError                      6    nobody reachable, bootstrap failed, port in use
    │   ├── DaemonError                   6    the libp2p daemon did not start, or died
    │   ├── RpcError                      6    a call to one peer failed
    │   │   ├── RpcTimeout                     its deadline passed (RpcUnreached: before there was a stream)
    │   │   ├── RpcRefused                     the other side is busy: retry after `retry_after_seconds`
    │   │   ├── RpcRemoteError                 the handler there raised; `kind` is its name there
    │   │   └── RpcClosed                      the stream broke before the answer
    │   └── BlobUnavailable               6    no holder could deliver a blob before the deadline
    ├── ProtocolError                     7    another peer sent something malformed: drop it, go on
    │   ├── RecordError                        a DHT record (`RejectedRecord.reason`: forged, oversized, ...)
    │   ├── BlobError                          bytes that are not their hash
    │   └── CodecError                         a contribution that does not decode
    ├── ClockError                        8    the clock is too far off its peers' median
    ├── StateError                        9    a checkpoint or a transferred state does not load
    └── LedgerError                      10    a ledger that was changed, is damaged, or shows two histories
Exit code 1 is a bug of ours (a traceback is printed), 130 an interrupt that could not finish cleanly.
"""

from __future__ import annotations


class PotluckError(Exception):
    """Base of all. `exit_code` is what a command exits with when this reaches it."""

    exit_code = 1


class UserError(PotluckError):
    exit_code = 2


class IdentityError(UserError):
    exit_code = 3


class BackupError(IdentityError):
    pass


class WrongPassphrase(BackupError):
    pass


class ManifestError(UserError):
    exit_code = 4


class HardwareError(UserError):
    exit_code = 5


class DiskFull(UserError):
    exit_code = 11


class CapTooLow(UserError):
    pass


class NetworkError(PotluckError):
    exit_code = 6


class DaemonError(NetworkError):
    pass


class RpcError(NetworkError):
    pass


class RpcTimeout(RpcError):
    pass


class RpcUnreached(RpcTimeout):
    """No stream to the other side came about before the deadline."""


class RpcRefused(RpcError):
    """The other side has no room for this call now."""

    def __init__(self, message: str, retry_after_seconds: float = 0.5) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class RpcRemoteError(RpcError):
    """The handler on the other side raised. `kind` is the class name there, for example `BlobUnavailable`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class RpcClosed(RpcError):
    pass


class BlobUnavailable(NetworkError):
    pass


class ProtocolError(PotluckError):
    exit_code = 7


class RecordError(ProtocolError):
    pass


class BlobError(ProtocolError):
    pass


class CodecError(ProtocolError):
    pass


class ClockError(PotluckError):
    exit_code = 8


class StateError(PotluckError):
    exit_code = 9


class LedgerError(PotluckError):
    exit_code = 10
