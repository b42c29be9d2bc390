"""Work on parts of a module, by as many threads as torch is given. For what lets go of the GIL, in long operations that
torch and NumPy do not share out themselves, and whose outcome does not depend on who does which part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def share_out(work: Callable[[Sequence[T]], None], parts: Sequence[T]) -> None:
    """`work` on some of the parts, in each thread. Raises what it raises."""
    threads = max(1, min(torch.get_num_threads(), len(parts)))
    if threads == 1:
        work(parts)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, parts[each::threads]) for each in range(1, threads)]
        work(parts[::threads])
        for other in others:
            other.result()
