"""Activations and their gradients on the wire: a small head and raw bytes, checked before they are believed.

`none` sends float32 as it is; `int8` sends one float32 scale (absmax / 127) per block of `BLOCK` values and 8 bits per
value. Legend: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from potluck.errors import CodecError
from potluck.net.wire import Buffer

ActivationCodec = Literal["none", "int8"]
ACTIVATION_CODECS: Final = ("none", "int8")
BLOCK: Final = 64
#: Larger values are no activations; 8-bit scales stay far from infinity.
MAX_MAGNITUDE: Final = 1e30


def encoded_bytes(shape: Sequence[int], codec: ActivationCodec) -> int:
    """Bytes of a float tensor of this shape on the wire."""
    values = math.prod(shape)
    return 4 * values if codec == "none" else 4 * -(-values // BLOCK) + values


def encode(x: Tensor, codec: ActivationCodec) -> tuple[list[int], bytes | memoryview]:
    """(shape, body) of a float tensor. Values that are not finite raise CodecError: they would poison others."""
    x = x.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(x).all():
        raise CodecError("activations are not finite")
    if codec == "none":
        return list(x.shape), x.view(-1).numpy().data.cast("B")
    flat = x.view(-1)
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    codes = (blocks / scales.clamp_min(1e-38)).round_().to(torch.int8)
    return list(x.shape), scales.numpy().tobytes() + codes.view(-1)[: flat.numel()].numpy().tobytes()


def decode(shape: Sequence[int], body: Buffer, codec: ActivationCodec) -> Tensor:
    """float32 tensor of `shape`, which the caller has checked; it may share memory with `body`. Raises CodecError."""
    _check_size(shape, body, codec)
    values = math.prod(shape)
    if codec == "none":
        x = torch.frombuffer(body, dtype=torch.float32)
    else:
        count = -(-values // BLOCK)
        scales = torch.frombuffer(body, dtype=torch.float32, count=count)
        codes = torch.frombuffer(body, dtype=torch.int8, offset=4 * count)
        padded = functional.pad(codes, (0, -values % BLOCK)).view(-1, BLOCK)
        x = (padded * scales[:, None]).view(-1)[:values]
    if not bool((x.abs() <= MAX_MAGNITUDE).all()):  # false for what is not a number, too
        raise CodecError("activations are not finite, or too large")
    return x.view(tuple(shape))


def check(shape: Sequence[int], body: Buffer, codec: ActivationCodec) -> None:
    """Whether `decode` would take it, without decoding all of it. Raises CodecError."""
    _check_size(shape, body, codec)
    count = math.prod(shape) if codec == "none" else -(-math.prod(shape) // BLOCK)
    largest = MAX_MAGNITUDE if codec == "none" else MAX_MAGNITUDE / 128
    if not bool((np.abs(np.frombuffer(body, dtype=np.float32, count=count)) <= largest).all()):
        raise CodecError("activations are not finite, or too large")


def _check_size(shape: Sequence[int], body: Buffer, codec: ActivationCodec) -> None:
    size = encoded_bytes(shape, codec)
    if len(memoryview(body)) != size:
        raise CodecError(f"{len(memoryview(body))} bytes for activations of shape {tuple(shape)}, not {size}")


def encode_tokens(tokens: Tensor) -> bytes:
    """int64 (B, T) as 32-bit integers."""
    return tokens.to("cpu", torch.int32).contiguous().numpy().tobytes()


def decode_tokens(shape: Sequence[int], body: Buffer, vocabulary: int) -> Tensor:
    """int64 (B, T). Raises CodecError for another length, or for tokens that the model does not have."""
    if len(memoryview(body)) != 4 * math.prod(shape):
        raise CodecError(f"{len(memoryview(body))} bytes for tokens of shape {tuple(shape)}")
    tokens = torch.frombuffer(body, dtype=torch.int32).view(tuple(shape)).to(torch.int64)
    if not bool(((tokens >= 0) & (tokens < vocabulary)).all()):
        raise CodecError(f"a token outside of the vocabulary of {vocabulary}")
    return tokens


def checked_shape(head: Mapping[str, Any], limits: Sequence[int], exact_last: bool) -> list[int]:
    """The head's `shape`, of as many numbers as `limits`, each from 1 to its limit (the last equal to it if
    `exact_last`). Raises CodecError."""
    shape = head.get("shape")
    fits = (
        isinstance(shape, list)
        and len(shape) == len(limits)
        and all(isinstance(n, int) and 1 <= n <= limit for n, limit in zip(shape, limits, strict=True))
        and (not exact_last or shape[-1] == limits[-1])
    )
    if not fits:
        raise CodecError(f"activations of shape {str(shape)[:80]}; allowed are at most {tuple(limits)}")
    return list(head["shape"])
