"""What a checkup sees of this machine, of a run's peers, and of the run on this machine. Plain data: `checkup.py` and
`probe.py` gather it, `doctor.py` judges it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from potluck.errors import PotluckError
from potluck.net.autonat import DialBack
from potluck.net.nat import NatKind
from potluck.peer.benchmark import Speed
from potluck.peer.hardware import Machine
from potluck.peer.line_cache import Line


@dataclass(frozen=True)
class Package:
    """`wanted`: version specifiers, as a wheel's metadata have them. `installed`: None if it is not."""

    name: str
    wanted: str
    installed: str | None


@dataclass(frozen=True)
class HomeFacts:
    """`problem`: it cannot be used, and the rest is without meaning. `key_problem`: of a key file that is there;
    `peer`: None if there is none yet. `stored_bytes`: contributions that lie here. `socket_excess`: bytes by which a
    control socket's path is too long. `running`: runs of which a peer works here now."""

    path: str
    problem: str | None = None
    key_problem: str | None = None
    peer: str | None = None
    free_bytes: int = 0
    stored_bytes: int = 0
    socket_excess: int = 0
    running: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineFacts:
    """`device` is what training would use, or `device_problem` says why there is none. `p2pd_problem`: the libp2p
    daemon's program cannot be run. `speed` None: `speed_problem` says what failed, or `unmeasured` why it was not
    tried."""

    python: str
    python_wanted: str
    packages: tuple[Package, ...]
    machine: Machine
    device: str | None
    device_problem: str | None
    p2pd_problem: str | None
    open_files: int
    home: HomeFacts
    disk_quota: int
    speed: Speed | None = None
    speed_problem: str | None = None
    unmeasured: str = ""
    #: As it was measured last.
    line: Line | None = None

    @property
    def can_host(self) -> bool:
        """Whether a libp2p host could start here."""
        home = self.home
        return not (self.p2pd_problem or home.problem or home.key_problem or home.socket_excess > 0)


@dataclass(frozen=True)
class Dialled:
    """An address that was dialled: who answered and how fast, or why nobody did."""

    address: str
    problem: str | None = None
    round_trip_seconds: float | None = None


@dataclass(frozen=True)
class Download:
    """A sample of what a run's peers serve. Of too few bytes nothing can be told. `capped`: by a limit of our own."""

    bytes: int
    seconds: float
    peers: int
    capped: bool = False


@dataclass(frozen=True)
class Upload:
    """A sample of what one peer took. `capped`: by a limit of our own."""

    bytes: int
    seconds: float
    capped: bool = False


@dataclass(frozen=True)
class NetworkFacts:
    """As far as it came: what the host's start said (`problem`), the invite's addresses and those of last time, and
    what connected peers told. `taken`: a peer of the run works in this home already, so nothing was tried. `addresses`:
    where others may reach us, by the daemon. `undownloaded`: why nothing was. `upload`: None if nobody takes bytes.
    """

    taken: bool = False
    problem: PotluckError | None = None
    invited: tuple[Dialled, ...] = ()
    remembered: tuple[Dialled, ...] = ()
    loopback: bool = False
    announced: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    dial_backs: tuple[DialBack, ...] = ()
    clock_offset: float | None = None
    manifest_problem: PotluckError | None = None
    directory_problem: PotluckError | None = None
    download: Download | None = None
    undownloaded: str = ""
    upload: Upload | None = None
    nat: NatKind | None = None


@dataclass(frozen=True)
class RunFacts:
    """A run as this machine would join it. Of a pipeline `module` is the stage where one more is missed most, of those
    that fit, and `problem` says why none does; else `problem` is why the whole model does not fit.

    A contribution sends `blob_bytes` at most (in slices twice its size), those of a group that come from others have
    `pull_bytes`; they are to be had within `pull_seconds`. `upload_cap`, `download_cap`: our own limits.
    `step_tokens` are trained in `train_seconds` at least once, or a round is lost. `state_bytes` are downloaded at
    joining, `checkpoint_bytes` are kept, and `contribution_bytes` at most for those who catch up. `snapshot_bytes`:
    main memory for a snapshot of another stage, beside the module's own `memory_bytes`.
    """

    name: str
    family: str
    parameters: int
    stages: int
    module: str | None
    module_parameters: int
    problem: PotluckError | None
    peers: int | None
    validates: bool
    source: str
    data_problem: str | None
    packages_missing: tuple[str, ...]
    step_tokens: int
    train_seconds: float
    starts_in_seconds: float
    state_bytes: int
    checkpoint_bytes: int
    contribution_bytes: int
    snapshot_bytes: int
    memory_bytes: int
    blob_bytes: int = 0
    pull_bytes: int = 0
    pull_seconds: float = math.inf
    upload_cap: float | None = None
    download_cap: float | None = None
