"""Codecs: a module's pseudo-gradient as bytes, and back. One file per codec; registered by name in the manifest.

A blob is the codec's own payload and then `magic, version, codec name, layout digest`. Decoding is hostile-input
code: the exact length is known before anything is read, values are finite and bounded, indices in range and
increasing, else `CodecError`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Protocol

from potluck.errors import ManifestError
from potluck.swarm.contribution import Contribution
from potluck.swarm.layout import Flat, Layout


class Codec(Protocol):
    """What a replica remembers between rounds (error feedback) is its `residual`; codecs only keep memory for blobs."""

    name: str
    #: Whether contributions and residual are in another basis than parameters, with tensors' norms kept (`update_of`).
    transforms: bool = False

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes | memoryview:
        """Encode delta (+ residual), shape (layout.size,); `Layout.flatten` makes it of tensors on any device. With
        error feedback, `residual` is updated in place to what was not sent. The blob's memory may be used again once
        nothing refers to it."""
        ...

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        """Raises CodecError on anything but a well-formed blob of this layout."""
        ...

    @property
    def has_residual(self) -> bool:
        """Whether error feedback is used, so that a replica keeps a residual buffer."""
        ...

    def max_bytes(self, layout: Layout) -> int:
        """The largest valid blob: what a peer must be ready to receive, and refuses beyond."""
        ...

    def update_of(self, aggregated: Flat, layout: Layout) -> Flat:
        """What aggregated contributions do to parameters, shape (layout.size,); linear, and the same bits on every
        machine. Another vector only of a codec that `transforms`."""
        return aggregated


def make_codec(name: str, parameters: Mapping[str, int | float] | None = None) -> Codec:
    """The codec a manifest names. Raises ManifestError that lists what there is."""
    from potluck.swarm.codecs.demo import DemoCodec
    from potluck.swarm.codecs.int4 import Int4Codec
    from potluck.swarm.codecs.int8 import Int8Codec
    from potluck.swarm.codecs.none import NoneCodec
    from potluck.swarm.codecs.sign import SignCodec
    from potluck.swarm.codecs.sparse import SparseCodec

    registry = {
        "none": NoneCodec,
        "int8": Int8Codec,
        "int4": Int4Codec,
        "sparse": SparseCodec,
        "demo": DemoCodec,
        "sign": SignCodec,
    }
    if name not in registry:
        raise ManifestError(f"codec.name: unknown codec {name!r}; this version knows {', '.join(registry)}")
    given, settings = dict(parameters or {}), inspect.signature(registry[name]).parameters
    known = {setting: one.default for setting, one in settings.items() if one.default is not one.empty}
    for setting, value in given.items():
        if setting not in known:
            raise ManifestError(f"codec.parameters.{setting}: {name} has {', '.join(known) or 'no settings'}")
        if isinstance(known[setting], int) and not float(value).is_integer():
            raise ManifestError(f"codec.parameters.{setting} is {value}, allowed are whole numbers")
    try:
        codec: Codec = registry[name](**given)  # type: ignore[arg-type]
    except ValueError as error:
        said = ", ".join(f"{setting} = {value}" for setting, value in given.items())
        raise ManifestError(f"codec.parameters of {name} ({said}): {error}") from None
    return codec


CODEC_NAMES = ("none", "int8", "int4", "sparse", "demo", "sign")
