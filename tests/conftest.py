"""Settings of all tests: hypothesis asserts no wall time, and each worker computes in one thread."""

import os

import pytest
from hypothesis import settings

# Before torch is imported, and for the processes that tests start: two workers with a pool each wait for each other.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# The same examples for the same code: a failure belongs to the change. `make nightly` looks for new ones.
settings.register_profile("potluck", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("potluck")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers get equal parts of the list, and take from each other at the end: the slow ones come first in each part,
    so that what is left at the end is short, and those that wait for rounds run beside each other."""
    slow = [item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("privileged")]
    quick = [item for item in items if item not in slow]
    parts = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = [item for part in range(parts) for each in (slow, quick) for item in each[part::parts]]
