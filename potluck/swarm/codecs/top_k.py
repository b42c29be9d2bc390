"""The largest magnitudes of each chunk, exactly, at about the speed of reading them.

A chunk's values are compared in planes: the k-th largest of the planes' maxima is no larger than the k-th largest
value, so only what reaches it (73 values of 4096 for k = 64) is looked at closely.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

#: Maxima per kept value: with four, an eighth of the candidates is in vain.
MAXIMA_PER_KEPT: Final = 4
MOST_PLANES: Final = 16
#: Values looked at together: they stay in the processor's cache.
SLAB_VALUES: Final = 1 << 17


def top_k(rows: Tensor, keep: int) -> Tensor:
    """Flat indices (rows * keep,), int64, ascending, of each row's `keep` largest magnitudes. `rows`: (count, width),
    contiguous. Of equal magnitudes any may be taken. Raises ValueError for values that are not finite."""
    count, width = rows.shape
    if rows.is_cuda:
        return _slab(rows, keep)
    step = max(1, SLAB_VALUES // width)
    found = [_slab(rows[at : at + step], keep) + at * width for at in range(0, count, step)]
    return torch.cat(found) if len(found) != 1 else found[0]


def _slab(rows: Tensor, keep: int) -> Tensor:
    size, width = _abs(rows), rows.shape[1]
    planes = next((p for p in range(MOST_PLANES, 1, -1) if width % p == 0 and width // p >= MAXIMA_PER_KEPT * keep), 1)
    maxima = _maxima(size.view(len(rows), planes, width // planes)) if planes > 1 else size
    if not bool(maxima.sum().isfinite()):
        raise ValueError("cannot encode values that are not finite")
    least = maxima.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    candidates = _reaching(size, least)
    row = candidates // width
    counts = torch.bincount(row, minlength=len(rows))
    if int(counts.max()) == keep:
        return candidates
    place = torch.arange(len(candidates), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = size.view(-1)[candidates]
    table = torch.full((len(rows), int(counts.max())), -1.0, device=row.device)
    table[row, place] = values
    kept = values >= table.topk(keep, dim=1, sorted=False).values.amin(1)[row]
    if int(kept.sum()) > keep * len(rows):  # several are equal to the least one
        chosen = torch.zeros_like(table, dtype=torch.bool)
        chosen.scatter_(1, table.topk(keep, dim=1, sorted=False).indices, True)
        kept = chosen[row, place]
    return candidates[kept]


# Where all values are gone through, NumPy on a CPU: it starts no threads that wait for each other (`contribution.py`).


def _abs(rows: Tensor) -> Tensor:
    return rows.abs() if rows.is_cuda else torch.from_numpy(np.abs(rows.numpy()))


def _maxima(planes: Tensor) -> Tensor:
    return planes.amax(1) if planes.is_cuda else torch.from_numpy(planes.numpy().max(1))


def _reaching(size: Tensor, least: Tensor) -> Tensor:
    """Flat indices."""
    if size.is_cuda:
        return (size >= least).view(-1).nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(size.numpy() >= least.numpy()))
