"""Loops over many values as machine code (numba): one pass over memory where NumPy takes one for each operation.

Rules for what is compiled ("kernels"; each lies beside what it serves):

- *Equal bits on every machine*: no fast math; multiplications and additions stay apart. Sums of floats have their order
  written down.
- *No bounds are checked*, and an index out of range corrupts memory: a kernel never uses a number from others as an
  index that was not checked before, by itself or by its caller.
- Types are given, so that all is compiled when the module is imported (before any round's deadline), once per machine:
  about 0.2 s a kernel, milliseconds from the cache. Another type raises TypeError.
- Kernels start no threads, and others run beside them (without Python's lock).
- Speed: loop over a block's own slice (`part = values[begin:end]`, `for i in range(part.size)`), which numba knows to
  have no negative indices, so that the loop uses vector instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import numba
from numba import types

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def read_only(dtype: Any) -> Any:
    """A one-dimensional array that is not written to: part of a received blob, for example, at any byte."""
    return types.Array(dtype, 1, "C", readonly=True, aligned=False)


#: Types of kernels' arguments: arrays that are read, and those that are written to.
INT8S, UINT8S, INT32S, UINT32S = map(read_only, (types.int8, types.uint8, types.int32, types.uint32))
INT64S, FLOATS = map(read_only, (types.int64, types.float32))
TO_INT8S, TO_UINT8S, TO_INT32S, TO_INT64S = types.int8[::1], types.uint8[::1], types.int32[::1], types.int64[::1]
TO_FLOATS, TO_DOUBLES = types.float32[::1], types.float64[::1]
INT, FLOAT, BOOL = types.int64, types.float32, types.boolean

#: Bits of a float32: all but the sign, and those of infinity. As integers magnitudes compare as they do as numbers.
MAGNITUDE: Final = 0x7FFFFFFF
INFINITE: Final = 0x7F800000


def compiled(*signatures: Any) -> Callable[[Kernel], Kernel]:
    """Decorates a kernel with the types of its arguments; several signatures for several types. What was compiled is
    kept beside the source or in the user's cache folder; where neither can be written, each process compiles."""

    def compile_(kernel: Kernel, cache: bool) -> Any:
        return numba.njit(list(signatures), cache=cache, error_model="numpy", nogil=True)(kernel)

    def decorate(kernel: Kernel) -> Kernel:
        try:
            made: Kernel = compile_(kernel, cache=True)
        except (RuntimeError, OSError):  # no folder that can be written to; a full disk
            made = compile_(kernel, cache=False)
        return made

    return decorate
