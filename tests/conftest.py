"""Settings of all tests: hypothesis asserts no wall time, machines are shared."""

from hypothesis import settings

settings.register_profile("potluck", deadline=None)
settings.load_profile("potluck")
