from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """Unix socket paths have 107 bytes at most; pytest's own directories are too deep."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="pl"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
