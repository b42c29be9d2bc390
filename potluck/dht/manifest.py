"""The manifest: a run's frozen description, signed by its organizer. The run's id is its hash.

A manifest comes from strangers: it can name model families, data sources and codecs from our registries, and
cannot carry code. Every field has bounds; unknown fields and versions are refused. Whoever holds a run id can
check any copy of its manifest, so it may be fetched from anybody (`docs/protocol.md`).
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NewType, Self, TypeVar

import msgspec
import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import ErrorDetails

from potluck.errors import ManifestError
from potluck.net.host import PeerId
from potluck.net.identity import Identity, peer_id_of, verify

#: A run's name everywhere: 52 characters, see `run_id_of`.
RunId = NewType("RunId", str)

#: A signed manifest, in bytes: checked before parsing.
MAX_MANIFEST_BYTES: Final = 64 * 1024
MAX_LAYERS: Final = 1024
#: Experts of all layers together: each is a module that every peer builds.
MAX_EXPERTS: Final = 2**15
_LAYER_KEYS: Final = ("layer", "depth", "blocks")
_EXPERT_KEYS: Final = ("experts",)
MAX_CONFIG_INTEGER: Final = 2**24
MAX_CONFIG_LIST: Final = 256
MAX_CONFIG_TEXT: Final = 256

_DOMAIN: Final = b"potluck.manifest.1"
_ENVELOPE_VERSION: Final = 1
_RUN_ID: Final = re.compile(r"[a-z2-7]{52}")

_PEER_ID_PATTERN: Final = r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$"
_TITLE_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$"
_NAME_PATTERN: Final = r"^[a-z][a-z0-9_-]{0,31}$"
_SOURCE_PATTERN: Final = r"^(python-stdlib|text:.+|hf:.+)$"
_TOKENIZER_PATTERN: Final = r"^(bytes|hf:.+)$"
PeerIdText = Annotated[str, StringConstraints(pattern=_PEER_ID_PATTERN)]
HashText = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Number = int | Annotated[float, Field(allow_inf_nan=False)]
ConfigKey = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
CodecParameter = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]

#: Config keys that would load code, pick kernels by name, or override what the peer decides for its own
#: hardware.
FORBIDDEN_CONFIG_KEYS: Final = frozenset(
    {"auto_map", "quantization_config", "torch_dtype", "dtype", "trust_remote_code", "name_or_path"}
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ModelPart(_Part):
    """What is trained: any causal language model that `transformers` builds from a config."""

    family: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")] = Field(
        description="model_type of a causal LM in transformers, for example llama, qwen3, gpt2"
    )
    config: dict[ConfigKey, Any] = Field(
        max_length=64, description="arguments of that family's config class; sizes, never code"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights")
    stages: int = Field(
        default=1, ge=1, le=256, description="pipeline stages the layers are cut into; 1 is data-parallel"
    )
    initial_state: HashText | None = Field(
        default=None, description="content address of theta_0, the weights at round 0; set by the organizer"
    )
    initial_bytes: int = Field(default=0, ge=0, le=2**40, description="size of theta_0 in bytes")

    @field_validator("config")
    @classmethod
    def _config_holds_only_sizes(cls, config: dict[str, Any]) -> dict[str, Any]:
        for key, value in config.items():
            if key in FORBIDDEN_CONFIG_KEYS or key.endswith("_implementation"):
                raise ValueError(f"{key} is not allowed in a manifest: each peer decides it for itself")
            if isinstance(value, list):
                if len(value) > MAX_CONFIG_LIST:
                    raise ValueError(f"{key} has {len(value)} values, allowed at most {MAX_CONFIG_LIST}")
                for item in value:
                    if isinstance(item, bool) or item is None:
                        raise ValueError(f"{key} holds {item}, allowed are lists of numbers and texts")
                    _check_config_scalar(key, item)
            else:
                _check_config_scalar(key, value)
        layers, experts = _largest(config, _LAYER_KEYS), _largest(config, _EXPERT_KEYS)
        if layers * experts > MAX_EXPERTS:
            raise ValueError(f"{layers} layers of {experts} experts, allowed at most {MAX_EXPERTS} experts in all")
        return config


def _largest(config: dict[str, Any], words: tuple[str, ...]) -> int:
    counts = (v for k, v in config.items() if isinstance(v, int) and any(word in k for word in words))
    return max((abs(count) for count in counts), default=1) or 1


def _check_config_scalar(key: str, value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        names_modules = any(word in key for word in _LAYER_KEYS + _EXPERT_KEYS)
        largest = MAX_LAYERS if names_modules else MAX_CONFIG_INTEGER
        if abs(value) > largest:
            raise ValueError(f"{key} is {value}, allowed at most {largest}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}, allowed are finite numbers")
    elif isinstance(value, str):
        if len(value) > MAX_CONFIG_TEXT:
            raise ValueError(f"{key} has {len(value)} characters, allowed at most {MAX_CONFIG_TEXT}")
    else:
        raise ValueError(f"{key} is a {type(value).__name__}, allowed are numbers, texts, booleans and lists of them")


class DataPart(_Part):
    """What it is trained on. Which samples a peer takes follows from seed, peer id and round."""

    source: Annotated[str, StringConstraints(pattern=_SOURCE_PATTERN, max_length=512)] = Field(
        default="python-stdlib",
        description="python-stdlib (needs no download), text:PATHS (each peer's own files) or hf:DATASET",
    )
    tokenizer: Annotated[str, StringConstraints(pattern=_TOKENIZER_PATTERN, max_length=256)] = Field(
        default="bytes", description="bytes (vocabulary of 256) or hf:NAME of a tokenizer on the Hub"
    )
    sequence_length: int = Field(ge=8, le=2**17, description="tokens per sample")
    held_out_fraction: float = Field(
        default=0.05, gt=0, le=0.5, description="share of the documents that is only evaluated on"
    )
    text_field: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = Field(
        default="text", description="column of an hf: data set that holds the text"
    )
    split: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\[\]:%+-]{1,64}$")] = Field(
        default="train", description="split of an hf: data set"
    )
    documents: int = Field(
        default=0,
        ge=0,
        le=2**31,
        description="read only the first so many of an hf: data set, as a stream; 0 reads all",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the samples' assignment to peers")


#: Codecs whose contributions are aggregated in slices: those with a value for every parameter.
SLICED_CODECS = ("none", "int8", "int4")


class RoundsPart(_Part):
    """How replicas meet: a round is a slice of time, the same for every peer."""

    seconds: float = Field(ge=2, le=86400, description="length of a round in seconds")
    steps: int = Field(ge=1, le=100_000, description="most local steps (H) in a round; slow peers do fewer")
    group_size: int = Field(default=16, ge=2, le=256, description="replicas that average with each other")
    exchange_seconds: float = Field(
        ge=0.5,
        description="end of the round kept for commit, pull and apply, in seconds; less than half a round, with "
        "overlap less than a round",
    )
    exchange: Literal["whole", "sliced"] = Field(
        default="whole",
        description="whole: each peer pulls all contributions; sliced, for the codecs none, int8 and int4 without "
        "validators: each aggregates a part for all, and receives about twice a contribution however large the group",
    )
    retain: int = Field(default=6, ge=2, le=1000, description="rounds for which contributions stay available")
    fragments: int = Field(
        default=8, ge=1, le=4096, description="parts (F) of the parameters averaged in turn against drift"
    )
    sync_limit: float = Field(
        default=3.0,
        gt=0,
        le=1e6,
        description="with several groups: a peer farther from its group than this times the drift that F outer "
        "steps explain loads the group's state",
    )
    overlap: bool = Field(
        default=False,
        description="train the next round while this one is exchanged: an update lands late by exchange_seconds; "
        "for data-parallel runs without validators",
    )
    stream: int = Field(
        default=1,
        ge=1,
        le=256,
        description="parts that the tensors are exchanged in, one each round: contributions are as many times smaller; "
        "1 exchanges all in every round; no tensor is cut: the largest one is a bound; for data-parallel runs without "
        "validators and with rounds.exchange whole",
    )

    @property
    def uploads(self) -> int:
        """How often as much as a contribution passes an uplink in a round: in slices its own parts, and as many that
        were aggregated here."""
        return 2 if self.exchange == "sliced" else 1

    @model_validator(mode="after")
    def _exchange_fits(self) -> Self:
        most = self.seconds if self.overlap else self.seconds / 2
        if self.exchange_seconds >= most:
            of = "rounds.seconds (with rounds.overlap)" if self.overlap else "half of rounds.seconds"
            given = f"exchange_seconds is {self.exchange_seconds:g}"
            raise ValueError(f"{given}, allowed less than {most:g}: {of}")
        return self


class TrainingPart(_Part):
    """The inner optimizer: what a peer does in its local steps."""

    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw, or adamw8bit (bitsandbytes: a quarter of the optimizer's memory)"
    )
    learning_rate: float = Field(gt=0, le=10, description="inner learning rate after the warm-up")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), strict=False, description="AdamW's decay rates"
    )
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="AdamW's decoupled weight decay")
    warmup_steps: int = Field(default=0, ge=0, le=2**31, description="steps until the full learning rate")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="constant, or cosine down to a tenth at total_steps"
    )
    total_steps: int = Field(default=100_000, ge=1, le=2**31, description="local steps of the whole run")
    batch_size: int = Field(ge=1, le=65536, description="sequences per local step")
    gradient_clip: float = Field(default=1.0, ge=0, le=1e6, description="largest gradient norm; 0 does not clip")
    precision: Literal["float32", "bf16-auto"] = Field(
        default="bf16-auto", description="float32, or bf16-auto: bfloat16 autocast where the device has it"
    )

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, allowed at most total_steps, which is {self.total_steps}"
            )
        return self


class CodecPart(_Part):
    """How a contribution becomes bytes."""

    name: Annotated[str, StringConstraints(pattern=_NAME_PATTERN)] = Field(
        default="int8", description="none, int8, int4, sparse, demo or sign"
    )
    parameters: dict[CodecParameter, Number] = Field(
        default_factory=dict,
        max_length=16,
        description="the codec's own settings: block (int8, int4), chunk, k and beta (sparse), k and beta (demo), "
        "beta1 and beta2 (sign)",
    )


class PipelinePart(_Part):
    """With model.stages above 1: how microbatches travel through the stages."""

    microbatch: int = Field(default=4, ge=1, le=4096, description="sequences that travel together")
    activations: Literal["none", "int8"] = Field(
        default="int8", description="activations and their gradients on the wire: none (float32) or int8"
    )
    in_flight: int = Field(default=4, ge=1, le=256, description="microbatches that a trainer has under way at once")
    direct: bool = Field(
        default=True, description="servers hand activations to each other; false sends each through the trainer"
    )


class AggregationPart(_Part):
    """How a group's contributions become one update."""

    rule: Annotated[str, StringConstraints(pattern=_NAME_PATTERN)] = Field(
        default="mean",
        description="mean, weighted by tokens and by the ledger; without validators also trimmed_mean, median, "
        "geometric_median, centered_clip, nearest",
    )
    liars: float = Field(default=0.25, ge=0, lt=0.5, description="the share of a group that such a rule stands")
    clip: bool = Field(default=True, description="clip each contribution to the group's median norm, per tensor")


class OuterPart(_Part):
    """The outer optimizer: what the update does to the parameters at the end of a round."""

    learning_rate: float = Field(default=1.0, gt=0, le=10, description="1 with momentum 0 is plain averaging")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="0.7 to 0.9 for runs of hundreds of rounds")
    nesterov: bool = Field(default=True, description="Nesterov's form of momentum")
    momentum_warmup_rounds: int = Field(
        default=0, ge=0, le=1_000_000, description="rounds over which the momentum grows from 0"
    )


class IncentivesPart(_Part):
    """Whose scores count."""

    validators: tuple[PeerIdText, ...] = Field(
        default=(), max_length=64, strict=False, description="peer ids whose published weights are trusted"
    )
    stake: dict[PeerIdText, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict, max_length=64, description="trust in each validator; 1 for those not named"
    )
    emission: float = Field(default=100.0, ge=0, le=1e12, description="credit paid out per round and module")
    validator_emission: float = Field(
        default=10.0, ge=0, le=1e12, description="credit paid to validators, on top, per round and module"
    )

    @model_validator(mode="after")
    def _stake_is_of_validators(self) -> Self:
        if len(set(self.validators)) < len(self.validators):
            raise ValueError("validators names a peer twice; trust one more with incentives.stake")
        if odd := sorted(set(self.stake) - set(self.validators)):
            raise ValueError(f"stake names {odd[0]}, which is none of incentives.validators")
        return self

    @property
    def trust(self) -> dict[PeerId, float]:
        """Stake of every validator; empty where nobody scores."""
        return {PeerId(peer): self.stake.get(peer, 1.0) for peer in self.validators}


class ManifestDraft(_Part):
    """What an organizer writes in TOML. `finish` adds what only the host command can know."""

    version: Literal[1] = Field(default=1, description="version of this format")
    name: Annotated[str, StringConstraints(pattern=_TITLE_PATTERN)] = Field(description="the run's name, for people")
    model: ModelPart = Field(description="what is trained")
    data: DataPart = Field(description="what it is trained on")
    rounds: RoundsPart = Field(description="how replicas meet")
    training: TrainingPart = Field(description="local steps")
    pipeline: PipelinePart = Field(
        default_factory=PipelinePart, description="how microbatches travel, with model.stages above 1"
    )
    codec: CodecPart = Field(default_factory=CodecPart, description="how contributions become bytes")
    aggregation: AggregationPart = Field(
        default_factory=AggregationPart, description="how a group's contributions become one update"
    )
    outer: OuterPart = Field(default_factory=OuterPart, description="the outer optimizer")
    incentives: IncentivesPart = Field(default_factory=IncentivesPart, description="whose scores count")

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        vocabulary = self.model.config.get("vocab_size")
        if self.data.tokenizer == "bytes" and isinstance(vocabulary, int) and vocabulary < 256:
            raise ValueError(f"model.config.vocab_size is {vocabulary}, allowed at least 256 with the bytes tokenizer")
        positions = self.model.config.get("max_position_embeddings")
        if isinstance(positions, int) and positions < self.data.sequence_length:
            raise ValueError(
                f"data.sequence_length is {self.data.sequence_length}, allowed at most "
                f"model.config.max_position_embeddings, which is {positions}"
            )
        layers = self.model.config.get("num_hidden_layers")
        if isinstance(layers, int) and self.model.stages > layers:
            raise ValueError(
                f"model.stages is {self.model.stages}, allowed at most the number of layers "
                f"(model.config.num_hidden_layers), which is {layers}"
            )
        for name, used, why in (
            ("overlap", self.rounds.overlap, "samples that they can check follow from a state that has not landed yet"),
            ("stream", self.rounds.stream > 1, "they judge whole contributions"),
        ):
            if used and self.model.stages > 1:
                raise ValueError(f"rounds.{name} is for data-parallel runs: model.stages must be 1")
            if used and self.incentives.validators:
                raise ValueError(f"rounds.{name} does not go with incentives.validators: {why}")
        if self.model.stages > 1 and self.model.config.get("tie_word_embeddings") is True:
            raise ValueError(
                "model.config.tie_word_embeddings is true, but the first stage has the embedding, the last the head, "
                "and the two copies would drift apart: set it to false, or model.stages to 1"
            )
        if self.rounds.stream > 1 and self.rounds.exchange != "whole":
            raise ValueError('rounds.stream goes with rounds.exchange "whole" only')
        if self.rounds.exchange == "sliced" and (self.codec.name not in SLICED_CODECS or self.incentives.validators):
            raise ValueError(
                f"rounds.exchange is sliced, allowed with codec.name {', '.join(SLICED_CODECS)} and without "
                "incentives.validators, who look at whole contributions"
            )
        return self

    def finish(
        self,
        organizer: PeerId,
        *,
        created: float,
        genesis: float,
        initial_state: str | None = None,
        initial_bytes: int = 0,
    ) -> Manifest:
        """The manifest to sign. Times in Unix seconds. Raises ManifestError."""
        fields = self.model_dump()
        fields["model"] |= {"initial_state": initial_state, "initial_bytes": initial_bytes}
        return _validate(
            Manifest, fields | {"organizer": organizer, "created": float(created), "genesis": float(genesis)}
        )

    def check_known(
        self,
        *,
        codecs: Collection[str],
        rules: Collection[str] | None = None,
        families: Collection[str] | None = None,
    ) -> None:
        """Refuse names that this program's registries lack. Raises ManifestError."""
        wanted: list[tuple[str, str, Collection[str] | None]] = [
            ("codec.name", self.codec.name, codecs),
            ("aggregation.rule", self.aggregation.rule, rules),
            ("model.family", self.model.family, families),
        ]
        for field, name, known in wanted:
            if known is not None and name not in known:
                raise ManifestError(f"{field} is {name!r}, this program knows {', '.join(sorted(known))}")
        if self.incentives.validators and self.aggregation.rule != "mean":
            raise ManifestError(
                f"aggregation.rule is {self.aggregation.rule!r}: with incentives.validators it must be mean, as credit "
                "is for what each contribution moved, and validators' weights are what keeps liars out"
            )


class Manifest(ManifestDraft):
    """A run's frozen description, as every peer of the run reads it."""

    created: float = Field(ge=0, le=2**40, description="when it was signed, in Unix seconds")
    genesis: float = Field(ge=0, le=2**40, description="when round 0 starts, in Unix seconds")
    organizer: PeerIdText = Field(description="peer id of the one who signed it")

    @model_validator(mode="after")
    def _starts_after_creation(self) -> Self:
        # A year: a run that starts later than that is a mistyped genesis, and its peers would wait silently.
        if not self.created - 86400 <= self.genesis <= self.created + 366 * 86400:
            raise ValueError(f"genesis is {self.genesis:.0f}, allowed from a day before to a year after `created`")
        return self

    def to_json(self) -> bytes:
        return self.model_dump_json().encode()


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    manifest: bytes
    organizer: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest with the exact bytes that were signed: those are what peers store, serve and hash."""

    manifest: Manifest
    envelope: bytes

    @property
    def run_id(self) -> RunId:
        return run_id_of(self.envelope)

    @classmethod
    def decode(cls, data: bytes, run_id: RunId | None = None) -> SignedManifest:
        """Check and open what another peer sent. Raises ManifestError, whatever the bytes."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"the manifest has {len(data)} bytes, allowed {MAX_MANIFEST_BYTES}")
        actual = run_id_of(data)
        if run_id is not None and actual != run_id:
            raise ManifestError(
                f"this manifest belongs to run {actual}, the invite names {run_id}: ask for a fresh invite"
            )
        try:
            envelope = msgspec.msgpack.decode(data, type=_Envelope)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ManifestError(f"not a signed manifest ({error})") from None
        if envelope.version != _ENVELOPE_VERSION:
            raise ManifestError(
                f"the envelope has version {envelope.version}, this program knows {_ENVELOPE_VERSION}: update potluck"
            )
        if not verify(envelope.organizer, _DOMAIN + envelope.manifest, envelope.signature):
            raise ManifestError("the manifest's signature does not match: it was damaged or forged")
        manifest = parse_json(envelope.manifest)
        signer = peer_id_of(envelope.organizer)
        if signer != manifest.organizer:
            raise ManifestError(f"organizer is {manifest.organizer}, but the manifest is signed by {signer}")
        return cls(manifest, data)


def sign(manifest: Manifest, identity: Identity) -> SignedManifest:
    """Sign as the organizer. Raises ManifestError when the identity is not the manifest's organizer."""
    if manifest.organizer != identity.peer_id:
        raise ManifestError(f"organizer is {manifest.organizer}, but this identity is {identity.peer_id}")
    text = manifest.to_json()
    envelope = _Envelope(_ENVELOPE_VERSION, text, identity.public_key, identity.sign(_DOMAIN + text))
    # Decoding our own bytes keeps the promise that whatever we publish, others accept.
    return SignedManifest.decode(msgspec.msgpack.encode(envelope))


def run_id_of(envelope: bytes) -> RunId:
    """52 characters: SHA-256 of the signed manifest's bytes, in lower-case base32 without padding."""
    return RunId(base64.b32encode(hashlib.sha256(envelope).digest()).decode().rstrip("=").lower())


def parse_run_id(text: str) -> RunId:
    """Raises ManifestError for anything but 52 characters of a-z and 2-7."""
    if not _RUN_ID.fullmatch(text):
        raise ManifestError(f"a run id has 52 characters of a-z and 2-7; this one has {len(text)}: {text[:60]!r}")
    return RunId(text)


def parse_json(text: bytes) -> Manifest:
    """Raises ManifestError that names every field that is wrong."""
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestError(f"the manifest is not JSON ({error})") from None
    return _validate(Manifest, fields)


def parse_draft(fields: Mapping[str, Any]) -> ManifestDraft:
    """Raises ManifestError that names every field that is wrong."""
    return _validate(ManifestDraft, fields)


M = TypeVar("M", bound=ManifestDraft)


def _validate(kind: type[M], fields: Mapping[str, Any]) -> M:
    version = fields.get("version", 1)
    if version != 1:
        raise ManifestError(f"version is {str(version)[:20]}, this program knows version 1: update potluck")
    try:
        return kind.model_validate(dict(fields))
    except pydantic.ValidationError as error:
        # Of a setting that may be of several types, what the last one says.
        problems = {_name_of(details["loc"]): _problem(kind, details) for details in error.errors()}
        raise ManifestError("\n".join(problems.values())) from None


#: What pydantic would say of a value's type or form, for people.
_WANTED: Final = {
    "dict_type": "it is a table of settings",
    "tuple_type": 'write a list, as in ["one", "two"]',
    _PEER_ID_PATTERN: "a peer's id begins with 12D3KooW and has 52 letters and digits (potluck identity show)",
    _TITLE_PATTERN: "allowed are letters, digits, spaces, '.', '_' and '-', a letter or digit first, 64 at most",
    _NAME_PATTERN: "allowed are small letters, digits, _ and -, a letter first, 32 at most",
    _SOURCE_PATTERN: "allowed are python-stdlib, text:PATH and hf:NAME",
    _TOKENIZER_PATTERN: "allowed are bytes and hf:NAME",
}


def _name_of(location: tuple[int | str, ...]) -> str:
    """Dotted, without the type that a value was tried as."""
    tried = len(location) > 1 and location[-1] in ("int", "float", "bool", "str")
    return ".".join(str(part) for part in location[: -1 if tried else None])[:200]


def _problem(kind: type[BaseModel], details: ErrorDetails) -> str:
    """One line: which field, what is wrong, what is allowed."""
    field, context = _name_of(details["loc"]), details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            fields = _fields_beside(kind, details["loc"])
            meant = difflib.get_close_matches(str(details["loc"][-1]), fields, n=1)
            hint = f" (do you mean {meant[0]}?)" if meant else ""
            return f"{field} is unknown{hint}, allowed here: {', '.join(fields)}"
        case "missing":
            return f"{field} is missing"
        case "value_error":
            problem = str(context["error"])
            return f"{field}: {problem}" if field else problem
        case _:
            given = repr(details["input"])
            given = given if len(given) <= 60 else given[:57] + "..."
            if details["type"] == "model_type":
                fields = _fields_beside(kind, (*details["loc"], ""))
                return f"{field} is {given}, but has settings of its own: {', '.join(fields)}"
            said = f"{details['msg'][:1].lower()}{details['msg'][1:]}"
            return f"{field} is {given}: {_WANTED.get(context.get('pattern', details['type']), said)}"


def _fields_beside(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        inner = kind.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        kind = inner
    return list(kind.model_fields)
