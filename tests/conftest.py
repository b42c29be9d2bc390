"""Settings of all tests: hypothesis asserts no wall time, and each worker computes in one thread."""

import os

from hypothesis import settings

# Before torch is imported, and for the processes that tests start: two workers with a pool each wait for each other.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

settings.register_profile("potluck", deadline=None)
settings.load_profile("potluck")
